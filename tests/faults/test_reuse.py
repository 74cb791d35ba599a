"""One thing changed at a time: what depends on it is made again, and nothing else is."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from alignpipe.data.tokenizer import Tokenizer
from alignpipe.models.saving import save_model
from alignpipe.pipeline import keys
from alignpipe.pipeline.plan import make_plan
from tests.faults.table import Faults
from tests.project import Project

ALL = ("sft", "collect", "rm", "ppo")
AFTER_SFT, AFTER_COLLECT, NONE = ALL[1:], ALL[2:], ()
MINE = """# @package _global_
stages:
  ppo:
    kl_coef: 0.2
    gamma: 0.9
"""
WORDS = (
    "--config-dir",
    "./conf",
    "experiment=mine",
    "model=./base",
    "pipeline.order=[sft,collect,rm,ppo]",
    "stages.ppo.policy=sft",
    "stages.ppo.reward.function=./reward.py:brief",
    "stages.sft.data=./rows.jsonl",
    "stages.sft.max_steps=3",
    "stages.sft.num_samples=0",
)


@dataclass(frozen=True)
class Case:
    """Something changed, and the stages that must be made again.

    Attributes:
        name: what is changed.
        again: names of stages.
        words: typed after the others.
        change: of files, in the working folder.
    """

    name: str
    again: tuple[str, ...]
    words: tuple[str, ...] = ()
    change: Callable[[], object] = lambda: None


def _replace(path: str, old: str, new: str) -> Callable[[], object]:
    def change() -> None:
        text = Path(path).read_text(encoding="utf-8")
        assert old in text
        Path(path).write_text(text.replace(old, new, 1), encoding="utf-8")
        _later(path)()

    return change


def _later(path: str) -> Callable[[], object]:
    return lambda: os.utime(path, (2e9, 2e9))


def _flip_weight() -> None:
    path = Path("base", "model.safetensors")
    content = bytearray(path.read_bytes())
    # The lowest bit of the last weight.
    content[-4] ^= 1
    path.write_bytes(content)
    _later(str(path))()


CASES = (
    Case("a byte of the data", ALL, change=_replace("rows.jsonl", "Answer 7.", "Answer 7!")),
    Case("a bit of the base model", ALL, change=_flip_weight),
    Case("the tokenizer", ALL, change=_replace("base/tokenizer.json", '"version": "1.0"', '"version":"1.0"')),
    Case("the chat template", ALL, words=("model.chat_template=alpaca",)),
    Case("the seed", ALL, words=("seed=1",)),
    Case("the precision", ALL, words=("launch.precision=bf16",)),
    Case("adapters", ALL, words=("adapter=lora",)),
    Case("a setting of the first stage", ALL, words=("stages.sft.learning_rate=0.1",)),
    Case("a setting of an upstream stage", AFTER_SFT, words=("stages.collect.num_samples=5",)),
    Case("the labelers", AFTER_SFT, words=("data.labelers.noise=0.5",)),
    Case("the loss of the reward model", AFTER_COLLECT, words=("stages.rm.loss=plackett_luce",)),
    Case("the code of the reward model", AFTER_COLLECT, change=lambda: keys.VERSIONS.update(rm=99)),
    Case("a byte of the reward function", ("ppo",), change=_replace("reward.py", "-len", "- len")),
    Case(
        "a value in a file of the user's",
        ("ppo",),
        change=_replace("conf/experiment/mine.yaml", "0.2", "0.3"),
    ),
    Case("the time of the data", NONE, change=_later("rows.jsonl")),
    Case("the time of the weights", NONE, change=_later("base/model.safetensors")),
    Case("the folder of the outputs", NONE),
    Case("a comment", NONE, change=_replace("conf/experiment/mine.yaml", "stages:", "# Mine.\nstages:")),
    Case(
        "the order of keys",
        NONE,
        change=_replace(
            "conf/experiment/mine.yaml", "kl_coef: 0.2\n    gamma: 0.9", "gamma: 0.9\n    kl_coef: 0.2"
        ),
    ),
    Case("the name of the run", NONE, words=("run.name=mine",)),
    Case("how often is logged", NONE, words=("stages.sft.log_steps=2", "stages.ppo.log_steps=2")),
    Case("how often is saved", NONE, words=("stages.sft.save_steps=1", "stages.rm.save_steps=1")),
    Case("rows in one forward", NONE, words=("stages.rm.micro_batch_size=4", "rollout.batch_size=7")),
    Case("what it runs on", NONE, words=("launch=cpu", "model.attn_implementation=eager")),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of a user's own files in which a chain is done."""
    folder = tmp_path_factory.mktemp("made")
    lines = [json.dumps({"prompt": f"Question {n}?", "completion": f"Answer {n}."}) for n in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "reward.py").write_text(
        "def brief(prompts, responses):\n    return [-len(r) for r in responses]\n"
    )
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "experiment" / "mine.yaml").write_text(MINE)
    return folder


@pytest.fixture
def changed(
    made: Path,
    tmp_path: Path,
    make_llama: Callable[..., PreTrainedModel],
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[Case], Project]]:
    """A copy of the finished project with a case's change made in it."""
    if not (made / "outputs").exists():
        save_model(make_llama(initializer_range=0.02), tokenizer, made / "base")
        monkeypatch.chdir(made)
        Project(made / "outputs").run(*WORDS)
    versions = dict(keys.VERSIONS)

    def change(case: Case) -> Project:
        folder = tmp_path / case.name.replace(" ", "-")
        shutil.copytree(made, folder, symlinks=True)
        monkeypatch.chdir(folder)
        case.change()
        return Project(folder / "outputs")

    yield change
    keys.VERSIONS.update(versions)


def test_exactly_what_depends_on_a_change_is_made_again(
    changed: Callable[[Case], Project], count: Callable[[int, int], int], faults: Faults
) -> None:
    assert [bool(case.again) for case in CASES].count(True) == 14 and len(CASES) == 24
    tried, right = CASES[:: len(CASES) // count(4, len(CASES))], 0
    for case in tried:
        project = changed(case)
        config, before = project.compose(*WORDS, *case.words).config, project.compose(*WORDS).config
        assert not case.words or config != before, case.name
        plan = make_plan(config)
        again = tuple(name for name in ALL if name not in plan.reused)
        assert again == case.again, f"{case.name}: {again} would be made again"
        keys.VERSIONS["rm"] = 1
        right += 1
    faults.tell("one thing changed: exactly what depends on it is planned again", right, len(tried))


def test_the_plan_is_what_the_run_does(
    changed: Callable[[Case], Project], count: Callable[[int, int], int], faults: Faults
) -> None:
    tried = [
        case for case in CASES if case.name in ("a byte of the reward function", "the folder of the outputs")
    ]
    tried += [case for case in CASES if case not in tried][: count(0, len(CASES))]
    right = 0
    for case in tried:
        project = changed(case)
        project.run(*WORDS, *case.words)
        states = {name: "done" if name in case.again else "reused" for name in ALL}
        assert project.states() == states, case.name
        keys.VERSIONS["rm"] = 1
        right += 1
    faults.tell("one thing changed: exactly what depends on it is made again", right, len(tried))
