"""A run through all seven kinds of stage that takes seconds, and what must come out of it however it was disturbed."""

import json
import os
import pickle
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from alignpipe.artifact import MANIFEST, sha256_file, verify
from alignpipe.compose import composition
from alignpipe.compose.composition import Composed
from alignpipe.training.metrics import METRICS
from tests.faults.commands import Command, start
from tests.project import SMALL

STAGES = ("sft", "collect", "rm", "rs", "ppo", "dpo", "eval")
SAVED = ("sft", "rm", "rs", "ppo", "dpo")
# Everything that a state must hold is in use: moving averages, an adaptive price of KL, running moments of rewards.
WORDS = (
    *SMALL,
    "+stage@stages.dpo=dpo",
    f"pipeline.order=[{','.join(STAGES)}]",
    "stages.dpo.policy=sft",
    "stages.dpo.reference=sft",
    "stages.dpo.data.path=collect",
    "stages.eval.policies=[sft,ppo,dpo]",
    "stages.ppo.kl_controller=adaptive",
    "stages.ppo.reward_scaling=running",
    "stages.ppo.ema_decay=0.9",
    "data.world.num_prompts=200",
    "model.training.collect.num_prompts=24",
    "model.training.rs.num_prompts=12",
    "stages.sft.data.max_rows=48",
    "model.max_response_length=8",
    *(f"model.training.{stage}.num_samples=4" for stage in ("sft", "dpo")),
    *(f"model.training.{stage}.eval_rows=16" for stage in SAVED if stage != "ppo"),
    "model.training.ppo.num_rollouts=3",
    "stages.eval.text_rows=8",
    *(f"model.training.{stage}.{every}_steps=1" for stage in SAVED for every in ("save", "log")),
)

# Every kind of writing in it: states, a journal, hand-overs, links, the record of the run.
SHORT = (
    *WORDS,
    "pipeline.order=[sft,collect]",
    "model.training.sft.epochs=1",
    "model.training.sft.batch_size=4",
    "model.training.sft.max_steps=3",
    "model.training.sft.num_samples=2",
    "model.training.sft.eval_rows=4",
    "model.training.collect.num_prompts=8",
    "model.training.collect.num_samples=3",
)


def begin(
    folder: Path, *words: str, before: Callable[..., None] | None = None, given: tuple[Any, ...] = ()
) -> Command:
    """Type `alignpipe run WORDS` in a folder; as `start`, but the words are composed once for all folders."""
    return start(folder, "run", *words, before=_compose_once, given=(Path(_memory().name), before, given))


def finish(folder: Path, *words: str) -> Command:
    """Run to the end, undisturbed.

    Raises:
        AssertionError: it did not come to its end.
    """
    command = begin(folder, *words)
    assert command.wait() == 0, command.told
    return command


@cache
def _memory() -> TemporaryDirectory[str]:
    """Holds compositions for as long as this process lives."""
    return TemporaryDirectory(prefix="composed-")


def _compose_once(memory: Path, before: Callable[..., None] | None, given: tuple[Any, ...]) -> None:
    compose = composition.compose

    def compose_once(words: list[str]) -> Composed:
        path = memory / sha256(json.dumps(words).encode()).hexdigest()
        if not path.exists():
            new = path.with_suffix(f".{os.getpid()}")
            new.write_bytes(pickle.dumps(compose(words)))
            new.replace(path)
        composed: Composed = pickle.loads(path.read_bytes())
        return composed

    composition.compose = compose_once
    if before is not None:
        before(*given)


def kept(folder: Path) -> dict[str, Any]:
    """What the finished stages of a project hold: the hash of each file, the figures of each step but for its speed.

    Raises:
        CheckpointError: one of them is damaged.
    """
    found: dict[str, Any] = {}
    for stage in sorted((folder / "outputs" / "stages").iterdir()):
        for name in verify(stage).files:
            path = stage / name
            found[f"{stage.name}/{name}"] = _figures(path) if name == METRICS else sha256_file(path)
    return found


def made(folder: Path) -> dict[str, int]:
    """The finished stages of a project, each with the number of its manifest on the disk: made anew it has another."""
    manifests = (folder / "outputs" / "stages").glob(f"*/{MANIFEST}")
    return {path.parent.name: path.stat().st_ino for path in manifests}


def _figures(path: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]
