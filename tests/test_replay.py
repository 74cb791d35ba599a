"""A finished stage is done again to a step: what held is told, and what does not hold is found."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from alignpipe.artifact import Manifest, read_manifest, seal
from alignpipe.errors import CheckpointError, ConfigError
from alignpipe.replay import Replay, check_promise, replay
from alignpipe.training.metrics import METRICS
from tests.project import Project

QUIET = Console(quiet=True)


def _replay(project: Project, stage: str | None, steps: int = 2) -> list[Replay]:
    return replay(project.outputs, None, stage, steps, QUIET)


def _stage(project: Project, stage: str) -> tuple[Path, Manifest]:
    (folder,) = (project.outputs / "stages").glob(f"{stage}-*")
    manifest = read_manifest(folder)
    assert manifest is not None
    return folder, manifest


def _forge(project: Project, stage: str, name: str, change: float) -> None:
    """Change a recorded figure of every step, and the hash with it, as if the stage had computed that."""
    folder, manifest = _stage(project, stage)
    path = folder / METRICS
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    changed = [row | {name: row[name] + change} if name in row else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    seal(folder, manifest)


def _remember(project: Project, stage: str, **versions: str) -> None:
    folder, manifest = _stage(project, stage)
    manifest.versions |= versions
    seal(folder, manifest)


def test_every_stage_with_steps_is_bit_identical_and_nothing_is_left_behind(copied: Project) -> None:
    before = {path for path in copied.outputs.rglob("*") if "rows" not in path.parts}
    found = _replay(copied, None)
    assert [one.stage for one in found] == ["sft", "rm", "rs", "ppo"]
    assert [one.promise for one in found] == ["bit-identical"] * 4
    assert [one.changed for one in found] == [[]] * 4
    assert all(one.steps is not None and one.steps >= 1 for one in found)
    check_promise(found)
    after = {path for path in copied.outputs.rglob("*") if "rows" not in path.parts}
    assert after - before <= {copied.outputs / "work"}


def test_a_stage_without_steps_is_done_whole(copied: Project) -> None:
    (one,) = _replay(copied, "collect")
    assert (one.steps, one.promise) == (None, "bit-identical")


def test_a_stage_that_ends_before_the_step_is_compared_by_its_files(copied: Project) -> None:
    (one,) = _replay(copied, "rm", steps=10_000)
    assert one.promise == "bit-identical"
    folder, manifest = _stage(copied, "rm")
    (folder / "README.md").write_text("another")
    seal(folder, manifest)
    (one,) = _replay(copied, "rm", steps=10_000)
    assert (one.promise, one.where) == ("differs", "README.md")
    with pytest.raises(CheckpointError, match=r"rm: README.md differs"):
        check_promise([one])


def test_another_figure_is_found_and_named(copied: Project) -> None:
    _forge(copied, "sft", "loss", 1e-3)
    (one,) = _replay(copied, "sft")
    assert one.promise == "differs"
    assert one.where.startswith("loss of step ")
    with pytest.raises(CheckpointError, match=r"sft: loss of step \d+ differs by 0.00017"):
        check_promise([one])


def test_a_small_difference_is_let_pass_only_where_something_has_changed(copied: Project) -> None:
    _forge(copied, "sft", "loss", 1e-7)
    (one,) = _replay(copied, "sft")
    assert one.promise == "within 1e-05"
    with pytest.raises(CheckpointError, match="loss of step"):
        check_promise([one])
    _remember(copied, "sft", threads="64", torch="2.10.0")
    (one,) = _replay(copied, "sft")
    now = torch.__version__
    assert one.changed == [f"torch 2.10.0 -> {now}", f"threads 64 -> {torch.get_num_threads()}"]
    check_promise([one])


def test_damage_is_found_before_anything_is_done_again(copied: Project) -> None:
    (folder,) = (copied.outputs / "stages").glob("sft-*")
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="its content changed"):
        _replay(copied, "ppo")


def test_unknown_stage_gets_the_nearest(copied: Project) -> None:
    with pytest.raises(ConfigError, match="Did you mean ppo"):
        _replay(copied, "pppo")


def test_settings_that_make_another_stage_now_are_told(copied: Project, tmp_path: Path) -> None:
    run = copied.outputs / "runs" / (copied.outputs / "latest").read_text().strip()
    config = run / "config.yaml"
    shutil.copy(config, tmp_path / "kept.yaml")
    config.write_text(config.read_text().replace("num_prompts: 240", "num_prompts: 241"))
    with pytest.raises(CheckpointError, match="makes another sft now"):
        _replay(copied, "sft")
