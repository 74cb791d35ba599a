"""What is wrong with a machine is found by the check that looks for it, and told with a mend."""

import importlib.metadata
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from alignpipe import cli, doctor
from alignpipe.doctor import Finding, examine


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Finding]]:
    """A folder, and what is found there."""
    folder = tmp_path_factory.mktemp("healthy")
    return folder, {finding.name: finding for finding in examine(folder / "not" / "yet" / "there")}


def test_this_machine_is_well_and_nothing_is_left_on_it(healthy: tuple[Path, dict[str, Finding]]) -> None:
    folder, found = healthy
    assert list(found) == ["versions", "device", "processes", "room", "disk", "locks", "hub"]
    assert not {name for name, finding in found.items() if finding.state == "bad"}, found
    assert importlib.metadata.version("torch") in found["versions"].told
    assert "two processes add a number in" in found["processes"].told
    assert str(folder) in found["room"].told and str(folder) in found["locks"].told
    assert list(folder.iterdir()) == []


def test_an_old_or_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["torch>=99", "nothing-of-this-name>=1", "rich>=1", "never>=1; extra == 'lora'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    finding = doctor._versions()
    assert finding.state == "bad" and "pip install" in finding.mend
    torch = importlib.metadata.version("torch")
    assert finding.told == (
        f"torch is {torch}, needed is torch>=99; "
        "nothing-of-this-name is not installed, needed is nothing-of-this-name>=1"
    )


def test_processes_that_do_not_meet_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_interface")
    finding = doctor._processes()
    assert finding.state == "bad" and "GLOO_SOCKET_IFNAME" in finding.mend


def test_locks_that_hold_nobody_off_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoLock:
        def __init__(self, path: Path) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(doctor, "FileLock", NoLock)
    finding = doctor._locks(tmp_path)
    assert finding.state == "bad" and "one at a time" in finding.mend


def _disk(blocks: int, inodes: int) -> Callable[[object], os.statvfs_result]:
    return lambda _: os.statvfs_result((4096, 4096, blocks, blocks, blocks, 10**6, inodes, inodes, 0, 255))


def test_little_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", _disk(10, 10**6))
    assert doctor._room(tmp_path).mend.startswith("alignpipe clean")
    monkeypatch.setattr(os, "statvfs", _disk(10**9, 3))
    assert "only 3 files more" in doctor._room(tmp_path).told


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(doctor, "_processes", lambda: Finding("processes", "ok", ""))
    (finding,) = [finding for finding in examine(tmp_path) if finding.state == "bad"]
    assert (finding.name, finding.mend) == ("disk", "choose another --output-dir")
    assert "Permission denied" in finding.told


def test_hub_that_does_not_answer_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor.constants, "ENDPOINT", "http://127.0.0.1:9")
    finding = doctor._hub()
    assert finding.state == "look" and "does not answer" in finding.told
    monkeypatch.setattr(doctor.constants, "HF_HUB_OFFLINE", True)
    assert doctor._hub().state == "ok"


def test_command_ends_with_5_where_something_is_bad(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [
        Finding("locks", "bad", "do not hold in /mnt", "run one at a time"),
        Finding("hub", "ok", "away"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda _: findings)
    monkeypatch.setattr(sys, "argv", ["alignpipe", "doctor"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 5
    printed = capsys.readouterr()
    assert "locks: run one at a time" in printed.out
    assert printed.err.startswith("error: locks: ")
