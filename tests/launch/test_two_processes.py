"""Every stage on two processes does what it does on one: same losses, same responses, same order."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignpipe.artifact import read_manifest
from alignpipe.errors import AlignpipeError, Stopped
from alignpipe.pipeline.store import TASK
from alignpipe.task import Task, write_task
from tests.group import Group
from tests.launch.cases import run_stage
from tests.project import Project

CASES = "tests.launch.cases"
# One line of metrics a step, so that whole curves can be compared.
EVERY_STEP = [f"model.training.{kind}.log_steps=1" for kind in ("sft", "rm", "rs", "dpo", "ppo")]
CPU = [*EVERY_STEP, "launch=cpu"]
TWO = [*EVERY_STEP, "launch=cpu", "launch.num_processes=2"]
FSDP2 = [*EVERY_STEP, "launch=fsdp2", "launch.device=cpu", "launch.num_processes=2"]
CURVES = {
    "sft": ("loss", "grad_norm"),
    "rm": ("loss", "grad_norm", "rm/accuracy"),
    "dpo": ("loss", "grad_norm", "rewards/margins"),
    "rs": ("loss", "grad_norm"),
    "ppo": ("ppo/policy_loss", "ppo/value_loss", "objective/kl", "objective/score"),
}


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One process: the parents of every stage, with one line of metrics a step."""
    project = Project(tmp_path_factory.mktemp("chain") / "outputs")
    project.run(*CPU)
    project.run(*CPU, "pipeline=zephyr_style", "pipeline.order=[sft,collect,dpo]")
    return project


def _words(stage: str) -> list[str]:
    return ["pipeline=zephyr_style", "pipeline.order=[sft,collect,dpo]"] if stage == "dpo" else []


def _folder(chain: Project, stage: str) -> Path:
    found = sorted((chain.outputs / "stages").glob(f"{stage}-*"))
    return found[0]


def _beside(chain: Project, tmp_path: Path) -> Project:
    """A project that has the chain's artifacts as parents and whose own results go elsewhere."""
    (tmp_path / "outputs" / "stages").mkdir(parents=True)
    for folder in (chain.outputs / "stages").iterdir():
        (tmp_path / "outputs" / "stages" / folder.name).symlink_to(folder)
    return Project(tmp_path / "outputs")


def _run(group: Group, project: Project, stage: str, *words: str) -> Task:
    task = project.prepare(stage, *_words(stage), *words)
    group.call(CASES, "run_stage", path=task.work / TASK)
    return task


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _largest_difference(stage: str, one: Path, two: Path) -> float:
    pairs = [
        (mine[name], theirs[name])
        for mine, theirs in zip(_metrics(one), _metrics(two), strict=True)
        for name in CURVES[stage]
        if name in mine or name in theirs
    ]
    assert len(pairs) >= 2
    return max(abs(mine - theirs) / max(1.0, abs(mine)) for mine, theirs in pairs)


@pytest.mark.parametrize("stage", list(CURVES))
def test_training_on_two_processes_gives_the_curve_of_one(
    group: Group, chain: Project, tmp_path: Path, stage: str
) -> None:
    task = _run(group, _beside(chain, tmp_path), stage, *TWO)
    assert _largest_difference(stage, _folder(chain, stage), task.target) < 1e-5
    manifest = read_manifest(task.target)
    assert manifest is not None and manifest.versions["processes"] == "2"


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "ppo"])
def test_sharded_training_gives_the_curve_of_one(
    group: Group, chain: Project, tmp_path: Path, stage: str
) -> None:
    task = _run(group, _beside(chain, tmp_path), stage, *FSDP2)
    assert _largest_difference(stage, _folder(chain, stage), task.target) < 1e-5
    opener = AutoModelForSequenceClassification if stage == "rm" else AutoModelForCausalLM
    opened = dict(opener.from_pretrained(task.target).named_parameters())
    for name, weight in opener.from_pretrained(_folder(chain, stage)).named_parameters():
        assert (opened[name] - weight).abs().max() < 1e-4, name


@pytest.mark.parametrize(
    "word", ["launch.strategy=zero2", "launch.strategy=zero3", "launch.gradient_checkpointing=true"]
)
def test_every_way_of_sharding_gives_the_curve_of_one(
    group: Group, chain: Project, tmp_path: Path, word: str
) -> None:
    task = _run(group, _beside(chain, tmp_path), "ppo", *FSDP2, word)
    assert _largest_difference("ppo", _folder(chain, "ppo"), task.target) < 1e-5


def test_sharded_training_in_bf16_keeps_float32_weights_and_nearly_the_curve(
    group: Group, chain: Project, tmp_path: Path
) -> None:
    task = _run(group, _beside(chain, tmp_path), "sft", *FSDP2, "launch.precision=bf16")
    assert 1e-5 < _largest_difference("sft", _folder(chain, "sft"), task.target) < 0.05
    assert {weight.dtype for weight in load_file(task.target / "model.safetensors").values()} == {
        torch.float32
    }


SFT_IN_FULL = [
    "pipeline.order=[sft]",
    "stages.sft.neftune_alpha=5",
    "stages.sft.select_epoch=loss",
    "stages.sft.selection.method=ifd",
    "stages.sft.selection.diversity=kcenter",
    "stages.sft.selection.keep=0.4",
]


def test_noise_selection_and_best_epoch_do_not_depend_on_processes(group: Group, tmp_path: Path) -> None:
    one = Project(tmp_path / "one" / "outputs").run(*CPU, *SFT_IN_FULL) / "sft"
    for name, words in (("two", TWO), ("fsdp2", FSDP2)):
        task = Project(tmp_path / name / "outputs").prepare("sft", *words, *SFT_IN_FULL)
        group.call(CASES, "run_stage", path=task.work / TASK)
        mine, theirs = (
            [json.loads(line) for line in (folder / "selection.jsonl").read_text().splitlines()]
            for folder in (one, task.target)
        )
        assert [(row["place"], row["kept"]) for row in mine] == [
            (row["place"], row["kept"]) for row in theirs
        ]
        assert 0 < sum(row["kept"] for row in mine) < len(mine)
        assert _largest_difference("sft", one, task.target) < 1e-5
        opened = load_file(task.target / "model.safetensors")
        for key, weight in load_file(one / "model.safetensors").items():
            assert (opened[key] - weight).abs().max() < 1e-4, key


ADAPTED = ["adapter=lora", "pipeline.order=[sft,collect,rm,ppo]", "stages.ppo.policy=sft"]


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One process: a chain that trains adapters."""
    project = Project(tmp_path_factory.mktemp("adapted") / "outputs")
    project.run(*CPU, *ADAPTED)
    return project


@pytest.mark.parametrize("stage", ["collect", "rm", "ppo"])
def test_adapters_on_two_processes_do_what_they_do_on_one(
    group: Group, adapted: Project, tmp_path: Path, stage: str
) -> None:
    task = _run(group, _beside(adapted, tmp_path), stage, *TWO, *ADAPTED)
    if stage == "collect":
        _assert_same_rankings(_folder(adapted, stage) / "rankings.jsonl", task.target / "rankings.jsonl")
    else:
        assert _largest_difference(stage, _folder(adapted, stage), task.target) < 1e-5


@pytest.mark.parametrize("kind", ["fsdp2", "lora"])
def test_averaged_weights_and_ptx_on_two_processes_are_those_of_one(
    group: Group, chain: Project, adapted: Project, tmp_path: Path, kind: str
) -> None:
    words = ["stages.ppo.ema_decay=0.5", "stages.ppo.ptx_coef=0.5", "stages.ppo.max_update_kl=0.01"]
    parents, own = (chain, []) if kind == "fsdp2" else (adapted, ADAPTED)
    task = _beside(parents, tmp_path / "one").prepare("ppo", *CPU, *own, *words)
    run_stage(task.work / TASK)
    several = FSDP2 if kind == "fsdp2" else TWO
    other = _run(group, _beside(parents, tmp_path / "two"), "ppo", *several, *own, *words)
    assert _largest_difference("ppo", task.target, other.target) < 1e-5
    mine, theirs = (_metrics(folder)[-1]["ppo/ptx_loss"] for folder in (task.target, other.target))
    assert mine == pytest.approx(theirs, rel=1e-5)
    name = "model.safetensors" if kind == "fsdp2" else "adapter_model.safetensors"
    one, two = (load_file(folder / name) for folder in (task.target, other.target))
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-4


# Alarmed by whatever happens at the first look.
WATCHED = [
    f"stages.ppo.monitor.{word}"
    for word in (
        "action=restore",
        "num_prompts=12",
        "max_kl=1e-6",
        "min_entropy_ratio=1",
        "max_length_ratio=1.0001",
    )
]


@pytest.mark.parametrize("words", [TWO, FSDP2, [*TWO, *ADAPTED]], ids=["ddp", "fsdp2", "adapters"])
def test_monitor_on_two_processes_restores_what_it_does_on_one(
    group: Group, request: pytest.FixtureRequest, tmp_path: Path, words: list[str]
) -> None:
    parents = request.getfixturevalue("adapted" if "adapter=lora" in words else "chain")
    alone = _beside(parents, tmp_path / "one").prepare(
        "ppo", *CPU, *(ADAPTED if words[-len(ADAPTED) :] == ADAPTED else []), *WATCHED
    )
    run_stage(alone.work / TASK)
    task = _run(group, _beside(parents, tmp_path / "two"), "ppo", *words, *WATCHED)
    one, two = read_manifest(alone.target), read_manifest(task.target)
    assert one is not None and two is not None
    assert one.metrics["monitor"] == two.metrics["monitor"]
    assert one.metrics["monitor"]["stopped_at"] == 1
    assert (one.versions["processes"], two.versions["processes"]) == ("1", "2")
    weights = next(path.name for path in alone.target.glob("*model.safetensors"))
    mine, theirs = load_file(alone.target / weights), load_file(task.target / weights)
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-4


@pytest.mark.parametrize("gather", ["layer", "rollout"])
def test_sharded_policy_samples_the_same_responses(
    group: Group, chain: Project, tmp_path: Path, gather: str
) -> None:
    task = _run(group, _beside(chain, tmp_path), "collect", *FSDP2, f"launch.generation_gather={gather}")
    _assert_same_rankings(_folder(chain, "collect") / "rankings.jsonl", task.target / "rankings.jsonl")


def test_sharded_policy_samples_fewer_prompts_than_processes(
    group: Group, chain: Project, tmp_path: Path
) -> None:
    words = ["stages.sft.num_samples=1", "stages.sft.max_steps=1", "stages.sft.eval_rows=1"]
    task = _run(group, _beside(chain, tmp_path), "sft", *FSDP2, *words)
    assert len((task.target / "samples.jsonl").read_text().splitlines()) == 1


def test_collect_on_two_processes_samples_the_same_responses(
    group: Group, chain: Project, tmp_path: Path
) -> None:
    task = _run(group, _beside(chain, tmp_path), "collect", *TWO)
    _assert_same_rankings(_folder(chain, "collect") / "rankings.jsonl", task.target / "rankings.jsonl")


def test_eval_on_two_processes_gives_the_same_scores(group: Group, chain: Project, tmp_path: Path) -> None:
    task = _run(group, _beside(chain, tmp_path), "eval", *TWO)
    one, two = (
        json.loads((folder / "scores.json").read_text()) for folder in (_folder(chain, "eval"), task.target)
    )
    for mine, theirs in zip(one["policies"], two["policies"], strict=True):
        assert mine["gold"] == theirs["gold"]
        assert mine["length"] == theirs["length"]
        assert mine["reward"] == pytest.approx(theirs["reward"], abs=1e-5)
        assert mine["kl"] == pytest.approx(theirs["kl"], abs=1e-4)
        assert mine["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-5)
        for figure in ("distinct_2", "refusal", "seq_rep_4", "win_rate", "length_controlled_win_rate"):
            assert mine[figure] == theirs[figure], figure
        assert mine["prejudice"]["details"]["gold"] == theirs["prejudice"]["details"]["gold"]
    gaps = [scores["reward_model"]["prejudice"]["reward_gap"] for scores in (one, two)]
    assert gaps[0] == pytest.approx(gaps[1], abs=1e-5)


def test_ppo_and_rs_sample_the_same_responses(group: Group, chain: Project, tmp_path: Path) -> None:
    for stage in ("rs", "ppo"):
        task = _run(group, _beside(chain, tmp_path / stage), stage, *TWO)
        mine, theirs = (
            [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
            for folder in (_folder(chain, stage), task.target)
        )
        assert [(row["prompt"], row["response"]) for row in mine] == [
            (row["prompt"], row["response"]) for row in theirs
        ]


def test_reward_of_ones_own_is_the_same_on_two_processes(
    group: Group, chain: Project, tmp_path: Path
) -> None:
    # What it gives depends on all responses of the call, so a process with a part of them would give another.
    text = (
        "def score(prompts, responses):\n    return [len(r) / len(''.join(responses)) for r in responses]\n"
    )
    (tmp_path / "mine.py").write_text(text)
    word = f"stages.ppo.reward.function={tmp_path}/mine.py:score"
    one, two = _beside(chain, tmp_path / "one"), _beside(chain, tmp_path / "two")
    alone = one.prepare("ppo", *CPU, word, "stages.ppo.reward.function_weight=30")
    run_stage(alone.work / TASK)
    both = _run(group, two, "ppo", *TWO, word, "stages.ppo.reward.function_weight=30")
    assert _largest_difference("ppo", alone.target, both.target) < 1e-5
    assert [line["reward/function"] for line in _metrics(alone.target)] == pytest.approx(
        [line["reward/function"] for line in _metrics(both.target)]
    )


def test_mistake_in_a_reward_of_ones_own_is_known_to_both_processes(
    group: Group, chain: Project, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text("def score(prompts, responses):\n    return [1 / 0]\n")
    word = f"stages.ppo.reward.function={tmp_path}/mine.py:score"
    with pytest.raises(AlignpipeError, match=r"mine\.py:2: ZeroDivisionError"):
        _run(group, _beside(chain, tmp_path), "ppo", *TWO, word)


def test_more_accumulation_gives_the_same_curve(chain: Project, tmp_path: Path) -> None:
    project = _beside(chain, tmp_path)
    task = project.prepare("sft", *CPU, "stages.sft.micro_batch_size=4")
    run_stage(task.work / TASK)
    assert _largest_difference("sft", _folder(chain, "sft"), task.target) < 1e-5


@pytest.mark.parametrize("first", [TWO, FSDP2], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("second", [CPU, TWO, FSDP2], ids=["one", "ddp", "fsdp2"])
def test_resume_on_other_processes_goes_on_in_the_same_order(
    group: Group, chain: Project, tmp_path: Path, first: list[str], second: list[str]
) -> None:
    project = _beside(chain, tmp_path)
    task = project.prepare("sft", *first, "stages.sft.save_steps=4")
    stop = task.work / "stop"
    # Asked to stop before it starts: it takes one step, saves and ends.
    stop.touch()
    with pytest.raises(Stopped):
        group.call(CASES, "run_stage", path=task.work / TASK, stop_file=stop)
    assert [path.name for path in (task.work / "states").iterdir()] == ["step-000001"]
    stop.unlink()
    other = project.compose(*second, "stages.sft.save_steps=4").config.launch
    task.launch = other
    write_task(task, task.work / TASK)
    if other.num_processes == 1:
        run_stage(task.work / TASK)
    else:
        group.call(CASES, "run_stage", path=task.work / TASK)
    assert _largest_difference("sft", _folder(chain, "sft"), task.target) < 1e-5


def _assert_same_rankings(one: Path, two: Path) -> None:
    mine, theirs = ([json.loads(line) for line in path.read_text().splitlines()] for path in (one, two))
    assert len(mine) > 10
    assert [row["prompt"] for row in mine] == [row["prompt"] for row in theirs]
    assert [row["responses"] for row in mine] == [row["responses"] for row in theirs]
    assert [row["ranks"] for row in mine] == [row["ranks"] for row in theirs]
