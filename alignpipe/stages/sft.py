"""Supervised fine-tuning on demonstrations, or on raw text (InstructGPT, arXiv:2203.02155, section 3.5).

prompt, response -> the rows worth learning -> cross-entropy of the response tokens -> policy checkpoint
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from transformers import PreTrainedModel

from alignpipe.config import SFTConfig, num_steps
from alignpipe.data.collate import collate
from alignpipe.data.encoding import (
    Encoded,
    encode_demonstrations,
    encode_prompts,
    encode_texts,
)
from alignpipe.data.examples import Example
from alignpipe.data.lazy import take
from alignpipe.data.mixture import Portion
from alignpipe.data.records import Demonstration, Prompt, Text
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import DataError
from alignpipe.evaluation.responses import respond
from alignpipe.evaluation.rewards import load_reward_model
from alignpipe.evaluation.samples import log_samples
from alignpipe.evaluation.selection import Judge, select
from alignpipe.losses.sft import sft_loss
from alignpipe.models.forward import batch_logprobs
from alignpipe.models.neftune import noisy_embeddings
from alignpipe.training.best_epoch import BestEpoch
from alignpipe.training.context import Context
from alignpipe.training.loop import StepOutput, fit, mean_losses


def run(config: SFTConfig, context: Context) -> dict[str, Any]:
    """Train `policy` on the demonstrations of its share of prompts."""
    tokenizer = context.tokenizer("policy")
    policy = context.load_policy("policy", tokenizer)
    encoded, portion = _encode(config, tokenizer, context)
    chosen, fates = select(portion, Judge(config, policy, tokenizer, context))
    rows = take(encoded.examples, chosen)
    held_out: Sequence[Example] = []
    # All of them may be too long; that matters for the rows trained on alone.
    with suppress(DataError):
        held_out = _encode(config, tokenizer, context, "eval", config.eval_rows)[0].examples

    def loss_fn(micro: Sequence[Example]) -> StepOutput:
        # Noise is each row's own, on its prompt too.
        shared = config.neftune_alpha == 0
        batch = collate(micro, tokenizer.pad_id, shared=shared).to(context.device)
        noise = (config.neftune_alpha, config.seed, context.step)
        with noisy_embeddings(policy, [row.ids for row in micro], *noise):
            logprobs = batch_logprobs(policy, batch)
        return StepOutput(losses=sft_loss(logprobs, batch.loss_mask[:, 1:]))

    def evaluate() -> dict[str, float]:
        return mean_losses(policy, held_out, loss_fn, config.micro_batch_size, context)

    before = evaluate()
    best = _best_epoch(config, policy, len(rows), tokenizer, context, evaluate)
    after = fit(policy, rows, loss_fn, config, context, evaluate, watcher=best)
    context.save_checkpoint(policy, tokenizer, "policy")
    sampled = log_samples(policy, tokenizer, config, context, num_steps(config, len(rows)))
    return {
        "rows": len(rows),
        "rows_by_source": portion.take(chosen).rows_by_source(),
        **encoded.figures,
        **fates,
        **sampled,
        "eval_loss": after.get("loss"),
        "eval_loss_before": before.get("loss"),
        **({} if best is None else {"best_epoch": best.best["epoch"], "epochs": best.epochs}),
    }


def _encode(
    config: SFTConfig,
    tokenizer: Tokenizer,
    context: Context,
    share: str | None = None,
    limit: int | None = None,
) -> tuple[Encoded[Example], Portion]:
    """Rows of a share, at most `limit` records of it, and for each row the record it was made of."""
    is_text = config.data.format == "text" or "demonstrations" not in context.record_types(
        "data", config.data
    )
    portion = context.portion("data", config.data, Text if is_text else Demonstration, share)
    records = portion.records[:limit]
    if is_text:
        encoded = encode_texts(records, tokenizer, config.max_length)
    else:
        overflow = config.data.on_overflow
        encoded = encode_demonstrations(records, tokenizer, config.max_length, overflow, config.loss_on)
    return encoded, portion.take(encoded.kept)


def _best_epoch(
    config: SFTConfig,
    policy: PreTrainedModel,
    num_rows: int,
    tokenizer: Tokenizer,
    context: Context,
    evaluate: Callable[[], dict[str, float]],
) -> BestEpoch | None:
    """Looks at every epoch by `evaluate`, or by the reward of responses to held-out prompts; None for the last."""
    if config.select_epoch == "last":
        return None
    if config.select_epoch == "loss":
        return BestEpoch("loss", evaluate, policy, num_rows, config.batch_size, context)
    context.check_same_tokens("reward_model", tokenizer)
    reward_model = load_reward_model(context, tokenizer, config.micro_batch_size)
    records = context.records("data", config.data, Prompt, "eval")[: config.eval_rows]
    prompts = encode_prompts(records, tokenizer, config.max_prompt_length, "drop").examples

    def evaluate_reward() -> dict[str, float]:
        responses = respond(policy, tokenizer, prompts, 1, config, context, f"epoch-{context.step}")
        answered = [row[0].example(prompt) for prompt, row in zip(prompts, responses, strict=True)]
        return {**evaluate(), "reward": float(reward_model(answered).mean())}

    return BestEpoch("reward", evaluate_reward, policy, num_rows, config.batch_size, context)
