"""Whatever is changed in what was written, it is found by its hash before it is used."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.optim import AdamW
from transformers import PreTrainedModel

from alignpipe.artifact import MANIFEST, verify
from alignpipe.errors import CheckpointError
from alignpipe.pipeline.plan import make_plan
from alignpipe.pipeline.store import Store
from alignpipe.training.checkpoint import load_newest_state, save_state
from tests.faults.commands import finish, start
from tests.faults.stopping import SFT, before_save, content, die, states, weights
from tests.faults.table import Faults
from tests.project import SMALL, Project

# Every stage reads the one before it, so that what a run reuses is handed over.
CHAIN = ("pipeline.order=[sft,collect,rm]",)
BLOCK = 64


def _corrupt(folder: Path, older: Path, draw: random.Random) -> Path:
    """Change a file of a folder at random; which."""
    victim = draw.choice(
        [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    )
    before = victim.read_bytes()
    how = draw.choice([_flip, _cut, _zero, _swap, _delete])
    how(victim, older, draw)
    if victim.is_file() and victim.read_bytes() == before:
        return _corrupt(folder, older, draw)
    return victim


def _flip(victim: Path, _older: Path, draw: random.Random) -> None:
    content = bytearray(victim.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    victim.write_bytes(content)


def _cut(victim: Path, _older: Path, draw: random.Random) -> None:
    content = victim.read_bytes()
    victim.write_bytes(content[: draw.randrange(len(content))])


def _zero(victim: Path, _older: Path, draw: random.Random) -> None:
    content = bytearray(victim.read_bytes())
    start = draw.randrange(len(content))
    end = min(start + BLOCK, len(content))
    content[start:end] = bytes(end - start)
    victim.write_bytes(content)


def _swap(victim: Path, older: Path, draw: random.Random) -> None:
    """Exchange a file with another of its folder, or with the same one of the folder before."""
    choices = [path for path in victim.parent.iterdir() if path.is_file() and path != victim]
    other = draw.choice([*choices, *([older / victim.name] if (older / victim.name).is_file() else [])])
    mine, theirs = victim.read_bytes(), other.read_bytes()
    victim.write_bytes(theirs)
    if other.parent == victim.parent:
        other.write_bytes(mine)


def _delete(victim: Path, _older: Path, _draw: random.Random) -> None:
    victim.unlink()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of the stage, never disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(folder, "run", *SFT).process.exitcode == 0
    return weights(folder)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose stage was killed with two states saved."""
    folder = tmp_path_factory.mktemp("killed")
    start(folder, "run", *SFT, before=before_save, given=(3, die)).process.join(60)
    assert sorted(path.name for path in states(folder).glob("step-*")) == ["step-000002", "step-000004"]
    return folder


def test_damaged_state_is_named_and_the_one_before_is_used(
    tmp_path: Path,
    make_llama: Callable[..., PreTrainedModel],
    count: Callable[[int, int], int],
    faults: Faults,
) -> None:
    model, kept = make_llama(num_hidden_layers=1), tmp_path / "kept"
    optimizer = AdamW(model.parameters())
    before: list[torch.Tensor] = []
    for step in (2, 4):
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()
        save_state(kept, step, {"model": model}, {"model": optimizer}, {"step": step})
        before = before or [parameter.clone() for parameter in model.parameters()]
    draw, total, found = random.Random(0), count(60, 1000), 0
    for number in range(total):
        damaged, told = tmp_path / str(number), list[str]()
        shutil.copytree(kept, damaged)
        newest = damaged / "step-000004"
        victim = _corrupt(newest, damaged / "step-000002", draw)
        content = victim.read_bytes() if victim.is_file() else None
        values = load_newest_state(damaged, {"model": model}, {"model": optimizer}, tell=told.append)
        aside = damaged / "corrupt-step-000004" / victim.name
        found += (
            values == {"step": 2}
            and all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
            and len(told) == 1
            and str(newest) in told[0]
            and "goes on from step-000002" in told[0]
            and (aside.read_bytes() if aside.is_file() else None) == content
        )
        shutil.rmtree(damaged)
    faults.tell("newest state corrupted: found, named, the one before is used", found, total)


def test_run_goes_on_from_the_state_before_to_the_same_weights(
    tmp_path: Path, killed: Path, whole: str, count: Callable[[int, int], int], faults: Faults
) -> None:
    draw, total, same = random.Random(1), count(1, 40), 0
    for number in range(total):
        folder = tmp_path / str(number)
        shutil.copytree(killed, folder, symlinks=True)
        newest = states(folder) / "step-000004"
        victim = _corrupt(newest, newest.with_name("step-000002"), draw)
        command = finish(folder, "run", *SFT)
        named = f"warning: sft: {newest}" in command.told and "goes on from step-000002" in command.told
        same += command.process.exitcode == 0 and named and weights(folder) == whole
        assert victim.parent == newest
    faults.tell("newest state corrupted: same weights at the end", same, total)


def test_both_states_damaged_end_the_run_and_nothing_is_deleted(
    tmp_path: Path, killed: Path, count: Callable[[int, int], int], faults: Faults
) -> None:
    draw, total, kept = random.Random(2), count(1, 20), 0
    for number in range(total):
        folder = tmp_path / str(number)
        shutil.copytree(killed, folder, symlinks=True)
        newer, older = states(folder) / "step-000004", states(folder) / "step-000002"
        _corrupt(newer, older, draw)
        _corrupt(older, tmp_path, draw)
        before = content(states(folder))
        command = finish(folder, "run", *SFT)
        line = command.told.splitlines()[-1]
        told = line.partition(f"error: {newer.parent}: no state is whole, ")[2]
        named = newer.name in told and older.name in told
        kept += command.process.exitcode == 4 and named and content(states(folder)) == before
    faults.tell("both states corrupted: exit 4, nothing deleted", kept, total)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished chain."""
    project = Project(tmp_path_factory.mktemp("chain") / "outputs")
    project.run(*CHAIN)
    return project


def test_damage_in_a_finished_stage_is_found_before_it_is_read(
    tmp_path: Path, chain: Project, count: Callable[[int, int], int], faults: Faults
) -> None:
    draw, total, found = random.Random(3), count(40, 300), 0
    for number in range(total):
        copied = Project(tmp_path / str(number) / "outputs")
        shutil.copytree(chain.outputs, copied.outputs, symlinks=True)
        name = draw.choice(["sft", "collect", "rm"])
        (folder,) = (copied.outputs / "stages").glob(f"{name}-*")
        victim = _corrupt(folder, tmp_path, draw)
        found += _is_found(copied, name, victim)
        shutil.rmtree(copied.outputs)
    faults.tell("finished stage corrupted: found at hand-over", found, total)


def _is_found(project: Project, name: str, victim: Path) -> bool:
    """Whether a run would make the stage again, or whoever reads it would end with its folder named."""
    try:
        plan = make_plan(project.compose(*CHAIN).config)
        if name not in plan.reused:
            return True
        node = plan.graph.nodes[name]
        verify(Store(project.outputs).stage(node.kind, node.key))
    except CheckpointError as error:
        return str(victim.parent) in str(error)
    return False


@pytest.mark.parametrize("name", ["model.safetensors", MANIFEST])
def test_run_that_is_handed_a_damaged_stage_ends_with_the_file_named(
    tmp_path: Path, chain: Project, faults: Faults, name: str
) -> None:
    shutil.copytree(chain.outputs, tmp_path / "outputs", symlinks=True)
    (folder,) = (tmp_path / "outputs" / "stages").glob("sft-*")
    _flip(folder / name, folder, random.Random(4))
    before = content(tmp_path / "outputs" / "stages")
    words = ("run", *SMALL, *CHAIN, "stages.rm.seed=5", "stages.collect.seed=5")
    command = finish(tmp_path, *words)
    line = command.told.splitlines()[-1]
    assert f"error: {folder / name}: " in line, command.told
    assert content(tmp_path / "outputs" / "stages") == before
    faults.tell("finished stage corrupted: the run that reads it exits 4", command.process.exitcode == 4, 1)
