"""Sampling from a server: whose tokens come back, in what order and length, and what is said when it fails."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedModel

from alignpipe.config import EngineConfig, FixedPolicyConfig
from alignpipe.data.records import Message
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import MachineError
from alignpipe.rollout import server as server_module
from alignpipe.rollout.generate import generate
from alignpipe.rollout.served import find_served
from alignpipe.rollout.server import Completion, Server
from tests.fake_server import FakeServer, Reply, completion, fake_server
from tests.project import Project

LIMIT = 6


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_PAUSE", 0.01)
    monkeypatch.delenv(server_module.KEY_VARIABLE, raising=False)


@pytest.fixture
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    return [
        tokenizer.encode_prompt([Message("user", text)]) for text in ("one", "two and two", "a", "b", "c")
    ]


@pytest.fixture
def policy(make_llama: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_llama()


@pytest.fixture
def config(project: Project) -> FixedPolicyConfig:
    found = project.compose("stages.rs.rollout.engine=openai", "rollout.url=http://nowhere/v1").config.stages[
        "rs"
    ]
    assert isinstance(found, FixedPolicyConfig)
    return replace(found, max_response_length=LIMIT, generation_batch_size=4, seed=3)


def _at(config: FixedPolicyConfig, server: FakeServer, **changes: Any) -> FixedPolicyConfig:
    return replace(config, rollout=replace(config.rollout, url=server.url, **changes))


async def _completed(config: EngineConfig, body: dict[str, Any]) -> Completion:
    async with Server(config, 1) as server:
        return await server.complete(body)


async def _model(config: EngineConfig) -> str:
    async with Server(config, 1) as server:
        return await server.model()


def _greedy(policy: PreTrainedModel, tokenizer: Tokenizer, prompt: list[int], limit: int) -> list[int]:
    settings: dict[str, Any] = {"stop_ids": tokenizer.stop_ids, "pad_id": tokenizer.pad_id, "seed": 0}
    found = generate(policy, [prompt], num_samples=1, max_new_tokens=limit, temperature=None, **settings)
    return found[0][0].ids


class _Engine:
    """Answers a comparison as a policy would, and every other request as a test says."""

    def __init__(
        self, policy: PreTrainedModel, tokenizer: Tokenizer, answer: Callable[[dict[str, Any]], Reply]
    ) -> None:
        self.policy, self.tokenizer, self.answer = policy, tokenizer, answer
        self.lock = threading.Lock()

    def __call__(self, body: dict[str, Any]) -> Reply:
        if body["temperature"]:
            return self.answer(body)
        with self.lock:
            ids = _greedy(self.policy, self.tokenizer, body["prompt"], body["max_tokens"])
        return completion(ids=ids, reason="stop" if ids[-1] in self.tokenizer.stop_ids else "length")


def test_responses_come_in_the_order_of_the_prompts_whatever_the_server_does(
    policy: PreTrainedModel, tokenizer: Tokenizer, prompts: list[list[int]], config: FixedPolicyConfig
) -> None:
    def slow_first(body: dict[str, Any]) -> Reply:
        time.sleep(0.002 * (30 - len(body["prompt"])))
        return completion(ids=[len(body["prompt"]), body["seed"] % 100, tokenizer.turn_end_id])

    with fake_server(_Engine(policy, tokenizer, slow_first)) as server:
        served = find_served(policy, tokenizer, prompts, _at(config, server))
        every = served.sample(prompts, [0, 1, 2, 3, 4], 3)
        some = served.sample(prompts, [4, 1], 3)
    assert [[answer.ids[0] for answer in row] for row in every] == [[len(prompt)] * 3 for prompt in prompts]
    # Each sample has a seed of its own, which its company does not change.
    assert some == [every[4], every[1]]
    drawn = [body["seed"] for body in server.bodies if body["temperature"]]
    assert len(set(drawn)) == 15
    assert all(0 <= seed < 2**31 for seed in drawn)


def test_a_request_says_what_is_configured_and_leaves_nothing_to_the_server(
    policy: PreTrainedModel, tokenizer: Tokenizer, prompts: list[list[int]], config: FixedPolicyConfig
) -> None:
    engine = _Engine(policy, tokenizer, lambda _: completion(ids=[5], reason="length"))
    with fake_server(engine) as server:
        served = find_served(policy, tokenizer, prompts, _at(replace(config, temperature=0.7), server))
        served.sample(prompts, [1], 1)
    assert server.bodies[-1] == {
        "model": "policy",
        "prompt": prompts[1],
        "max_tokens": LIMIT,
        "temperature": 0.7,
        "seed": server.bodies[-1]["seed"],
        "stop_token_ids": list(tokenizer.stop_ids),
        "return_token_ids": True,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    assert not any("Authorization" in headers for headers in server.headers)


@pytest.mark.parametrize(
    ("said", "ids", "finished"),
    [
        # `T` is the token that ends a turn.
        ({"ids": [7, 8, "T"]}, [7, 8, "T"], True),
        ({"ids": [7, 8]}, [7, 8, "T"], True),
        ({"ids": [7, 8], "reason": "length"}, [7, 8], False),
        ({"ids": [7, "T", 9], "reason": "length"}, [7, "T"], True),
        ({"ids": [7] * 9, "reason": "length"}, [7] * LIMIT, False),
        # No room for a stop token that the server did not count.
        ({"ids": [7] * LIMIT}, [7] * LIMIT, False),
        ({"ids": [], "reason": "length"}, ["T"], True),
    ],
)
def test_a_response_ends_where_a_sampled_one_would(
    said: dict[str, Any],
    ids: list[Any],
    finished: bool,
    policy: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    config: FixedPolicyConfig,
) -> None:
    def real(tokens: list[Any]) -> list[int]:
        return [tokenizer.turn_end_id if token == "T" else token for token in tokens]

    engine = _Engine(policy, tokenizer, lambda _: completion(**{**said, "ids": real(said["ids"])}))
    with fake_server(engine) as server:
        served = find_served(policy, tokenizer, prompts, _at(config, server))
        ((answer,),) = served.sample(prompts, [0], 1)
    assert answer == (real(ids), finished)


def test_a_server_of_texts_gets_a_text_and_its_answer_is_encoded_anew(
    policy: PreTrainedModel, tokenizer: Tokenizer, prompts: list[list[int]], config: FixedPolicyConfig
) -> None:
    def texts_alone(body: dict[str, Any]) -> Reply:
        if not isinstance(body["prompt"], str):
            return 400, {"detail": "prompt must be a string."}
        assert "top_k" not in body, "transformers serve refuses what it does not know"
        return completion("Four.", prompt_tokens=len(tokenizer._backend.encode(body["prompt"]).ids))

    with fake_server(texts_alone) as server:
        served = find_served(policy, tokenizer, prompts, _at(config, server))
        ((answer,),) = served.sample(prompts, [1], 1)
    assert answer == ([*tokenizer.encode_continuation("Four."), tokenizer.turn_end_id], True)
    assert tokenizer.decode(answer.ids) == "Four."
    assert tokenizer._backend.encode(server.bodies[-1]["prompt"]).ids == prompts[1]
    assert '"do_sample": true' in server.bodies[-1]["generation_config"]
    assert '"do_sample": false' in server.bodies[1]["generation_config"]


def test_the_key_goes_into_the_header_and_nowhere_else(
    policy: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    config: FixedPolicyConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(server_module.KEY_VARIABLE, "s3cret")
    refusing = fake_server(lambda _: (403, {"error": "no"}))
    with refusing as server, pytest.raises(MachineError, match="refuses the key") as caught:
        find_served(policy, tokenizer, prompts, _at(config, server))
    assert all(headers["Authorization"] == "Bearer s3cret" for headers in server.headers)
    assert "s3cret" not in str(caught.value) + str(server.bodies)


def test_a_key_that_no_header_can_hold_is_not_repeated(
    config: FixedPolicyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(server_module.KEY_VARIABLE, "s3\ncret")
    with pytest.raises(MachineError, match="ALIGNPIPE_ROLLOUT_API_KEY") as caught:
        Server(config.rollout, 1)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize("trouble", [(429, {"error": "full"}), (503, "starting"), (500, {}), None])
def test_what_passes_is_tried_again(trouble: Reply, config: FixedPolicyConfig) -> None:
    replies = [trouble, trouble, completion(ids=[1], reason="length")]
    with fake_server(lambda _: replies.pop(0)) as server:
        found = asyncio.run(_completed(_at(config, server).rollout, {"prompt": [1]}))
    assert found.ids == [1]
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        ((503, {"error": {"message": "starting\nup"}}), "does not answer (HTTP 503: starting up)"),
        (None, "does not answer ("),
        ((404, {"message": "no such model"}), "has no such page or model (HTTP 404: no such model)"),
        ((302, ""), "answers with HTTP 302"),
        ((200, "<html>"), "answers with no JSON"),
        ((200, []), "answers with no JSON object"),
        ((200, {"choices": []}), "answers with no completion"),
        ((200, {"choices": [{"text": "a"}]}), "answers with no completion"),
        (completion(reason="content_filter"), "a completion that ended by 'content_filter'"),
        ((200, {"choices": [{"text": "", "finish_reason": "stop", "token_ids": ["a"]}]}), "no numbers"),
        ((422, {"detail": "no"}), "does not take the request (HTTP 422: no)"),
    ],
)
def test_a_server_that_fails_is_one_line(reply: Reply, line: str, config: FixedPolicyConfig) -> None:
    with fake_server(lambda _: reply) as server, pytest.raises(MachineError) as caught:
        asyncio.run(_completed(_at(config, server).rollout, {"prompt": [1]}))
    assert str(caught.value).startswith(f"rollout.url: {server.url} ")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nobody_there_is_one_line() -> None:
    with pytest.raises(MachineError, match=r"does not answer .* run the same command again"):
        asyncio.run(_model(EngineConfig("openai", "http://127.0.0.1:9/v1", None, 5.0)))


def test_a_time_limit_holds_over_all_tries(config: FixedPolicyConfig) -> None:
    released = threading.Event()

    def hang(_: dict[str, Any]) -> Reply:
        released.wait(10)
        return None

    with fake_server(hang) as server:
        start = time.monotonic()
        with pytest.raises(MachineError, match="does not answer"):
            asyncio.run(_completed(_at(config, server, timeout=0.3).rollout, {}))
        assert time.monotonic() - start < 2
        released.set()


@pytest.mark.parametrize(
    ("names", "told"), [(["a", "b"], "lists 2 models: a, b"), ([], "lists 0 models: none")]
)
def test_one_model_must_be_named_where_a_server_has_not_one(
    names: list[str], told: str, config: FixedPolicyConfig
) -> None:
    models = 200, {"data": [{"id": name} for name in names]}
    with fake_server(lambda _: None, models) as server:
        with pytest.raises(MachineError, match=f"rollout.served_model: .* {told}"):
            asyncio.run(_model(_at(config, server).rollout))
        assert asyncio.run(_model(_at(config, server, served_model="b").rollout)) == "b"


def test_another_model_is_noticed_before_anything_is_sampled(
    policy: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    config: FixedPolicyConfig,
    make_llama: Callable[..., PreTrainedModel],
) -> None:
    other = fake_server(_Engine(make_llama(seed=1), tokenizer, lambda _: None))
    with (
        other as server,
        pytest.raises(MachineError, match="nats less probable than others, so it is another"),
    ):
        find_served(policy, tokenizer, prompts, _at(config, server))


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        (completion(ids=[10**6], reason="length"), "tokens that the policy's tokenizer does not have"),
        (completion("a", reason="length", prompt_tokens=1), "reads 1 tokens where the policy reads"),
    ],
)
def test_another_vocabulary_is_noticed(
    reply: Reply,
    line: str,
    policy: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    config: FixedPolicyConfig,
) -> None:
    with fake_server(lambda _: reply) as server, pytest.raises(MachineError, match=line):
        find_served(policy, tokenizer, prompts, _at(config, server))


def test_one_failure_ends_what_is_under_way(
    policy: PreTrainedModel, tokenizer: Tokenizer, prompts: list[list[int]], config: FixedPolicyConfig
) -> None:
    released = threading.Event()

    def fail_or_hang(body: dict[str, Any]) -> Reply:
        if body["prompt"] == prompts[0]:
            return 401, {}
        released.wait(20)
        return None

    with fake_server(_Engine(policy, tokenizer, fail_or_hang)) as server:
        served = find_served(policy, tokenizer, prompts, _at(config, server))
        start = time.monotonic()
        with pytest.raises(MachineError, match="refuses the key"):
            served.sample(prompts, [1, 0, 2], 2)
        assert time.monotonic() - start < 5
        released.set()


def test_a_signal_is_heard_while_the_server_is_slow(
    policy: PreTrainedModel, tokenizer: Tokenizer, prompts: list[list[int]], config: FixedPolicyConfig
) -> None:
    released = threading.Event()

    def hang(_: dict[str, Any]) -> Reply:
        released.wait(20)
        return None

    def stop() -> None:
        raise KeyboardInterrupt

    with fake_server(_Engine(policy, tokenizer, hang)) as server:
        served = find_served(policy, tokenizer, prompts, _at(config, server))
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            served.sample(prompts, [1, 2], 2, stop)
        assert time.monotonic() - start < 5
        released.set()
