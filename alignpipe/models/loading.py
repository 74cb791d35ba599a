"""Opens the models that stages train and sample from.

path or hub id, tokenizer -> causal language model: whole, finite, float32, without dropout, ids set
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import logging

from alignpipe.artifact import MANIFEST
from alignpipe.config import TINY, ArchitectureConfig
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import CheckpointError, ConfigError, MachineError
from alignpipe.models.adapters import (
    Adapters,
    Base,
    add_adapter,
    has_adapter,
    has_head,
    merged,
    open_base,
    role_on,
)
from alignpipe.models.attention import allow_packing
from alignpipe.models.files import check_files

MAX_POSITIONS = 512
# A narrow model learns sooner from larger first weights, and its texts are shorter than a long rope's first turn.
INITIALIZER_RANGE = 0.06
ROPE_THETA = 100.0
SCORE = "score.weight"
# Everything a model needs, and nothing that could run.
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


@dataclass(frozen=True)
class ModelSource:
    """Where the weights of a model come from.

    Attributes:
        path: the reserved word `tiny`, a folder, or a hub id.
        revision: commit of a hub id.
        architecture: shape and seed of the model that `tiny` stands for.
        adapters: of the stage; None where whole weights are trained.
        trusted: the code that comes with it may run, as the user said of this very model.
    """

    path: str
    revision: str | None = None
    architecture: ArchitectureConfig | None = None
    adapters: Adapters | None = None
    trusted: bool = False

    @property
    def is_tiny(self) -> bool:
        """Whether it is built in memory rather than read."""
        return self.path == TINY

    @property
    def is_adapted(self) -> bool:
        """Whether it is opened as a base with an adapter on it."""
        return self.adapters is not None or self.parent is not None

    @property
    def parent(self) -> Path | None:
        """The folder, where an adapter lies in it.

        Raises:
            CheckpointError: there is an adapter and something about it is missing or damaged.
        """
        folder = None if self.is_tiny else self.folder()
        if folder is None or not has_adapter(folder):
            return None
        check_files(folder, trusted=self.trusted)
        return folder

    def folder(self) -> Path:
        """The folder that holds the files; a hub id is fetched into the hub's own cache first.

        Raises:
            CheckpointError: there is no such folder, and no such model on the hub.
            MachineError: the hub cannot be reached and the model is not in the cache.
        """
        folder = Path(self.path).expanduser()
        looks_local = self.path.startswith((".", "/", "~")) or self.path.count("/") != 1
        return folder if looks_local or folder.is_dir() else self._fetch()

    def _fetch(self) -> Path:
        patterns = [*HUB_FILES, *(["*.py"] if self.trusted else [])]
        try:
            return Path(snapshot_download(self.path, revision=self.revision, allow_patterns=patterns))
        except LocalEntryNotFoundError as error:
            raise MachineError(
                f"{self.path}: no such folder, and not in the hub's cache while the hub cannot be reached; "
                f"download it where there is a network, or give a folder as model.path"
            ) from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise CheckpointError(f"{self.path}: no such folder, and no such model on the hub") from error
        except (HfHubHTTPError, OSError) as error:
            raise MachineError(
                f"{self.path}: the hub did not deliver it ({_first_line(error)}); try again"
            ) from error


def load_policy(
    source: ModelSource,
    tokenizer: Tokenizer,
    attn_implementation: str = "sdpa",
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Open a causal language model.

    Args:
        source: where it comes from.
        tokenizer: whose ids it reads; embeddings grow when it has more of them than the model has rows.
        attn_implementation: of transformers.
        device: where it goes.

    Returns:
        The model in evaluation mode, float32, without dropout, pad, BOS and EOS ids set; with an adapter where the
        stage trains adapters, with the parent's adapter merged where it does not.

    Raises:
        CheckpointError: it is missing, half-written, damaged, of another kind, or wants to run code.
        MachineError: the machine cannot run it, or a hub id cannot be fetched.
        ConfigError: `model.architecture` describes no model.
    """
    if not source.is_adapted:
        folder = None if source.is_tiny else source.folder()
        return prepare(_open_policy(source, folder, tokenizer, attn_implementation, {}), tokenizer, device)
    parent = source.parent
    if parent is not None and has_head(parent):
        raise CheckpointError(f"{parent}: a reward model, where a language model is needed; name a policy")
    base = policy_base(source, tokenizer, attn_implementation, device)
    model = prepare(add_adapter(role_on(base.model), source.adapters, parent), tokenizer, device)
    return merged(model) if source.adapters is None else model


def policy_base(
    source: ModelSource, tokenizer: Tokenizer, attn_implementation: str, device: torch.device | str
) -> Base:
    """The frozen language model under a source's adapter, the same one for every role of a stage that stands on it.

    Raises:
        CheckpointError, MachineError, ConfigError: as `load_policy`.
    """
    loading = {} if source.adapters is None else source.adapters.loading(device)

    def open_whole(folder: Path | None) -> PreTrainedModel:
        return _open_policy(source, folder, tokenizer, attn_implementation, loading)

    return shared_base(source, tokenizer, device, open_whole)


def shared_base(
    source: ModelSource,
    tokenizer: Tokenizer,
    device: torch.device | str,
    open_whole: Callable[[Path | None], PreTrainedModel],
) -> Base:
    """The frozen weights of a source, ready for use, opened once a stage."""
    folder = None if source.is_tiny else source.folder()

    def opened(plain: Path | None) -> tuple[PreTrainedModel, bool]:
        model = open_whole(plain)
        rows = num_rows(model)
        prepare(model, tokenizer, device)
        return model, num_rows(model) == rows

    is_hub = folder is not None and folder != Path(source.path).expanduser()
    return open_base(
        folder,
        str(source.architecture),
        {} if source.adapters is None else source.adapters.bases,
        opened,
        name=source.path if is_hub or folder is None else str(folder.resolve()),
        revision=source.revision,
        lasting=is_hub or (folder is not None and (folder / MANIFEST).is_file()),
    )


def _open_policy(
    source: ModelSource,
    folder: Path | None,
    tokenizer: Tokenizer,
    attn_implementation: str,
    loading: Mapping[str, Any],
) -> PreTrainedModel:
    """A whole language model, built or read from a folder, with nothing done to it yet."""
    if folder is None:
        return _build_tiny(source, tokenizer, attn_implementation)
    model, missing, unexpected = open_model(
        AutoModelForCausalLM, folder, attn_implementation, loading, source.trusted
    )
    if SCORE in unexpected:
        raise CheckpointError(f"{folder}: a reward model, where a language model is needed; name a policy")
    refuse(folder, "missing", missing)
    refuse(folder, "unknown", unexpected)
    return model


def tiny_config(tokenizer: Tokenizer, architecture: ArchitectureConfig) -> LlamaConfig:
    """The configuration of the small Llama (arXiv:2302.13971) that `tiny` stands for, embeddings tied.

    Raises:
        ConfigError: the heads do not divide the hidden size into even parts.
    """
    if architecture.hidden_size % (2 * architecture.num_heads):
        raise ConfigError(
            f"model.architecture.hidden_size: {architecture.hidden_size} must be a multiple of twice "
            f"num_heads ({architecture.num_heads}), since rotary positions turn pairs of numbers in each head"
        )
    return LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_heads,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=INITIALIZER_RANGE,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )


def open_model(
    auto_class: type[_BaseAutoModelClass],
    folder: Path,
    attn_implementation: str,
    loading: Mapping[str, Any] | None = None,
    trusted: bool = False,
    **settings: Any,
) -> tuple[PreTrainedModel, set[str], set[str]]:
    """Open a folder with transformers, safetensors only, and no code of its own that is not trusted.

    Args:
        auto_class: which head to put on.
        folder: the checkpoint.
        attn_implementation: of transformers.
        loading: more that `from_pretrained` is told.
        trusted: the user trusts the code that comes with it.
        settings: more fields of the model's configuration.

    Returns:
        The model, and the names of weights that were missing and that were left over.

    Raises:
        CheckpointError: it cannot be opened, or weights have another shape than `config.json` says.
        MachineError: the attention implementation is not installed.
    """
    check_files(folder, trusted=trusted)
    try:
        with quiet():
            model, info = auto_class.from_pretrained(
                folder,
                config=_configuration(folder, trusted, settings),
                dtype=torch.float32,
                attn_implementation=attn_implementation,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trusted,
                # Only so that the names come back: a mismatch is refused below.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **(loading or {}),
            )
    except ImportError as error:
        raise MachineError(f"model.attn_implementation: {_first_line(error)}; use sdpa") from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: transformers cannot open it: {_first_line(error)}") from error
    refuse(folder, "wrongly shaped", {str(name) for name, *_ in info["mismatched_keys"]})
    return model, set(info["missing_keys"]), set(info["unexpected_keys"])


def refuse(folder: Path, what: str, names: Iterable[str]) -> None:
    """Raise when any weight is wrong in a way.

    Raises:
        CheckpointError: names the first three, and how many there are.
    """
    names = sorted(names)
    if names:
        more = f", ... {len(names)} in all" if len(names) > 3 else ""
        raise CheckpointError(
            f"{folder}: {what} weights: {', '.join(names[:3])}{more}; "
            f"the files do not belong to its config.json"
        )


def prepare(model: PreTrainedModel, tokenizer: Tokenizer, device: torch.device | str) -> PreTrainedModel:
    """Make any model fit for a stage: finite, as many rows as ids, ids set, on its device.

    Raises:
        CheckpointError: a weight is not finite.
    """
    _check_finite(model)
    _grow_embeddings(model, tokenizer.vocab_size)
    stop_ids = list(tokenizer.stop_ids)
    ids = {
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stop_ids[0] if len(stop_ids) == 1 else stop_ids,
    }
    for config in (model.config, model.config.get_text_config()):
        for name, value in ids.items():
            setattr(config, name, value)
    if model.can_generate():
        # A fresh one: sampling defaults of the base (top-p and the like) are not what it is trained under.
        model.generation_config = GenerationConfig(**ids)  # type: ignore[no-untyped-call]
    model.to(device)  # type: ignore[arg-type]
    model.train(False)
    return allow_packing(model)


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Take the gradients off a model: a reference or a reward model."""
    model.requires_grad_(False)
    model.train(False)
    return model


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put a model in evaluation mode inside the block, and back to what it was after it."""
    training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the terminal inside the block."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(ERROR)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _build_tiny(source: ModelSource, tokenizer: Tokenizer, attn_implementation: str) -> PreTrainedModel:
    if source.architecture is None:
        raise ConfigError("model.architecture: needed to build model.path=tiny")
    config = tiny_config(tokenizer, source.architecture)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(source.architecture.seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32, attn_implementation=attn_implementation
        )
    return model


def _check_finite(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(
                f"weight {name} holds NaN or infinity; use an earlier checkpoint of this model"
            )


def _configuration(folder: Path, trusted: bool, settings: dict[str, Any]) -> PreTrainedConfig:
    """The folder's configuration without dropout.

    Ratios and KL compare two passes over the same tokens, so both must be the same function.
    """
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=trusted, **settings
    )
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def has_own_code(model: PreTrainedModel) -> bool:
    """Whether a model's class came with its weights, which only a trusted one's can."""
    return model._auto_class is not None


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence that the model was made for; None when its architecture has no such limit."""
    config = model.config.get_text_config()
    names = ("max_position_embeddings", config.attribute_map.get("max_position_embeddings", ""))
    found = [value for name in names if isinstance(value := vars(config).get(name), int)]
    return found[0] if found else None


def num_rows(model: PreTrainedModel) -> int:
    """Rows of the input embeddings: ids the model can read."""
    weight = model.get_input_embeddings().get_parameter("weight")
    return weight.shape[0]


def _grow_embeddings(model: PreTrainedModel, num_ids: int) -> None:
    """New rows are the mean of the old ones: likely like any token, and the same on every machine."""
    rows = num_rows(model)
    if num_ids <= rows:
        return
    # With a random mean_resizing the rows would depend on the state of the global generator.
    model.resize_token_embeddings(num_ids, mean_resizing=False)
    heads = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    for layer in (model.get_input_embeddings(), heads):
        if layer is None:
            continue
        for parameter in layer.parameters(recurse=False):
            with torch.no_grad():
                parameter[rows:] = parameter[:rows].mean(0)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
