"""Reward and value models: a causal language model with one number a token in place of the vocabulary.

checkpoint -> sequence classifier with one label; ids (B, T) -> scores (B, T), or (B,) at the last real token
"""

from math import sqrt

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from alignpipe.data.collate import TokenBatch
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import CheckpointError
from alignpipe.models.loading import SCORE, ModelSource, load_policy, open_model, prepare, quiet, refuse

OUTPUT_HEADS = ("lm_head.", "embed_out.")
CONFIGURATION = {"num_labels": 1, "problem_type": "regression"}


def load_scalar_model(
    source: ModelSource,
    tokenizer: Tokenizer,
    attn_implementation: str = "sdpa",
    device: torch.device | str = "cpu",
    *,
    seed: int | None = None,
) -> PreTrainedModel:
    """Open a reward or value model.

    Args:
        source: a language model that gets a head, or a model that has one.
        tokenizer: whose ids it reads.
        attn_implementation: of transformers.
        device: where it goes.
        seed: draws a new head for a language model, normal with deviation 1 / sqrt(d + 1), so that scores
            begin near deviation 1; None means that the model has its head.

    Returns:
        A sequence classifier with one label, in evaluation mode, float32, without dropout.

    Raises:
        CheckpointError: it is missing, damaged, of the other kind, or its architecture has no `score` head.
        MachineError: the machine cannot run it, or a hub id cannot be fetched.
    """
    if source.is_tiny:
        if seed is None:
            raise CheckpointError(
                "tiny: an untrained language model, where a reward model is needed; run stage=rm"
            )
        model = _from_policy(load_policy(source, tokenizer, attn_implementation))
    else:
        model = _open(source, attn_implementation, new_head=seed is not None)
    if seed is not None:
        _init_head(model, seed)
    return prepare(model, tokenizer, device)


def token_scores(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """The score read at every token: the reward or value of the text up to there.

    Args:
        model: from `load_scalar_model`.
        input_ids: (B, T), padded on the right; what stands after a row's end says nothing.

    Returns:
        (B, T) float32.
    """
    return _scores(model, _hidden(model, input_ids))


def sequence_scores(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """The score at the last real token of each row, whatever the padding.

    Args:
        model: from `load_scalar_model`.
        batch: B sequences, padded on the right.

    Returns:
        (B,) float32.
    """
    hidden = _hidden(model, batch.input_ids)
    last = hidden[torch.arange(len(hidden), device=hidden.device), batch.lengths - 1]
    return _scores(model, last)


def score_head(model: PreTrainedModel) -> nn.Linear:
    """The head of a scalar model.

    Raises:
        CheckpointError: the architecture keeps no linear `score` over its last hidden state.
    """
    try:
        head = model.get_submodule("score")
    except AttributeError:
        head = None
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise CheckpointError(
            f"{type(model).__name__}: has no `score` head with one output, so it cannot be a reward or value "
            f"model; use a decoder-only architecture such as Llama, Qwen, Mistral, Gemma or GPT-2"
        )
    return head


def _hidden(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    hidden: Tensor = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden


def _scores(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    # In bfloat16 a score of 5 has steps of 1/32, more than many margins.
    with torch.autocast(hidden.device.type, enabled=False):
        scores: Tensor = score_head(model)(hidden.float())
    return scores.squeeze(-1)


def _open(source: ModelSource, attn_implementation: str, *, new_head: bool) -> PreTrainedModel:
    folder = source.folder()
    model, missing, unexpected = open_model(
        AutoModelForSequenceClassification, folder, attn_implementation, **CONFIGURATION
    )
    score_head(model)
    if new_head and SCORE not in missing:
        raise CheckpointError(
            f"{folder}: already a reward model, where a language model is needed; name a policy"
        )
    if not new_head and SCORE in missing:
        raise CheckpointError(
            f"{folder}: a language model, where a reward model is needed; train one: stage=rm"
        )
    if new_head:
        missing = missing - {SCORE}
        unexpected = {name for name in unexpected if not name.startswith(OUTPUT_HEADS)}
    refuse(folder, "missing", missing)
    refuse(folder, "unknown", unexpected)
    return model


def _from_policy(policy: PreTrainedModel) -> PreTrainedModel:
    """The same body as the policy's, in memory: from the configuration alone it would be another draw."""
    config = policy.config
    config.update(CONFIGURATION)
    with torch.random.fork_rng(devices=[]), quiet():
        from_config = AutoModelForSequenceClassification.from_config
        model: PreTrainedModel = from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.base_model.load_state_dict(policy.base_model.state_dict())
    return model


def _init_head(model: PreTrainedModel, seed: int) -> None:
    head = score_head(model)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(head.weight.shape, generator=generator) / sqrt(head.in_features + 1)
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.zero_()
