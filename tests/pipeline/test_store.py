"""The store: one maker at a time, whatever happens to it; hashes read once; damaged artifacts not found."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignpipe.artifact import Manifest, seal, sha256_file, write_json
from alignpipe.pipeline.store import FileHashes, Store

HOLD = (
    "import sys; from pathlib import Path; from alignpipe.pipeline.store import Store\n"
    "with Store(Path(sys.argv[1])).lock('sft', '0', print):\n"
    "    print('held', flush=True); sys.stdin.read()"
)


class _GiveUp(Exception):
    pass


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of sft-0."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=pipe, stdout=pipe, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "held"
        yield process
        process.kill()


def test_lock_keeps_a_second_process_out_and_says_who_holds_it(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    store, told = Store(tmp_path), []

    def waiting(who: str) -> None:
        told.append(who)
        raise _GiveUp

    assert store.is_locked("sft", "0")
    assert not store.is_locked("sft", "1")
    with pytest.raises(_GiveUp), store.lock("sft", "0", waiting):
        pytest.fail("two processes hold one lock")
    assert f"process {holder.pid} on " in told[0]
    with store.lock("sft", "1", waiting):
        assert store.is_locked("sft", "1")


def test_lock_is_freed_when_its_holder_is_killed(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    store = Store(tmp_path)

    def waiting(_who: str) -> None:
        holder.kill()

    with store.lock("sft", "0", waiting):
        assert holder.wait() == -9
    assert not store.is_locked("sft", "0")


def test_lock_is_freed_after_an_error(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(_GiveUp), store.lock("sft", "0", print):
        raise _GiveUp
    assert not store.is_locked("sft", "0")


def test_file_is_read_again_only_when_size_or_time_changed(tmp_path: Path) -> None:
    path, memory = tmp_path / "rows", tmp_path / "work" / "hashes.json"
    path.write_bytes(b"abc")
    os.utime(path, ns=(5, 5))
    hashes = FileHashes(memory)
    first = hashes(path)
    assert first == sha256_file(path)
    hashes.save()
    # Other bytes under the same size and time are not looked at: this is how not reading shows.
    path.write_bytes(b"abd")
    os.utime(path, ns=(5, 5))
    assert FileHashes(memory)(path) == first
    os.utime(path, ns=(6, 6))
    assert FileHashes(memory)(path) == sha256_file(path) != first
    path.write_bytes(b"abcd")
    os.utime(path, ns=(5, 5))
    assert FileHashes(memory)(path) == sha256_file(path)


def test_torn_memory_of_hashes_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "hashes.json").write_text('{"half')
    (tmp_path / "rows").write_bytes(b"abc")
    assert FileHashes(tmp_path / "hashes.json")(tmp_path / "rows") == sha256_file(tmp_path / "rows")


def test_damaged_artifact_is_not_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = store.stage("sft", "0")
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"12345678")
    assert store.find("sft", "0") is None
    seal(folder, Manifest("sft", "0"))
    assert store.find("sft", "0") is not None
    (folder / "weights").write_bytes(b"1234567")
    assert store.find("sft", "0") is None
    moved = store.clear("sft", "0")
    assert moved is not None and (moved / "weights").read_bytes() == b"1234567"
    assert store.clear("sft", "0") is None


def test_runs_are_listed_newest_first(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name, when in (("b", 3), ("c", 1), ("a", 2)):
        store.run(name).mkdir(parents=True)
        write_json(store.run(name) / "run.json", {"stages": []})
        os.utime(store.run(name) / "run.json", ns=(when, when))
    (tmp_path / "runs" / "empty").mkdir()
    assert [folder.name for folder in store.runs()] == ["b", "a", "c"]
