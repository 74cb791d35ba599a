"""Samples responses to prompts from a server that serves the policy.

prompts -> requests, many at once -> tokens of the policy's own tokenizer, in the order of the prompts

A prompt goes as token ids where the server takes them (vLLM, SGLang) and as text otherwise (`transformers serve`).
What comes back without token ids is encoded anew.
"""

import asyncio
import json
from asyncio import FIRST_EXCEPTION
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from alignpipe import processes
from alignpipe.config import FixedPolicyConfig
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import MachineError
from alignpipe.models.loading import evaluating
from alignpipe.models.sharding import in_step
from alignpipe.rollout.sampling import uniforms
from alignpipe.rollout.server import Completion, NotTaken, Server

# Seconds from one look for a signal to the next.
LOOK_EVERY = 1.0
# Prompts and tokens by which a server is asked whether it serves the policy at all.
CHECKED_PROMPTS, CHECKED_TOKENS = 8, 16
# Nats that its most probable tokens may be less probable, on average, than those of the policy: half precision changes
# near ties alone, another model costs more at once.
MAX_GAP = 0.1


class Answer(NamedTuple):
    """Tokens of a response, the stop token among them when there is one, and whether it came to one."""

    ids: list[int]
    finished: bool


@dataclass(frozen=True, slots=True)
class _Draw:
    """How a response is drawn: tokens at most, temperature (0 takes the most probable token), seed."""

    max_tokens: int
    temperature: float
    seed: int


def _with_ids(tokenizer: Tokenizer, prompt: Sequence[int], draw: _Draw) -> dict[str, Any]:
    """A request to vLLM or SGLang; what is not said there comes from the model's generation_config.json."""
    return {
        "prompt": list(prompt),
        "stop_token_ids": list(tokenizer.stop_ids),
        "return_token_ids": True,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }


def _with_text(tokenizer: Tokenizer, prompt: Sequence[int], draw: _Draw) -> dict[str, Any]:
    """A request to `transformers serve`, which samples only where a generation_config tells it to."""
    text = tokenizer.readable(prompt)
    if text is None:
        raise MachineError(
            "rollout.url: the server takes prompts as text, and a prompt is no text that the tokenizer would read so; "
            "serve the policy with vLLM or SGLang"
        )
    sampling = (
        {"do_sample": True, "temperature": draw.temperature, "top_k": 0, "top_p": 1.0}
        if draw.temperature
        else {"do_sample": False}
    )
    ids = {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
    return {
        "prompt": text,
        "generation_config": json.dumps({**sampling, **ids, "max_new_tokens": draw.max_tokens}),
    }


# The first that a server takes is kept.
FORMS = (_with_ids, _with_text)


class ServedPolicy:
    """A policy at a server.

    Args:
        server: where it is.
        tokenizer: of the policy.
        config: lengths, temperature, seed, requests under way at once.
        model: what the server calls the policy.
        form: of a request, one of `FORMS`.
    """

    def __init__(
        self, server: Server, tokenizer: Tokenizer, config: FixedPolicyConfig, model: str, form: int = 0
    ) -> None:
        self.form = form
        self._server, self._tokenizer, self._config, self._model = server, tokenizer, config, model

    async def probe(self, prompts: Sequence[Sequence[int]]) -> tuple[int, list[list[int]]]:
        """Find out which form the server takes, and what it holds for most probable after each prompt.

        Returns:
            The form, and tokens for each prompt; none where what came back as text may have been other tokens.
        """
        draw = _Draw(CHECKED_TOKENS, 0.0, self._config.seed)
        try:
            found = [await self._complete(prompt, draw) for prompt in prompts]
        except NotTaken:
            if self.form + 1 == len(FORMS):
                raise
            self.form += 1
            return await self.probe(prompts)
        answers = [self._answer(completion, CHECKED_TOKENS) for completion in found]
        return self.form, [
            answer.ids
            if completion.ids is not None or completion.completion_tokens == len(answer.ids)
            else []
            for completion, answer in zip(found, answers, strict=True)
        ]

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        indices: Sequence[int],
        num_samples: int,
        on_wait: Callable[[], None] | None = None,
    ) -> list[list[Answer]]:
        """Sample `num_samples` responses to each prompt.

        Args:
            prompts: token ids of the whole data set.
            indices: of those to answer; the seed of a request depends on them, not on their company.
            num_samples: a prompt.
            on_wait: called every second; may raise to stop.

        Returns:
            For each index, in the order given, its responses.

        Raises:
            MachineError: the server fails; what is under way is given up.
        """
        return asyncio.run(self._sample(prompts, indices, num_samples, on_wait or (lambda: None)))

    async def _sample(
        self,
        prompts: Sequence[Sequence[int]],
        indices: Sequence[int],
        num_samples: int,
        on_wait: Callable[[], None],
    ) -> list[list[Answer]]:
        async with self._server:
            tasks = [
                asyncio.create_task(self._drawn(prompts[index], index, k))
                for index in indices
                for k in range(num_samples)
            ]
            try:
                waiting = set(tasks)
                while waiting:
                    on_wait()
                    done, waiting = await asyncio.wait(tasks, timeout=LOOK_EVERY, return_when=FIRST_EXCEPTION)
                    for task in done:
                        task.result()
            finally:
                # Before the connections go away under them.
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        found = [task.result() for task in tasks]
        return [found[place * num_samples :][:num_samples] for place in range(len(indices))]

    async def _drawn(self, prompt: Sequence[int], index: int, sample: int) -> Answer:
        config = self._config
        number = float(uniforms(config.seed, 0, index, sample, 0))
        draw = _Draw(config.max_response_length, config.temperature, int(number * 2**31))
        return self._answer(await self._complete(prompt, draw), draw.max_tokens)

    async def _complete(self, prompt: Sequence[int], draw: _Draw) -> Completion:
        common = {
            "model": self._model,
            "max_tokens": draw.max_tokens,
            "temperature": draw.temperature,
            "seed": draw.seed,
        }
        found = await self._server.complete({**common, **FORMS[self.form](self._tokenizer, prompt, draw)})
        if found.prompt_tokens not in (None, len(prompt)):
            raise self._another(f"reads {found.prompt_tokens} tokens where the policy reads {len(prompt)}")
        return found

    def _answer(self, completion: Completion, limit: int) -> Answer:
        tokenizer = self._tokenizer
        ids = tokenizer.encode_continuation(completion.text) if completion.ids is None else completion.ids
        if any(not 0 <= token < tokenizer.vocab_size for token in ids):
            raise self._another("answers with tokens that the policy's tokenizer does not have")
        # A server may keep the stop token to itself; of special tokens alone no text is left.
        if completion.finished or not ids:
            ids = [*ids, tokenizer.turn_end_id]
        end = next((place + 1 for place, token in enumerate(ids) if token in tokenizer.stop_ids), limit)
        ids = ids[: min(end, limit)]
        return Answer(ids, ids[-1] in tokenizer.stop_ids)

    def _another(self, what: str) -> MachineError:
        return MachineError(
            f"rollout.url: {self._model} at {self._server.url} {what}, so it is another model; serve the folder of the "
            f"policy, or name it in rollout.served_model"
        )

    def check(
        self, policy: PreTrainedModel, prompts: Sequence[Sequence[int]], greedy: Sequence[list[int]]
    ) -> None:
        """Make sure that what the server holds for most probable is so for the policy.

        Raises:
            MachineError: it is not.
        """
        rows = [(prompt, ids) for prompt, ids in zip(prompts, greedy, strict=True) if ids]
        gaps = [_gaps(policy, prompt, ids) for prompt, ids in rows]
        if gaps and (gap := float(torch.cat(gaps).mean())) > MAX_GAP:
            raise self._another(
                f"answers with tokens that the policy holds for {gap:.2g} nats less probable than others"
            )


@torch.no_grad()
def _gaps(policy: PreTrainedModel, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """How much less probable each token is than the most probable one, in nats, (len(ids),)."""
    row = torch.tensor([[*prompt, *ids]], device=policy.device)
    logits = policy(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    taken = logits.gather(1, row[0, len(prompt) :, None]).squeeze(1)
    gaps: torch.Tensor = (logits.max(1).values - taken).cpu()
    return gaps


def find_served(
    policy: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    config: FixedPolicyConfig,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> ServedPolicy:
    """The server of a stage, asked whether it serves the stage's policy.

    Args:
        policy: as the stage has it.
        tokenizer: of the policy.
        prompts: of the data set; the first few are asked to compare.
        config: address, lengths, temperature, seed, requests under way at once.
        autocast: in which the policy is computed.

    Raises:
        MachineError: the server is away, answers nonsense, or serves another model; the key cannot stand in a header.
    """
    server = Server(config.rollout, config.generation_batch_size)
    few = prompts[:CHECKED_PROMPTS]
    model, form, greedy = processes.from_main(lambda: asyncio.run(_known(server, tokenizer, config, few)))
    served = ServedPolicy(server, tokenizer, config, model, form)
    with evaluating(policy), in_step(policy), autocast():
        served.check(policy, few, greedy)
    return served


async def _known(
    server: Server, tokenizer: Tokenizer, config: FixedPolicyConfig, prompts: Sequence[Sequence[int]]
) -> tuple[str, int, list[list[int]]]:
    """What the server calls the policy, which form of request it takes, and its most probable tokens."""
    async with server:
        model = await server.model()
        return model, *await ServedPolicy(server, tokenizer, config, model).probe(prompts)
