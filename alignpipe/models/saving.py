"""Writes a checkpoint that any other tool opens, and makes sure of it.

model, tokenizer -> folder of safetensors and JSON that `from_pretrained` opens with equal outputs
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from alignpipe import processes
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.disk import refusal
from alignpipe.errors import CheckpointError
from alignpipe.models.adapters import Adapters, save_adapter
from alignpipe.models.loading import evaluating, has_own_code, num_rows, quiet
from alignpipe.models.sharding import whole_weights
from alignpipe.remote_code import CONFIG

ModelKind = Literal["policy", "reward"]
PROBE_SHAPE = (3, 16)


def save_model(
    model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, adapters: Adapters | None = None
) -> None:
    """Write weights, configuration, tokenizer and chat template; of several processes the first one writes.

    Args:
        model: a policy or a scalar model, unwrapped.
        tokenizer: that it was trained with.
        folder: made when it is not there.
        adapters: of the stage, where the model is an adapter on a base.

    Raises:
        MachineError: the disk refuses it.
    """
    weights = whole_weights(model)

    def write() -> None:
        try:
            with quiet():
                if adapters is None:
                    model.save_pretrained(folder, state_dict=weights)
                else:
                    save_adapter(model, adapters.base_of(model), folder)
            tokenizer.save(folder)
            _add_older_keys(folder / CONFIG)
        except (OSError, SafetensorError) as error:
            raise refusal(folder, error, model.num_parameters() * model.dtype.itemsize) from error

    processes.from_main(write)


def verify_reload(
    model: PreTrainedModel, folder: Path, kind: ModelKind, loading: Mapping[str, Any] | None = None
) -> None:
    """Open a folder the way any user of transformers does, and compare it with the model in memory.

    On a CPU in float32 the outputs must be equal bit for bit, elsewhere within rounding. Of a model that is cut over
    processes the weights are compared instead, on the CPU: whole it may fit on no device.

    Args:
        model: that was saved.
        folder: where.
        kind: which head it has.
        loading: more that `from_pretrained` is told.

    Raises:
        CheckpointError: it does not open, or gives other outputs.
    """
    weights = whole_weights(model)

    def compare() -> None:
        reloaded = _reopen(model, folder, kind, loading or {})
        if weights is None:
            _compare_outputs(model, reloaded, folder, exact=not loading)
        else:
            _compare_weights(weights, reloaded, folder)

    processes.from_main(compare)


def _reopen(
    model: PreTrainedModel, folder: Path, kind: ModelKind, loading: Mapping[str, Any]
) -> PreTrainedModel:
    auto_class = AutoModelForCausalLM if kind == "policy" else AutoModelForSequenceClassification
    try:
        with quiet():
            reloaded: PreTrainedModel = auto_class.from_pretrained(
                folder,
                attn_implementation=model.config._attn_implementation,
                local_files_only=True,
                trust_remote_code=has_own_code(model),
                **loading,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: written, but cannot be opened again ({error})") from error
    return reloaded


def _compare_weights(weights: Mapping[str, Tensor], reloaded: PreTrainedModel, folder: Path) -> None:
    theirs = {**dict(reloaded.named_parameters()), **dict(reloaded.named_buffers())}
    for name, mine in weights.items():
        if name not in theirs or not torch.equal(mine, theirs[name]):
            raise CheckpointError(
                f"{folder}: opened again it has another {name}; the files do not hold what was trained"
            )


def _compare_outputs(model: PreTrainedModel, reloaded: PreTrainedModel, folder: Path, *, exact: bool) -> None:
    reloaded.to(model.device)  # type: ignore[arg-type]
    ids = _probe(model)
    mine, theirs = _outputs(model, ids), _outputs(reloaded, ids)
    exact = exact and model.device.type == "cpu" and model.dtype == torch.float32
    same = torch.equal(mine, theirs) if exact else torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3)
    if not same:
        raise CheckpointError(
            f"{folder}: opened again it gives other outputs (largest difference "
            f"{(mine - theirs).abs().max().item():.3g}); the files do not hold what was trained"
        )


def _add_older_keys(path: Path) -> None:
    """Name things as transformers 4 does too: without `rope_theta` it takes 10000, in silence."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and isinstance(rope.get("rope_theta"), int | float):
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            config.setdefault(
                "rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"}
            )
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _probe(model: PreTrainedModel) -> Tensor:
    """Ids spread over the vocabulary, so that every part of every layer has a say."""
    rows, columns = PROBE_SHAPE
    ids = torch.arange(rows * columns).mul(7919).remainder(num_rows(model)).view(rows, columns)
    return ids.to(model.device)


def _outputs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.inference_mode(), evaluating(model):
        logits: Tensor = model(input_ids=ids).logits
    return logits
