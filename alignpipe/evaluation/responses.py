"""Responses of a policy to many prompts, kept item by item so that a stopped stage goes on where it was.

prompts -> sampled token ids -> text, EOS or not
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from alignpipe import processes
from alignpipe.config import FixedPolicyConfig, SamplingConfig
from alignpipe.data.examples import Example
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.rollout.generate import Sample, sample
from alignpipe.rollout.served import Answer, ServedPolicy, find_served
from alignpipe.training.context import Context

# Prompts that are answered between two looks at what is kept, where a batch has no more.
PROMPTS_PER_RECORD = 256


@dataclass(frozen=True)
class Response:
    """One sampled response.

    Attributes:
        ids: its tokens, with the stop token when it came to one.
        text: decoded, without special tokens.
        finished: it ended by itself within the limit.
    """

    ids: list[int]
    text: str
    finished: bool

    def example(self, prompt: Sequence[int]) -> Example:
        """Prompt and response as one row whose response tokens are learnt or scored."""
        return Example.of(prompt, self.ids)


def respond(
    policy: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    num_samples: int,
    config: SamplingConfig,
    context: Context,
    name: str = "responses",
) -> list[list[Response]]:
    """Sample `num_samples` responses to each prompt.

    What is drawn depends on the seed and the index of the prompt alone, so an interrupted stage ends with the same
    responses, and several policies asked the same prompts share their random numbers.

    Args:
        policy: in eval mode or not, its dropout is off.
        tokenizer: of the policy.
        prompts: token ids, with the generation prompt.
        num_samples: a prompt.
        config: temperature, lengths, batch, and what samples.
        context: journal, progress, stop signal.
        name: of the journal.

    Returns:
        For each prompt its responses, in order.

    Raises:
        Stopped: a signal came; finished prompts are kept.
        MachineError: a server that is to sample is away, or serves another model.
    """
    journal = context.journal(name)
    found = [_unpack(record) for record in processes.from_main(journal.read)]
    # Several processes must stop at the same point: between records.
    check = context.stop.check if processes.count() == 1 else None
    # So many that every batch is full.
    portion = max(PROMPTS_PER_RECORD, config.generation_batch_size // num_samples) * processes.count()

    def draw(first: int, places: list[int]) -> list[list[Response]]:
        indices = [first + place for place in places]
        drawn: Sequence[Sequence[Sample | Answer]]
        if served is not None:
            drawn = served.sample(prompts, indices, num_samples, check)
        else:
            with context.autocast():
                drawn = sample(
                    policy, tokenizer, prompts, indices, config, num_samples=num_samples, on_batch=check
                )
        return [[Response(s.ids, tokenizer.decode(s.ids), s.finished) for s in row] for row in drawn]

    context.progress.begin(f"sampling {name}", len(prompts), len(found))
    served = _served(policy, tokenizer, prompts, config, context) if len(found) < len(prompts) else None
    while len(found) < len(prompts):
        context.check_stop()
        first = len(found)
        lengths = [len(prompt) for prompt in prompts[first : first + portion]]
        found += processes.spread(lengths, partial(draw, first))
        records = [{"responses": [asdict(response) for response in row]} for row in found[first:]]
        processes.from_main(partial(journal.append, records))
        context.progress.update(len(found))
    return found


def _served(
    policy: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    context: Context,
) -> ServedPolicy | None:
    """The policy at a server; None where the stage samples itself, as each does that trains the policy meanwhile."""
    if not isinstance(config, FixedPolicyConfig) or config.rollout.engine == "local":
        return None
    return find_served(policy, tokenizer, prompts, config, context.autocast)


def _unpack(record: dict[str, Any]) -> list[Response]:
    return [Response(**response) for response in record["responses"]]
