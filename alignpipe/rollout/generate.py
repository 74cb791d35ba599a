"""Samples responses to prompts: a prompt is computed once for its samples, and where one ends the next one begins.

model, prompts, num_samples -> responses with their logprobs and whether they came to an end

Continuous batching (Orca, OSDI 2022) inside one call.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignpipe.config import SamplingConfig
from alignpipe.data.grouping import group_size
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import ConfigError
from alignpipe.models.casting import without_gradients
from alignpipe.models.loading import evaluating, max_positions
from alignpipe.models.sharding import in_step
from alignpipe.rollout.decoder import Decoder, decoding
from alignpipe.rollout.sampling import pick, uniforms

# Tokens from one look at which responses have ended to the next; on an accelerator a look waits for its work.
LOOK_EVERY = {"cpu": 1, "cuda": 8, "mps": 8}


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled response.

    Attributes:
        ids: its tokens, the stop token among them when there is one.
        logprobs: of each token, at the sampling temperature (at 1 when the most probable was taken).
        finished: it ended in a stop token, rather than at the length limit.
    """

    ids: list[int]
    logprobs: list[float]
    finished: bool


@dataclass(frozen=True, slots=True)
class _Settings:
    """What holds for every response of a call."""

    max_new_tokens: int
    stop_ids: frozenset[int]
    temperature: float | None
    seed: int
    step: int


class _Request(NamedTuple):
    """A response that is wanted.

    Attributes:
        prompt: place among the prompts, longest first.
        sample: which of the prompt's.
        prompt_index: of the prompt in the whole data set.
        last: token of the prompt.
    """

    prompt: int
    sample: int
    prompt_index: int
    last: int


def generate(  # noqa: PLR0913  (all but the first two are keywords)
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    num_samples: int,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    temperature: float | None,
    seed: int,
    step: int = 0,
    prompt_ids: Sequence[int] | None = None,
    batch_size: int = 64,
    on_batch: Callable[[], None] | None = None,
) -> list[list[Sample]]:
    """Sample responses to prompts.

    What is drawn depends on the seed, the step, the prompt's index and the sample's, and on nothing else:
    order, batch size and company change it only where rounding decides between two tokens.

    Args:
        model: a causal language model, on any device.
        prompts: token ids of each, none empty.
        num_samples: responses to each prompt.
        max_new_tokens: tokens of a response at most.
        stop_ids: tokens that end a response.
        pad_id: fills up shorter prompts; never looked at.
        temperature: divides the logits; None or 0 takes the most probable token.
        seed: of the stage.
        step: of the stage's outer loop.
        prompt_ids: index of each prompt in the whole data set; their places in `prompts` when not given.
        batch_size: responses under way at once.
        on_batch: called whenever responses have ended; may raise to stop.

    Returns:
        For each prompt, in the order given, its responses.

    Raises:
        ConfigError: prompt and response together are longer than what the model was made for.
    """
    _check_lengths(model, prompts, max_new_tokens)
    settings = _Settings(max_new_tokens, frozenset(stop_ids), temperature or None, seed, step)
    # Longest first, so that memory fails early, and prompts computed together are of like length.
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]), reverse=True)
    size = group_size(num_samples, batch_size)
    waiting = deque(
        [
            _Request(prompt, sample, place if prompt_ids is None else prompt_ids[place], prompts[place][-1])
            for sample in range(first, min(first + size, num_samples))
        ]
        for prompt, place in enumerate(order)
        for first in range(0, num_samples, size)
    )
    slots = _Slots(min(batch_size // size, len(waiting)), size, settings, model.device)
    found: dict[tuple[int, int], Sample] = {}
    with (
        evaluating(model),
        without_gradients(model),
        in_step(model),
        decoding(
            model,
            [prompts[place] for place in order],
            num_groups=slots.num_groups,
            group_size=size,
            max_new_tokens=max_new_tokens,
            pad_id=pad_id,
        ) as decoder,
    ):
        for request, response in _responses(decoder, waiting, slots, on_batch or (lambda: None)):
            found[order[request.prompt], request.sample] = response
    return [[found[place, k] for k in range(num_samples)] for place in range(len(prompts))]


def sample(
    policy: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    indices: Sequence[int],
    config: SamplingConfig,
    *,
    num_samples: int,
    step: int = 0,
    on_batch: Callable[[], None] | None = None,
) -> list[list[Sample]]:
    """Sample responses as a stage's configuration says.

    Args:
        policy: a causal language model, on any device.
        tokenizer: of the policy.
        prompts: token ids of the whole data set.
        indices: of those to answer; what is drawn depends on them, not on their company.
        config: temperature, lengths, seed, batch.
        num_samples: responses to each prompt.
        step: of the stage's outer loop.
        on_batch: called whenever responses have ended; may raise to stop.

    Returns:
        For each index, in the order given, its responses.

    Raises:
        ConfigError: prompt and response together are longer than what the model was made for.
    """
    return generate(
        policy,
        [list(prompts[index]) for index in indices],
        num_samples=num_samples,
        max_new_tokens=config.max_response_length,
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        temperature=config.temperature,
        seed=config.seed,
        step=step,
        prompt_ids=indices,
        batch_size=config.generation_batch_size,
        on_batch=on_batch,
    )


def _check_lengths(model: PreTrainedModel, prompts: Sequence[list[int]], max_new_tokens: int) -> None:
    limit, longest = max_positions(model), max(map(len, prompts), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise ConfigError(
            f"max_response_length: {max_new_tokens} tokens after a prompt of {longest} do not fit into the "
            f"{limit} positions of the model; lower it or max_prompt_length"
        )


def _responses(
    decoder: Decoder, waiting: deque[list[_Request]], slots: "_Slots", on_batch: Callable[[], None]
) -> Iterator[tuple[_Request, Sample]]:
    """All responses that are wanted, as they come to an end."""
    _fill(decoder, waiting, slots)
    while slots.live:
        logits = decoder.step(slots.last[slots.index], slots.live)
        slots.append(*pick(logits, slots.numbers_now(), slots.settings.temperature or 1.0))
        if ended := slots.ended():
            yield from slots.take(ended)
            on_batch()
            decoder.leave(slots.free_groups())
            _fill(decoder, waiting, slots)


def _fill(decoder: Decoder, waiting: deque[list[_Request]], slots: "_Slots") -> None:
    """Let requests into free groups."""
    groups = slots.free_groups()[: len(waiting)]
    if groups and (decoder.joins or not slots.live):
        entering = [waiting.popleft() for _ in groups]
        slots.enter(groups, entering)
        decoder.enter(groups, [requests[0].prompt for requests in entering])


class _Slots:
    """Responses under way, each in a row of every tensor; the first rows are those of the first group.

    Args:
        num_groups: under way at most.
        size: responses of a group, to the same prompt.
        settings: of the call.
        device: of the model.

    Attributes:
        live: rows of responses that have not ended, ascending; `index` is the same on the device.
    """

    def __init__(self, num_groups: int, size: int, settings: _Settings, device: torch.device) -> None:
        self.num_groups, self.size, self.settings, self.device = num_groups, size, settings, device
        self.look_every, self.clock = LOOK_EVERY.get(device.type, 8), 0
        self.requests: dict[int, _Request] = {}
        shape = num_groups * size, settings.max_new_tokens
        self.lengths = np.zeros(shape[0], dtype=np.int64)
        self.last = torch.zeros(shape[0], dtype=torch.long, device=device)
        self.stopped = torch.zeros(shape[0], dtype=torch.bool, device=device)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(shape, device=device)
        # MPS has no float64.
        self.numbers_device = torch.device("cpu") if device.type == "mps" else device
        self.numbers = torch.zeros(shape, dtype=torch.float64, device=self.numbers_device)
        self.stops = torch.tensor(sorted(settings.stop_ids), device=device)
        self._see_who_lives()

    def free_groups(self) -> list[int]:
        """Groups without a response."""
        taken = {slot // self.size for slot in self.requests}
        return [group for group in range(self.num_groups) if group not in taken]

    def enter(self, groups: list[int], requests: list[list[_Request]]) -> None:
        """Begin responses, each after the last token of its prompt."""
        entering = {
            group * self.size + place: request
            for group, members in zip(groups, requests, strict=True)
            for place, request in enumerate(members)
        }
        self.requests |= entering
        slots = list(entering)
        self.lengths[slots], self.stopped[slots] = 0, False
        self.last[slots] = torch.tensor([request.last for request in entering.values()], device=self.device)
        if self.settings.temperature is not None:
            index, sample = (
                np.array([[getattr(request, name)] for request in entering.values()])
                for name in ("prompt_index", "sample")
            )
            position = np.arange(self.settings.max_new_tokens)
            numbers = uniforms(self.settings.seed, self.settings.step, index, sample, position)
            self.numbers[slots] = numbers.to(self.numbers_device)
        self._see_who_lives()

    def numbers_now(self) -> Tensor | None:
        """The uniform number of each next token, (N,); None where the most probable one is taken."""
        if self.settings.temperature is None:
            return None
        column = torch.from_numpy(self.lengths[self.live]).to(self.numbers_device)
        return self.numbers[self.index.to(self.numbers_device), column]

    def append(self, tokens: Tensor, logprobs: Tensor) -> None:
        """Add a token to each response, (N,)."""
        column = torch.from_numpy(self.lengths[self.live]).to(self.device)
        self.tokens[self.index, column], self.logprobs[self.index, column] = tokens, logprobs
        self.last[self.index] = tokens
        self.stopped[self.index] |= torch.isin(tokens, self.stops)
        self.lengths[self.live] += 1
        self.clock += 1

    def ended(self) -> list[int]:
        """Rows of the responses that have come to an end, as far as is known."""
        full = self.lengths[self.live] == self.settings.max_new_tokens
        if self.clock % self.look_every and not full.any():
            return []
        over = full | self.stopped[self.index].cpu().numpy()
        return [slot for slot, is_over in zip(self.live, over, strict=True) if is_over]

    def take(self, slots: list[int]) -> Iterator[tuple[_Request, Sample]]:
        """Hand out responses up to their first stop token, and free their rows."""
        rows = zip(slots, self.tokens[slots].tolist(), self.logprobs[slots].tolist(), strict=True)
        for slot, ids, values in rows:
            length = int(self.lengths[slot])
            stop = next((i for i, token in enumerate(ids[:length]) if token in self.settings.stop_ids), None)
            end = length if stop is None else stop + 1
            yield self.requests.pop(slot), Sample(ids[:end], values[:end], stop is not None)
        self._see_who_lives()

    def _see_who_lives(self) -> None:
        self.live = sorted(self.requests)
        self.index = torch.tensor(self.live, dtype=torch.long, device=self.device)
