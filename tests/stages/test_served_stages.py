"""Stages whose responses a server samples: what comes of it, what is written, and what another run makes of it."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import MachineError
from alignpipe.pipeline.plan import make_plan
from alignpipe.rollout import server as server_module
from tests.fake_server import Reply, completion, fake_server
from tests.project import Project

ORDER = ("pipeline.order=[sft,collect]",)
SERVED = "stages.collect.rollout.engine=openai"


def _sft(project: Project) -> Path:
    return next((project.outputs / "stages").glob("sft-*"))


def _manifest(run: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / stage / "alignpipe.json").read_text())
    return found


def _key(project: Project, *words: str) -> str:
    return make_plan(project.compose(*words).config).graph.nodes["collect"].key


class _Policy:
    """The most probable tokens of the finished SFT policy, made-up ones where it samples; for so many requests."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer = tokenizer
        self.lock = threading.Lock()
        self.left = 10**9

    def __call__(self, body: dict[str, Any]) -> Reply:
        with self.lock:
            self.left -= 1
            if self.left < 0:
                return None
            if body["temperature"]:
                return completion(
                    ids=[20 + body["seed"] % 97, 20 + body["seed"] % 89, self.tokenizer.turn_end_id]
                )
            ids = torch.tensor([body["prompt"]])
            settings: dict[str, Any] = {"max_new_tokens": body["max_tokens"], "do_sample": False}
            found = self.model.generate(ids, eos_token_id=body["stop_token_ids"], **settings)  # type: ignore[operator]
            answer = found[0, ids.shape[1] :].tolist()
        return completion(ids=answer, reason="stop" if answer[-1] in self.tokenizer.stop_ids else "length")


def test_a_server_that_goes_away_is_told_and_the_same_command_goes_on(
    copied: Project, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr("alignpipe.evaluation.responses.PROMPTS_PER_RECORD", 8)
    monkeypatch.setenv(server_module.KEY_VARIABLE, "s3cret")
    policy = _Policy(_sft(copied), tokenizer)
    with fake_server(policy) as server:
        engine = [SERVED, f"rollout.url={server.url}", "rollout.batch_size=32"]
        words = [*ORDER, "stages.collect.num_prompts=32", *engine]
        # Eight prompts to compare, two records of eight prompts with four samples, and some of the third.
        policy.left = 8 + 2 * 32 + 5
        with pytest.raises(MachineError, match="does not answer"):
            copied.run(*words)
        policy.left = 10**9
        server.bodies.clear()
        run = copied.run(*words)
        again = {body["seed"] for body in server.bodies if body["temperature"]}
    # By seed: what the first run gave up may reach the server only now.
    assert len(again) == 2 * 32
    manifest, ours = _manifest(run, "collect"), _manifest(copied.run(*ORDER), "collect")
    assert manifest["metrics"]["responses"] > 64
    # The engine is in the key, where it stands is not; of a key nothing is written at all.
    assert manifest["inputs"]["settings"]["rollout"] == {"engine": "openai"}
    assert "rollout" not in ours["inputs"]["settings"]
    assert manifest["key"] != ours["key"]
    files = [path for path in copied.outputs.rglob("*") if path.is_file()]
    assert not [path for path in files if b"s3cret" in path.read_bytes()]


def test_only_the_engine_is_in_the_key(finished: Project) -> None:
    here = _key(finished)
    assert _key(finished, "rollout.url=http://a/v1", "rollout.served_model=x", "rollout.timeout=5") == here
    there = _key(finished, SERVED, "rollout.url=http://a/v1")
    assert there != here
    assert _key(finished, SERVED, "rollout.url=http://b/v1", "rollout.served_model=x") == there


def test_another_policy_at_the_server_ends_the_stage(
    copied: Project, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = _Policy(next((copied.outputs / "stages").glob("ppo-*")), tokenizer)
    for parameter in other.model.parameters():
        parameter.data = parameter.data.roll(1, 0)
    with fake_server(other) as server, pytest.raises(MachineError, match="so it is another model"):
        copied.run(*ORDER, SERVED, f"rollout.url={server.url}")


@contextmanager
def _transformers_serve(folder: Path, log: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, str(folder), *options], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()
            process.wait()


def _wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(240):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.25)
    raise AssertionError(log.read_text())


@pytest.mark.slow
@pytest.mark.skipif(
    not all(find_spec(name) for name in ("fastapi", "uvicorn", "openai")),
    reason="transformers serve is not installed; pip install 'alignpipe[test]'",
)
def test_rejection_sampling_from_transformers_serve(copied: Project, tmp_path: Path) -> None:
    folder = _sft(copied).resolve()
    with _transformers_serve(folder, tmp_path / "serve.log") as url:
        run = copied.run(
            "pipeline.order=[sft,collect,rm,rs]",
            "stages.rs.rollout.engine=openai",
            "stages.rs.num_prompts=12",
            f"rollout.url={url}",
            f"rollout.served_model={folder}",
            "rollout.batch_size=8",
        )
    manifest = _manifest(run, "rs")
    assert manifest["inputs"]["settings"]["rollout"] == {"engine": "openai"}
    rows = [json.loads(line) for line in (run / "rs" / "candidates.jsonl").read_text().splitlines()]
    said = [(row["prompt"], *row["ids"]) for row in rows]
    assert len(said) == 36
    # It samples: of three responses to a prompt hardly any two are alike.
    assert len(set(said)) > 24
