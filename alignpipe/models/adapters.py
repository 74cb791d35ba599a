"""Low-rank adapters: every role of a stage is one adapter on the same frozen weights.

LoRA (arXiv:2106.09685): W x + alpha / rank * B A x with B = 0 at first. QLoRA (arXiv:2305.14314): W in 4 bits.

A role is a model of its own, module by module, whose base weights are the very tensors of every other role on that
base. So nothing has to be switched: two roles can stand in one graph, be frozen or trained, each by itself.

base, adapter of the parent or none -> role; role -> folder with base, adapter and configuration
"""

import copy
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from alignpipe.artifact import read_manifest, sha256_file
from alignpipe.config import AdapterConfig
from alignpipe.errors import CheckpointError, MachineError
from alignpipe.models.files import ADAPTER_WEIGHTS
from alignpipe.remote_code import ADAPTER

NAME = "default"
HEAD = "score"
# As peft writes them, so that its own classes open the file too.
PREFIX = "base_model.model."
# What decides the function of an adapter beside its weights.
SETTINGS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Base:
    """Frozen weights that roles share.

    Attributes:
        model: whole; the modules of a role are copies of its modules.
        folder: whose files hold these very weights; None while they are in memory alone.
        lasting: the folder's files are never written to again, so a second name for them is as good as a copy.
        name: where a user finds the base, a folder or a hub id, for the adapter's own configuration.
        revision: commit of a hub id.
    """

    model: PreTrainedModel
    folder: Path | None = None
    lasting: bool = False
    name: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Adapters:
    """The adapters of one stage.

    Attributes:
        config: rank, scale, layers.
        seed: of what is drawn for a new adapter.
        bases: opened so far, by the hash of their weights.
    """

    config: AdapterConfig
    seed: int
    bases: dict[str, Base] = field(default_factory=dict)

    def base_of(self, model: PreTrainedModel) -> Base:
        """The base whose weights a role stands on."""
        weights = {id(parameter) for parameter in model.parameters()}
        return next(
            base for base in self.bases.values() if weights & {id(p) for p in base.model.parameters()}
        )

    def loading(self, device: torch.device | str) -> dict[str, Any]:
        """What `from_pretrained` is told so that a base comes in 4 bits; nothing for plain LoRA."""
        if self.config.kind != "qlora":
            return {}
        if torch.device(device).type != "cuda":
            raise MachineError(
                f"adapter.kind=qlora: needs a CUDA device, this stage has {device}; use adapter=lora"
            )
        settings = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return {"quantization_config": settings, "device_map": {"": device}}


def has_adapter(folder: Path) -> bool:
    """Whether a checkpoint is a base with an adapter rather than whole weights."""
    return (folder / ADAPTER).is_file()


def has_head(folder: Path) -> bool:
    """Whether the adapter of a checkpoint comes with the head of a scalar model."""
    return HEAD in (_read_settings(folder).modules_to_save or [])


def open_base(
    folder: Path | None,
    identity: str,
    bases: dict[str, Base],
    open_whole: Callable[[Path | None], tuple[PreTrainedModel, bool]],
    *,
    name: str | None = None,
    revision: str | None = None,
    lasting: bool = False,
) -> Base:
    """The frozen weights of a source, opened once a stage.

    Args:
        folder: whole weights, or an adapter beside its base; None for a model that is built.
        identity: of a model that is built; a folder is known by the hash of its weights.
        bases: opened so far.
        open_whole: from a folder to a model ready for use, and whether it still is what the files hold.
        name: hub id or folder of whole weights.
        revision: commit of a hub id.
        lasting: whether the folder is one that nobody writes to.

    Returns:
        The base; nothing of it takes a gradient.
    """
    if folder is not None:
        identity = _identity(folder)
        if has_adapter(folder):
            settings = _read_settings(folder)
            name, revision = settings.base_model_name_or_path, settings.revision
    if identity not in bases:
        with _without_adapter(folder) as plain:
            model, same = open_whole(plain)
        model.requires_grad_(False)
        bases[identity] = (
            Base(model, folder, lasting, name, revision) if same and folder is not None else Base(model)
        )
    return bases[identity]


def role_on(base: PreTrainedModel) -> PreTrainedModel:
    """A model with modules of its own on the tensors of another: it costs no weights."""
    shared: list[Any] = [*base.parameters(), *base.buffers()]
    # Scales of weights in 4 bits; bitsandbytes keeps them on the layer as well as on the weight.
    shared += [module.quant_state for module in base.modules() if hasattr(module, "quant_state")]
    return copy.deepcopy(base, {id(item): item for item in shared})


def add_adapter(
    model: PreTrainedModel, adapters: Adapters | None, parent: Path | None, *, new_head: bool = False
) -> PreTrainedModel:
    """Put an adapter on a role: a copy of the parent's, or a new one that changes nothing yet.

    Args:
        model: from `role_on`, with its head if it is a scalar model.
        adapters: of the stage; None takes the parent's settings, whatever they are.
        parent: checkpoint with an adapter; None for whole weights.
        new_head: the head is not in the parent's file.

    Raises:
        CheckpointError: the parent's adapter has another rank, scale or other layers than the stage asks for.
    """
    peft = import_module("peft")
    scalar = hasattr(model, HEAD)
    theirs: Any = None if parent is None else _read_settings(parent)
    settings: Any = _new_settings(adapters.config) if adapters is not None else copy.deepcopy(theirs)
    settings.task_type = "SEQ_CLS" if scalar else "CAUSAL_LM"
    settings.modules_to_save = [HEAD] if scalar else None
    settings.inference_mode = False
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GPT-2 keeps its weights transposed; peft says that it noticed
        torch.manual_seed(0 if adapters is None else adapters.seed)
        try:
            model.add_adapter(settings)
        except ValueError as error:
            raise CheckpointError(f"adapter.target_modules: {str(error).partition('. ')[0]}") from error
    if parent is not None:
        for name in SETTINGS:
            if getattr(theirs, name) != getattr(settings, name):
                raise _other_adapter(parent, f"{name} {getattr(theirs, name)}, not {getattr(settings, name)}")
        _copy_weights(peft.get_peft_model_state_dict(model, save_embedding_layers=False), parent, new_head)
    return model


def _new_settings(config: AdapterConfig) -> Any:
    modules = list(config.target_modules)
    return import_module("peft").LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=modules[0] if modules == ["all-linear"] else modules,
    )


def _read_settings(folder: Path) -> Any:
    try:
        return import_module("peft").PeftConfig.from_pretrained(str(folder), local_files_only=True)
    except ImportError as error:
        raise MachineError(
            f"{folder}: has an adapter, and peft is not installed; pip install 'alignpipe[lora]'"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / ADAPTER}: cannot be read ({error}); copy the model again"
        ) from error


@torch.no_grad()
def _copy_weights(mine: dict[str, torch.Tensor], parent: Path, new_head: bool) -> None:
    theirs = {
        name.removeprefix(PREFIX): tensor for name, tensor in load_file(parent / ADAPTER_WEIGHTS).items()
    }
    wanted = {name for name in mine if not (new_head and name.startswith(f"{HEAD}."))}
    if differing := sorted(wanted ^ theirs.keys()):
        raise _other_adapter(parent, f"other layers, such as {differing[0]}")
    for name in wanted:
        if mine[name].shape != theirs[name].shape:
            raise _other_adapter(parent, f"another shape of {name}")
        mine[name].copy_(theirs[name])


def _other_adapter(parent: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{parent}: its adapter has {what}; take the settings it was trained with, or make it with "
        f"adapter.handover=merge"
    )


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """Add a role's adapter into the weights it stands on, in place, and take it off.

    Args:
        model: a role whose base is no other role's.

    Returns:
        The same model without an adapter, all weights its own.
    """
    for name, module in list(model.named_modules()):
        if hasattr(module, "get_base_layer"):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
        elif hasattr(module, "modules_to_save"):
            model.set_submodule(name, module.modules_to_save[NAME])
    del model.peft_config
    model._hf_peft_config_loaded = False
    model.requires_grad_(True)
    return model


def save_adapter(model: PreTrainedModel, base: Base, folder: Path) -> None:
    """Write a checkpoint whose root holds the base's weights, one adapter, and the model's configuration.

    With all three in one folder `from_pretrained` needs nothing else, wherever the folder goes. Files of a base in
    the store are linked, so they take their place on the disk once.

    Args:
        model: a role.
        base: that it stands on.
        folder: made when it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if base.folder is None:
        base.model.save_pretrained(folder)
    else:
        for path in _weight_files(base.folder):
            _place(path.resolve(), folder / path.name, link=base.lasting)
    config: PreTrainedConfig = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):
        # The files hold the weights as they were before they were cut to 4 bits; any machine opens those.
        del config.quantization_config
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    settings: Any = copy.deepcopy(model.peft_config[NAME])
    settings.base_model_name_or_path, settings.revision = base.name, base.revision
    settings.target_modules = sorted(settings.target_modules)
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
    weights = import_module("peft").get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in sorted(weights.items())}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold whole weights, their index among them."""
    found = sorted(folder.glob("*.safetensors*"))
    return [path for path in found if path.name != ADAPTER_WEIGHTS]


def _place(path: Path, target: Path, *, link: bool) -> None:
    if link:
        try:
            os.link(path, target)
        except OSError:  # another disk, or one that knows no links
            pass
        else:
            return
    shutil.copyfile(path, target)


def _identity(folder: Path) -> str:
    """One hash over whole weights, the same wherever a copy of them lies."""
    manifest = read_manifest(folder)
    known = {} if manifest is None else manifest.files
    return " ".join(
        known[path.name].sha256
        if path.name in known
        else _hash(path, path.stat().st_size, path.stat().st_mtime_ns)
        for path in _weight_files(folder)
    )


@lru_cache(maxsize=64)
def _hash(path: Path, _size: int, _time: int) -> str:
    return sha256_file(path)


@contextmanager
def _without_adapter(folder: Path | None) -> Iterator[Path | None]:
    """A view of a checkpoint in which transformers finds the base alone."""
    if folder is None or not has_adapter(folder):
        yield folder
        return
    with TemporaryDirectory() as view:
        for path in folder.iterdir():
            if path.is_file() and path.name not in (ADAPTER, ADAPTER_WEIGHTS):
                (Path(view) / path.name).symlink_to(path.resolve())
        yield Path(view)
