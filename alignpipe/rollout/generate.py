"""Samples responses to prompts: each prompt is computed once for its samples, finished rows leave the batch.

model, prompts, num_samples -> responses with their logprobs and whether they came to an end
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from alignpipe.config import SamplingConfig
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import ConfigError
from alignpipe.models.loading import evaluating, max_positions
from alignpipe.models.sharding import in_step, is_sharded
from alignpipe.rollout.cache import spread
from alignpipe.rollout.sampling import pick, uniforms

# Rows are taken out when so many of them have finished: not one by one, since it costs a wait for the device.
SHARE_FINISHED = 0.05


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
    """What holds for every batch of a call."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    temperature: float | None
    seed: int
    step: int


class _Unit(NamedTuple):
    """Some samples of one prompt, drawn in the same batch."""

    prompt: int
    first: int
    size: int


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
        on_batch: called after each batch; may raise to stop.

    Returns:
        For each prompt, in the order given, its responses.

    Raises:
        ConfigError: prompt and response together are longer than what the model was made for.
    """
    _check_lengths(model, prompts, max_new_tokens)
    settings = _Settings(max_new_tokens, tuple(stop_ids), pad_id, temperature or None, seed, step)
    indices = np.asarray(range(len(prompts)) if prompt_ids is None else prompt_ids, dtype=np.int64)
    samples: list[list[Sample]] = [[] for _ in prompts]
    # Weights that are gathered under inference mode could not be trained afterwards.
    without_gradients = torch.no_grad() if is_sharded(model) else torch.inference_mode()
    with without_gradients, evaluating(model), in_step(model):
        for units in _batches([len(prompt) for prompt in prompts], num_samples, batch_size):
            numbers = _numbers(units, indices, settings)
            found = _generate_batch(model, [prompts[unit.prompt] for unit in units], units, numbers, settings)
            for unit in units:
                samples[unit.prompt] += [next(found) for _ in range(unit.size)]
            if on_batch is not None:
                on_batch()
    return samples


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
        on_batch: called after each batch; may raise to stop.

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


def _batches(lengths: list[int], num_samples: int, batch_size: int) -> Iterator[list[_Unit]]:
    """Groups of at most `batch_size` samples: prompts of like length, each prompt's samples in order."""
    batch: list[_Unit] = []
    free = batch_size
    for prompt in sorted(range(len(lengths)), key=lengths.__getitem__):
        first = 0
        while first < num_samples:
            # Samples of one prompt are kept together unless they alone are more than a batch.
            if batch and free < min(num_samples - first, batch_size):
                yield batch
                batch, free = [], batch_size
            count = min(num_samples - first, free)
            batch.append(_Unit(prompt, first, count))
            first, free = first + count, free - count
    if batch:
        yield batch


def _numbers(units: list[_Unit], indices: np.ndarray, settings: _Settings) -> Tensor | None:
    """The uniform numbers of a batch, (N, max_new_tokens); None when the most probable token is taken."""
    if settings.temperature is None:
        return None
    prompt = np.concatenate([np.full(unit.size, indices[unit.prompt]) for unit in units])
    sample = np.concatenate([np.arange(unit.first, unit.first + unit.size) for unit in units])
    position = np.arange(settings.max_new_tokens)
    return uniforms(settings.seed, settings.step, prompt[:, None], sample[:, None], position)


def _generate_batch(
    model: PreTrainedModel,
    prompts: list[list[int]],
    units: list[_Unit],
    numbers: Tensor | None,
    settings: _Settings,
) -> Iterator[Sample]:
    """The responses to one batch of prompts, in the order of the units."""
    device = model.device
    rows = torch.tensor([row for row, unit in enumerate(units) for _ in range(unit.size)], device=device)
    decoder = _Decoder(model, prompts, rows, settings)
    numbers = None if numbers is None or device.type == "mps" else numbers.to(device)
    stops = torch.tensor(settings.stop_ids, device=device)
    tokens = torch.zeros(len(rows), settings.max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(rows), settings.max_new_tokens, device=device)
    slots = torch.arange(len(rows), device=device)
    alive = torch.ones(len(rows), dtype=torch.bool, device=device)
    for position in range(settings.max_new_tokens):
        column = None if numbers is None else numbers[slots, position]
        chosen, chosen_logprobs = pick(decoder.logits, column, settings.temperature or 1.0)
        tokens[slots, position], logprobs[slots, position] = chosen, chosen_logprobs
        alive = alive & ~torch.isin(chosen, stops)
        num_alive = int(alive.sum())
        if num_alive == 0 or position + 1 == settings.max_new_tokens:
            break
        if num_alive <= (1 - SHARE_FINISHED) * len(slots):
            kept = _closed_up(alive, num_alive)
            decoder.keep(kept)
            slots, chosen, alive = slots[kept], chosen[kept], alive[kept]
        decoder.step(chosen)
    return _cut(tokens.cpu(), logprobs.cpu(), stops.cpu())


class _Decoder:
    """A batch of sequences under way: the cache, the mask over it, and the logits of the next token.

    Prompts are padded on the left, so that all rows write their next token to the same column.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: list[list[int]], rows: Tensor, settings: _Settings
    ) -> None:
        self.model = model
        width = max(map(len, prompts))
        self.width = width
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
        ids = torch.tensor([[settings.pad_id] * (width - len(prompt)) + prompt for prompt in prompts])
        columns = torch.arange(width + settings.max_new_tokens, device=model.device)
        mask = columns >= (width - lengths)[:, None]
        output = model(
            input_ids=ids.to(model.device),
            attention_mask=mask[:, :width].long(),
            position_ids=(columns[:width] - (width - lengths)[:, None]).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache: Cache = output.past_key_values
        self.logits: Tensor = output.logits[rows, -1]
        uniform = spread(self.cache, rows, settings.max_new_tokens)
        self.mask = mask[rows]
        self.positions = lengths[rows]
        # Made here once: made anew at every token it costs more than a small model's attention does.
        self.ready_made = uniform and model.config._attn_implementation == "sdpa"

    def step(self, tokens: Tensor) -> None:
        """Append one token to each row and compute what follows."""
        self.width += 1
        mask = self.mask[:, : self.width]
        output = self.model(
            input_ids=tokens[:, None],
            attention_mask=mask[:, None, None] if self.ready_made else mask.long(),
            position_ids=self.positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.positions = self.positions + 1
        self.logits = output.logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]


def _closed_up(alive: Tensor, num_alive: int) -> Tensor:
    """Indices of the rows that live on, the holes in front filled from the back, so that few rows move."""
    order = torch.arange(num_alive, device=alive.device)
    order[~alive[:num_alive]] = alive[num_alive:].nonzero().squeeze(1) + num_alive
    return order


def _cut(tokens: Tensor, logprobs: Tensor, stops: Tensor) -> Iterator[Sample]:
    """Responses up to their first stop token; what a row drew later, before it was dropped, is left out."""
    is_stop = torch.isin(tokens, stops)
    finished = is_stop.any(1)
    lengths = torch.where(finished, is_stop.int().argmax(1) + 1, tokens.shape[1])
    rows = zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), finished.tolist(), strict=True)
    for ids, values, length, ended in rows:
        yield Sample(ids[:length], values[:length], ended)
