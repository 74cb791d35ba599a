"""A few responses of a trained policy to held-out prompts, for a person to read in `samples.jsonl`."""

from transformers import PreTrainedModel

from alignpipe.config import DPOConfig, SFTConfig
from alignpipe.data.encoding import encode_prompts
from alignpipe.data.records import Prompt, prompt_text
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.evaluation.responses import respond
from alignpipe.training.context import Context


def log_samples(
    policy: PreTrainedModel, tokenizer: Tokenizer, config: SFTConfig | DPOConfig, context: Context, step: int
) -> dict[str, float]:
    """Sample `config.num_samples` responses, one a prompt; nothing where the data has no prompts.

    Returns:
        `eos_rate`, the share of them that ended by themselves; nothing where nothing was sampled.
    """
    if config.num_samples == 0 or "prompts" not in context.record_types("data", config.data):
        return {}
    records = context.records("data", config.data, Prompt, "eval")
    encoded = encode_prompts(records, tokenizer, config.max_prompt_length, "drop")
    prompts = encoded.examples[: config.num_samples]
    responses = respond(policy, tokenizer, prompts, 1, config, context, "samples")
    context.metrics.samples(
        step,
        [
            {"prompt": prompt_text(records[index]), "response": row[0].text, "finished": row[0].finished}
            for index, row in zip(encoded.kept, responses, strict=False)
        ],
    )
    return {"eos_rate": sum(row[0].finished for row in responses) / len(responses)} if responses else {}
