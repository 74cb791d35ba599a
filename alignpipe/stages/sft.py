"""Supervised fine-tuning on demonstrations, or on raw text (InstructGPT, arXiv:2203.02155, section 3.5).

prompt, response -> cross-entropy of the response tokens -> policy checkpoint
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from alignpipe.config import SFTConfig, num_steps
from alignpipe.data.collate import collate
from alignpipe.data.encoding import Example, encode_demonstrations, encode_texts
from alignpipe.data.records import Demonstration, Text
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import DataError
from alignpipe.evaluation.samples import log_samples
from alignpipe.losses.sft import sft_loss
from alignpipe.models.forward import batch_logprobs
from alignpipe.training.context import Context
from alignpipe.training.loop import StepOutput, fit, mean_losses


def run(config: SFTConfig, context: Context) -> dict[str, Any]:
    """Train `policy` on the demonstrations of its share of prompts."""
    tokenizer = context.tokenizer("policy")
    policy = context.load_policy("policy", tokenizer)
    rows = _encode(config, tokenizer, context)
    held_out: list[Example] = []
    # All of them may be too long; that matters for the rows trained on alone.
    with suppress(DataError):
        held_out = _encode(config, tokenizer, context, "eval", config.eval_rows)

    def loss_fn(micro: Sequence[Example]) -> StepOutput:
        batch = collate(micro, tokenizer.pad_id).to(context.device)
        return StepOutput(losses=sft_loss(batch_logprobs(policy, batch), batch.loss_mask[:, 1:]))

    def evaluate() -> dict[str, float]:
        return mean_losses(policy, held_out, loss_fn, config.micro_batch_size, context)

    before = evaluate()
    after = fit(policy, rows, loss_fn, config, context, evaluate)
    context.save_checkpoint(policy, tokenizer, "policy")
    log_samples(policy, tokenizer, config, context, num_steps(config, len(rows)))
    return {"rows": len(rows), "eval_loss": after.get("loss"), "eval_loss_before": before.get("loss")}


def _encode(
    config: SFTConfig,
    tokenizer: Tokenizer,
    context: Context,
    share: str | None = None,
    limit: int | None = None,
) -> list[Example]:
    """Rows of a share, at most `limit` records of it."""
    if config.data.format == "text" or "demonstrations" not in context.record_types("data", config.data):
        texts = context.records("data", config.data, Text, share)[:limit]
        return encode_texts(texts, tokenizer, config.max_length).examples
    records = context.records("data", config.data, Demonstration, share)[:limit]
    encoded = encode_demonstrations(
        records, tokenizer, config.max_length, config.data.on_overflow, config.loss_on
    )
    return encoded.examples
