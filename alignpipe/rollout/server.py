"""The client of a server that speaks OpenAI's protocol: one completion at a time, tried again where that may help.

prompt -> text, token ids where the server tells them, why it ended
"""

import asyncio
import os
import time
from dataclasses import dataclass
from typing import Any, Self

import httpx2

from alignpipe.config import EngineConfig
from alignpipe.errors import MachineError

KEY_VARIABLE = "ALIGNPIPE_ROLLOUT_API_KEY"
TRIES = 5
# Seconds before the second try; each pause is twice the one before.
FIRST_PAUSE = 1.0
# Too many requests, and what a server or a proxy before it says while it starts, restarts or is full.
TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
# It does not take such a request, whatever prompt stands in it.
NOT_TAKEN = (400, 422)
# Characters of what a server said that go into an error line.
TOLD = 200


class NotTaken(MachineError):
    """The server does not take requests of this form."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What a server answered.

    Attributes:
        text: without special tokens.
        ids: tokens; None where the server does not tell them.
        finished: it ended in a stop token, rather than at the length limit.
        prompt_tokens: that the server read; None where it does not say.
        completion_tokens: that it sampled; None where it does not say.
    """

    text: str
    ids: list[int] | None
    finished: bool
    prompt_tokens: int | None
    completion_tokens: int | None


class Server:
    """A server, asked many things at once; a context of one event loop.

    Args:
        config: address, name of the model, time limit.
        connections: at once.

    Raises:
        MachineError: the key in the environment cannot stand in a header.
    """

    def __init__(self, config: EngineConfig, connections: int) -> None:
        self.url = (config.url or "").rstrip("/")
        self._timeout, self._served_model = config.timeout, config.served_model
        self._headers, self._connections = _authorization(), connections

    async def __aenter__(self) -> Self:
        limits = httpx2.Limits(max_connections=self._connections)
        self._client = httpx2.AsyncClient(headers=self._headers, limits=limits)
        # What waits for its turn here does not use up its time.
        self._turns = asyncio.Semaphore(self._connections)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def model(self) -> str:
        """What the server calls the policy.

        Raises:
            MachineError: the server is away, or serves no model or several and the configuration names none.
        """
        if self._served_model is not None:
            return self._served_model
        found = await self._ask("GET", "models", None)
        listed = found.get("data")
        if not isinstance(listed, list) or not all(isinstance(m, dict) and "id" in m for m in listed):
            raise self.nonsense("no list of models")
        names = [str(model["id"]) for model in listed]
        if len(names) != 1:
            told = ", ".join(names[:5]) if names else "none (as `transformers serve` does for a folder)"
            raise MachineError(
                f"rollout.served_model: {self.url} lists {len(names)} models: {told}; say which one is the policy"
            )
        return names[0]

    async def complete(self, body: dict[str, Any]) -> Completion:
        """Ask for one completion.

        Raises:
            NotTaken: the server does not take requests of this form.
            MachineError: it is away, refuses the key or the model, or answers nonsense.
        """
        found = await self._ask("POST", "completions", body)
        try:
            (choice,) = found["choices"]
            text, reason, ids = choice["text"], choice["finish_reason"], choice.get("token_ids")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self.nonsense("no completion") from error
        if not isinstance(text, str) or reason not in ("stop", "length"):
            raise self.nonsense(f"a completion that ended by {reason!r}")
        if ids is not None and not (isinstance(ids, list) and all(type(token) is int for token in ids)):
            raise self.nonsense("token ids that are no numbers")
        usage = found.get("usage")
        counts = usage if isinstance(usage, dict) else {}
        return Completion(
            text, ids, reason == "stop", counts.get("prompt_tokens"), counts.get("completion_tokens")
        )

    def nonsense(self, what: str) -> MachineError:
        """The error of a server that answers, but not as the protocol says."""
        return MachineError(
            f"rollout.url: {self.url} answers with {what}; it must speak OpenAI's completions protocol"
        )

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        async with self._turns:
            return await self._try(method, path, body)

    async def _try(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """One request, tried again while the trouble may pass."""
        deadline = time.monotonic() + self._timeout
        pause, trouble = FIRST_PAUSE, "no answer"
        for last in (*[False] * (TRIES - 1), True):
            try:
                answer = await self._client.request(
                    method, f"{self.url}/{path}", json=body, timeout=max(deadline - time.monotonic(), 0.001)
                )
            except httpx2.TransportError as error:
                trouble = type(error).__name__
            else:
                if answer.status_code not in TEMPORARY:
                    return self._read(answer)
                trouble = f"HTTP {answer.status_code}{_told(answer)}"
            if last or time.monotonic() + pause > deadline:
                break
            await asyncio.sleep(pause)
            pause *= 2
        raise MachineError(
            f"rollout.url: {self.url} does not answer ({trouble}); start the server with the policy, or raise "
            f"rollout.timeout ({self._timeout:g} s), and run the same command again"
        )

    def _read(self, answer: httpx2.Response) -> dict[str, Any]:
        status = answer.status_code
        if status in NOT_TAKEN:
            raise NotTaken(
                f"rollout.url: {self.url} does not take the request (HTTP {status}{_told(answer)})"
            )
        if status in (401, 403):
            raise MachineError(
                f"rollout.url: {self.url} refuses the key (HTTP {status}); set {KEY_VARIABLE} in the environment"
            )
        if status == 404:
            raise MachineError(
                f"rollout.url: {self.url} has no such page or model (HTTP 404{_told(answer)}); an address ends in /v1, "
                f"rollout.served_model is a name of its own"
            )
        if status != 200:
            raise self.nonsense(f"HTTP {status}")
        try:
            found = answer.json()
        except ValueError as error:
            raise self.nonsense("no JSON") from error
        if not isinstance(found, dict):
            raise self.nonsense("no JSON object")
        return found


def _authorization() -> dict[str, str]:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        # What the library says of such a header repeats it.
        raise MachineError(f"{KEY_VARIABLE}: holds characters that no key has; set it again")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _told(answer: httpx2.Response) -> str:
    """What the server says, in one line, shortened; nothing of the request stands in it but what it repeats."""
    try:
        found: Any = answer.json()
    except ValueError:
        return ""
    for name in ("error", "message", "detail"):
        found = found.get(name, found) if isinstance(found, dict) else found
    text = " ".join(str(found).split())
    return f": {text[:TOLD]}" if text else ""
