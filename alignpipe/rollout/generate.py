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
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import ConfigError
from alignpipe.models.loading import evaluating, max_positions
from alignpipe.models.sharding import in_step, is_sharded
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
    waiting = deque(
        _Request(prompt, sample, place if prompt_ids is None else prompt_ids[place], prompts[place][-1])
        for prompt, place in enumerate(order)
        for sample in range(num_samples)
    )
    slots = _Slots(min(batch_size, len(waiting)), settings, model.device)
    found: dict[tuple[int, int], Sample] = {}
    with (
        # Weights that are gathered under inference mode could not be trained afterwards.
        torch.no_grad() if is_sharded(model) else torch.inference_mode(),
        evaluating(model),
        in_step(model),
        decoding(
            model,
            [prompts[place] for place in order],
            num_samples=num_samples,
            num_slots=len(slots.requests),
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
    decoder: Decoder, waiting: deque[_Request], slots: "_Slots", on_batch: Callable[[], None]
) -> Iterator[tuple[_Request, Sample]]:
    """All responses that are wanted, as they come to an end."""
    _fill(decoder, waiting, slots)
    while slots.live:
        logits = decoder.step(slots.last[: slots.live])
        slots.append(*pick(logits, slots.numbers_now(), slots.settings.temperature or 1.0))
        if ended := slots.ended():
            yield from slots.take(ended)
            on_batch()
            decoder.leave(ended)
            _fill(decoder, waiting, slots)


def _fill(decoder: Decoder, waiting: deque[_Request], slots: "_Slots") -> None:
    """Let requests into free slots, and close the gaps where there are no more."""
    free = slots.free()
    if waiting and free and (decoder.joins or len(free) == len(slots.requests)):
        entering = [waiting.popleft() for _ in free[: len(waiting)]]
        slots.enter(free[: len(entering)], entering)
        decoder.enter(free[: len(entering)], [request.prompt for request in entering])
    decoder.move(*slots.close_up(), slots.live)


class _Slots:
    """Responses under way, side by side in the first `live` rows of every tensor.

    Args:
        num_slots: responses at most.
        settings: of the call.
        device: of the model.
    """

    def __init__(self, num_slots: int, settings: _Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.look_every = LOOK_EVERY.get(device.type, 8)
        self.requests: list[_Request | None] = [None] * num_slots
        self.live = self.clock = 0
        self.lengths = np.zeros(num_slots, dtype=np.int64)
        self.last = torch.zeros(num_slots, dtype=torch.long, device=device)
        self.stopped = torch.zeros(num_slots, dtype=torch.bool, device=device)
        shape = num_slots, settings.max_new_tokens
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(shape, device=device)
        # MPS has no float64.
        self.numbers = torch.zeros(
            shape, dtype=torch.float64, device="cpu" if device.type == "mps" else device
        )
        self.stops = torch.tensor(sorted(settings.stop_ids), device=device)

    def free(self) -> list[int]:
        """Slots without a response."""
        return [slot for slot, request in enumerate(self.requests) if request is None]

    def enter(self, slots: list[int], requests: list[_Request]) -> None:
        """Begin responses, each after the last token of its prompt."""
        for slot, request in zip(slots, requests, strict=True):
            self.requests[slot] = request
        self.lengths[slots], self.stopped[slots] = 0, False
        self.last[slots] = torch.tensor([request.last for request in requests], device=self.device)
        if self.settings.temperature is not None:
            index, sample = (
                np.array([[getattr(r, name)] for r in requests]) for name in ("prompt_index", "sample")
            )
            position = np.arange(self.settings.max_new_tokens)
            numbers = uniforms(self.settings.seed, self.settings.step, index, sample, position)
            self.numbers[slots] = numbers.to(self.numbers.device)

    def numbers_now(self) -> Tensor | None:
        """The uniform number of each next token, (live,); None where the most probable one is taken."""
        if self.settings.temperature is None:
            return None
        return self.numbers[: self.live].gather(1, self._columns().to(self.numbers.device)).squeeze(1)

    def append(self, tokens: Tensor, logprobs: Tensor) -> None:
        """Add a token to each response, (live,)."""
        columns = self._columns().to(self.device)
        self.tokens[: self.live].scatter_(1, columns, tokens[:, None])
        self.logprobs[: self.live].scatter_(1, columns, logprobs[:, None])
        self.last[: self.live] = tokens
        self.stopped[: self.live] |= torch.isin(tokens, self.stops)
        self.lengths[: self.live] += 1
        self.clock += 1

    def ended(self) -> list[int]:
        """The slots whose responses have come to an end, as far as is known."""
        full = self.lengths[: self.live] == self.settings.max_new_tokens
        if self.clock % self.look_every and not full.any():
            return []
        found: list[int] = np.flatnonzero(full | self.stopped[: self.live].cpu().numpy()).tolist()
        return found

    def take(self, slots: list[int]) -> Iterator[tuple[_Request, Sample]]:
        """Hand out responses up to their first stop token, and free their slots."""
        rows = zip(slots, self.tokens[slots].tolist(), self.logprobs[slots].tolist(), strict=True)
        for slot, ids, values in rows:
            request, length = self.requests[slot], int(self.lengths[slot])
            assert request is not None
            stop = next((i for i, token in enumerate(ids[:length]) if token in self.settings.stop_ids), None)
            end = length if stop is None else stop + 1
            yield request, Sample(ids[:end], values[:end], stop is not None)
            self.requests[slot] = None

    def close_up(self) -> tuple[list[int], list[int]]:
        """Move the last responses into free slots before them; from where, and where to."""
        self.live = len(self.requests) - len(self.free())
        sources = [slot for slot, request in enumerate(self.requests) if request and slot >= self.live]
        targets = [slot for slot in self.free() if slot < self.live]
        self.lengths[targets] = self.lengths[sources]
        for table in (self.last, self.stopped, self.tokens, self.logprobs, self.numbers):
            table[targets] = table[sources]
        for source, target in zip(sources, targets, strict=True):
            self.requests[target], self.requests[source] = self.requests[source], None
        return sources, targets

    def _columns(self) -> Tensor:
        return torch.from_numpy(self.lengths[: self.live, None].copy())
