"""Reward and value models: a causal language model with one number a token in place of the vocabulary.

A reward model may have several heads on its one backbone, `num_labels` of them; its score is their mean, and where
they differ it is not sure (ensembles: arXiv:2310.02743, 2312.09244).

checkpoint -> sequence classifier with a label a head; ids (B, T) -> scores (B, T), or (B,) at the last real token
"""

from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from alignpipe.data.collate import TokenBatch
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import CheckpointError
from alignpipe.models.adapters import add_adapter, has_head, merged, role_on
from alignpipe.models.files import check_files
from alignpipe.models.forward import body_states
from alignpipe.models.loading import (
    SCORE,
    ModelSource,
    has_own_code,
    load_policy,
    open_model,
    policy_base,
    prepare,
    quiet,
    refuse,
    shared_base,
)
from alignpipe.remote_code import CONFIG, read_object

OUTPUT_HEADS = ("lm_head.", "embed_out.")
# Several labels make a classifier of texts; only numbers by themselves are scores.
REGRESSION = {"problem_type": "regression"}


def load_scalar_model(
    source: ModelSource,
    tokenizer: Tokenizer,
    attn_implementation: str = "sdpa",
    device: torch.device | str = "cpu",
    *,
    seed: int | None = None,
    num_heads: int = 1,
    all_heads: bool = False,
) -> PreTrainedModel:
    """Open a reward or value model.

    Args:
        source: a language model that gets a head, or a model that has one.
        tokenizer: whose ids it reads.
        attn_implementation: of transformers.
        device: where it goes.
        seed: draws new heads for a language model, normal with deviation 1 / sqrt(d + 1), so that scores
            begin near deviation 1; None means that the model has its own.
        num_heads: new heads.
        all_heads: keep the heads that the model has apart; else their mean is its one head.

    Returns:
        A sequence classifier with a label a head, in evaluation mode, float32, without dropout.

    Raises:
        CheckpointError: it is missing, damaged, of the other kind, or its architecture has no `score` head.
        MachineError: the machine cannot run it, or a hub id cannot be fetched.
    """
    if source.is_tiny and seed is None:
        raise CheckpointError(
            "tiny: an untrained language model, where a reward model is needed; run stage=rm"
        )
    if source.is_adapted:
        model = _with_adapter(source, tokenizer, attn_implementation, device, seed, num_heads)
        return model if seed is not None or all_heads else _with_mean_head(model)
    if source.is_tiny:
        model = _from_policy(load_policy(source, tokenizer, attn_implementation), num_heads)
    else:
        model = _open(source, attn_implementation, device, None if seed is None else num_heads)
    if seed is not None:
        _init_head(model, seed)
    elif not all_heads:
        _with_mean_head(model)
    return prepare(model, tokenizer, device)


def token_scores(model: PreTrainedModel, batch: TokenBatch, at: Tensor) -> Tensor:
    """The score read at tokens: the reward or value of the text up to there.

    Args:
        model: from `load_scalar_model`.
        batch: B sequences.
        at: (B, T) bool, the tokens.

    Returns:
        (B, T) float32, 0 elsewhere.
    """
    scores = _scores(model, body_states(model, batch, at)).mean(-1)
    return scores.new_zeros(at.shape).masked_scatter(at, scores)


def next_token_scores(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """The score before each token under the loss mask, read at the token that stands before it.

    Args:
        model: from `load_scalar_model`.
        batch: B sequences.

    Returns:
        (B, T - 1) float32, laid out as `batch.loss_mask[:, 1:]` is; 0 where that is false.
    """
    return token_scores(model, batch, nn.functional.pad(batch.loss_mask[:, 1:], (0, 1)))[:, :-1]


def sequence_scores(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """The score at the last real token of each row, whatever the padding.

    Args:
        model: from `load_scalar_model`.
        batch: B sequences, padded on the right.

    Returns:
        (B,) float32, the mean over the heads.
    """
    return sequence_head_scores(model, batch).mean(-1)


def sequence_head_scores(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """What `sequence_scores` is the mean of: each head's score, (B, H) float32."""
    last = torch.arange(batch.input_ids.shape[1], device=model.device) == batch.lengths[:, None] - 1
    return _scores(model, body_states(model, batch, last))


def score_head(model: PreTrainedModel) -> nn.Linear:
    """The head of a scalar model, or its heads as rows of one.

    Raises:
        CheckpointError: the architecture keeps no linear `score` over its last hidden state.
    """
    try:
        head = model.get_submodule("score")
        # Beside an adapter the head is trained whole; peft keeps the one it started from as well.
        head = head.get_submodule("modules_to_save.default") if hasattr(head, "modules_to_save") else head
    except AttributeError:
        head = None
    if not isinstance(head, nn.Linear):
        raise CheckpointError(
            f"{type(model).__name__}: has no `score` head, so it cannot be a reward or value "
            f"model; use a decoder-only architecture such as Llama, Qwen, Mistral, Gemma or GPT-2"
        )
    return head


def _scores(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    # In bfloat16 a score of 5 has steps of 1/32, more than many margins.
    with torch.autocast(hidden.device.type, enabled=False):
        scores: Tensor = score_head(model)(hidden.float())
    return scores


def _with_adapter(
    source: ModelSource,
    tokenizer: Tokenizer,
    attn_implementation: str,
    device: torch.device | str,
    seed: int | None,
    num_heads: int,
) -> PreTrainedModel:
    """An adapter and a head of its own on the weights that other roles share."""
    parent = source.parent
    if parent is not None and has_head(parent) and seed is not None:
        raise _already_scalar(parent)
    if parent is not None and not has_head(parent) and seed is None:
        raise _not_scalar(parent)
    if parent is not None or seed is not None:
        base = policy_base(source, tokenizer, attn_implementation, device)
        heads = num_heads if parent is None or seed is not None else _num_heads(source)
        model = _from_policy(role_on(base.model), heads)
    else:
        base = shared_base(
            source, tokenizer, device, lambda _: _open(source, attn_implementation, device, None)
        )
        model = role_on(base.model)
    if seed is not None:
        _init_head(model, seed)
    add_adapter(model, source.adapters, parent, new_head=seed is not None)
    prepare(model, tokenizer, device)
    return merged(model) if source.adapters is None else model


def _open(
    source: ModelSource, attn_implementation: str, device: torch.device | str, new_heads: int | None
) -> PreTrainedModel:
    folder = source.folder()
    loading = {} if source.adapters is None else source.adapters.loading(device)
    new_head = new_heads is not None
    settings: dict[str, Any] = {
        "num_labels": _num_heads(source) if new_heads is None else new_heads,
        **REGRESSION,
    }
    model, missing, unexpected = open_model(
        AutoModelForSequenceClassification, folder, attn_implementation, loading, source.trusted, **settings
    )
    score_head(model)
    if new_head and SCORE not in missing:
        raise _already_scalar(folder)
    if not new_head and SCORE in missing:
        raise _not_scalar(folder)
    if new_head:
        missing = missing - {SCORE}
        unexpected = {name for name in unexpected if not name.startswith(OUTPUT_HEADS)}
    refuse(folder, "missing", missing)
    refuse(folder, "unknown", unexpected)
    return model


def _num_heads(source: ModelSource) -> int:
    """How many heads a scalar model has; a classifier of texts counts as one and fails on its shape."""
    folder = source.folder()
    check_files(folder, trusted=source.trusted)
    config = read_object(folder / CONFIG)
    if config.get("problem_type") != REGRESSION["problem_type"]:
        return 1
    # transformers writes no labels where there are two, its default.
    return int(config.get("num_labels", len(config.get("id2label", range(2)))))


def _already_scalar(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder}: already a reward model, where a language model is needed; name a policy"
    )


def _not_scalar(folder: Path) -> CheckpointError:
    return CheckpointError(f"{folder}: a language model, where a reward model is needed; train one: stage=rm")


def _from_policy(policy: PreTrainedModel, num_heads: int) -> PreTrainedModel:
    """Heads on the policy's own body; from the configuration alone the body would be another draw."""
    config = policy.config
    config.update({"num_labels": num_heads, **REGRESSION})
    with torch.device("meta"), quiet():
        from_config = AutoModelForSequenceClassification.from_config
        model: PreTrainedModel = from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32, trust_remote_code=has_own_code(policy)
        )
    setattr(model, model.base_model_prefix, policy.base_model)
    nn.init.zeros_(score_head(model).to_empty(device=policy.device).weight)
    return model


def _init_head(model: PreTrainedModel, seed: int) -> None:
    head = score_head(model)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(head.weight.shape, generator=generator) / sqrt(head.in_features + 1)
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.zero_()


def _with_mean_head(model: PreTrainedModel) -> PreTrainedModel:
    """One head in place of several: a mean of linear heads is the linear head of their mean."""
    head = score_head(model)
    if head.out_features > 1:
        for name, parameter in list(head.named_parameters()):
            setattr(
                head, name, nn.Parameter(parameter.detach().mean(0, keepdim=True), parameter.requires_grad)
            )
        head.out_features = 1
        model.config.num_labels = 1
    return model
