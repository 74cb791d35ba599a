"""What no run points to is found, whatever a run still needs is kept, and nothing goes away unasked."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from alignpipe import cli
from alignpipe.errors import MachineError
from alignpipe.pipeline.clean import clean, leftovers
from alignpipe.pipeline.store import LOCK
from tests.project import PPO_ALONE, Project


def _names(project: Project) -> set[str]:
    return {one.path.relative_to(project.outputs).as_posix() for one in leftovers(project.outputs)}


def _tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def _stages(project: Project) -> set[str]:
    return {path.name for path in (project.outputs / "stages").iterdir()}


def test_nothing_of_a_run_is_left_over(finished: Project) -> None:
    assert not [name for name in _names(finished) if not name.startswith("rows/")]


def test_stages_of_a_run_that_was_removed_are_found_and_those_that_another_shares_kept(
    copied: Project,
) -> None:
    before, first = _stages(copied), (copied.outputs / "latest").read_text().strip()
    run = copied.run("stages.ppo.kl_coef=0.3")
    own = _stages(copied) - before
    assert {name.partition("-")[0] for name in own} == {"ppo", "eval"}
    shutil.rmtree(run)
    assert {name for name in _names(copied) if not name.startswith("rows/")} == {
        f"stages/{name}" for name in own
    }
    clean(leftovers(copied.outputs))
    assert _stages(copied) == before
    assert set(copied.states(first).values()) <= {"done", "reused"}


def test_what_a_stage_was_made_from_is_kept(copied: Project) -> None:
    chain = copied.outputs / "runs" / (copied.outputs / "latest").read_text().strip()
    copied.run(*PPO_ALONE)
    shutil.rmtree(chain)
    kept = {name.partition("-")[0] for name in _stages(copied) - {path.name for path in _found(copied)}}
    # rm was made from what collect sampled; rs, the chain's own ppo and eval are behind nothing.
    assert kept == {"ppo", "sft", "rm", "collect"}
    assert len([path for path in _found(copied) if path.name.startswith("ppo-")]) == 1


def _found(project: Project) -> list[Path]:
    return [one.path for one in leftovers(project.outputs)]


def test_a_stage_under_way_is_kept_while_a_run_names_it_or_somebody_makes_it(copied: Project) -> None:
    work = copied.outputs / "work"
    (run,) = (copied.outputs / "runs").glob("*/run.json")
    key = next(stage["key"] for stage in json.loads(run.read_text())["stages"] if stage["kind"] == "ppo")
    for name in (f"ppo-{key}", "ppo-0123456789abcdef", "rm-0123456789abcdef", "replay-dead"):
        (work / name / "states").mkdir(parents=True)
    with FileLock(work / f"rm-0123456789abcdef.{LOCK}"):
        found = _names(copied)
    assert {name for name in found if name.startswith("work/")} == {
        "work/ppo-0123456789abcdef",
        "work/replay-dead",
    }
    assert "work/rm-0123456789abcdef" in _names(copied)


def test_rows_can_be_made_again_but_not_while_they_may_be_read(copied: Project) -> None:
    (copied.outputs / "rows" / "0123").mkdir(parents=True)
    (copied.outputs / "rows" / "0123" / "rows.jsonl").write_bytes(b"x" * 1000)
    (copied.outputs / "work").mkdir(exist_ok=True)
    with FileLock(copied.outputs / "work" / f"sft-0.{LOCK}"):
        assert not any(path.parent.name == "rows" for path in _found(copied))
    (one,) = [one for one in leftovers(copied.outputs) if one.path.name == "0123"]
    assert (one.bytes, one.why) == (1000, "can be made again")


def test_command_removes_only_when_told(
    copied: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied.outputs / "stages" / "sft-dead.replaced-1").mkdir()
    before = _tree(copied.outputs)
    for words in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["alignpipe", "clean", "-o", str(copied.outputs), *words])
        with pytest.raises(SystemExit):
            cli.main()
        printed = capsys.readouterr().out
        assert _tree(copied.outputs) == before
        assert "sft-dead.replaced-1" in printed
    assert "moved aside" in {one["why"] for one in json.loads(printed)}
    monkeypatch.setattr(sys, "argv", ["alignpipe", "clean", "-o", str(copied.outputs), "--yes"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "removed" in capsys.readouterr().out
    assert not (copied.outputs / "stages" / "sft-dead.replaced-1").exists()
    assert leftovers(copied.outputs) == []


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="no such folder"):
        leftovers(tmp_path / "outputs")
