"""What this machine gives a run: versions, devices, processes that reach each other, disk, locks, the hub.

Each check -> a finding, and where it is not well, the mend
"""

import importlib.metadata
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Literal

import psutil
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from huggingface_hub import constants, get_session
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignpipe.config import LaunchConfig
from alignpipe.disk import existing, format_bytes
from alignpipe.pipeline.launch import environment

State = Literal["ok", "look", "bad"]
# What is written to time a disk.
PROBE_BYTES = 64 * 2**20
# Below these a state of a small model does not fit.
FEW_BYTES, FEW_INODES = 2 * 10**9, 1000
# Seconds until what does not answer counts as away.
PATIENCE = 60.0
HUB_PATIENCE = 5.0


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: of what was looked at.
        state: `look` where a run may go on, but a person should know.
        told: in a few words.
        mend: what to do; empty where all is well.
    """

    name: str
    state: State
    told: str
    mend: str = ""


def examine(output_dir: Path) -> list[Finding]:
    """Try everything that a run needs of the machine.

    Args:
        output_dir: on whose disk runs are to be; it need not exist.
    """
    folder = existing(output_dir)
    checks: dict[str, Callable[[], Finding]] = {
        "versions": _versions,
        "device": _device,
        "processes": _processes,
        "room": lambda: _room(folder),
        "disk": lambda: _disk(folder),
        "locks": lambda: _locks(folder),
        "hub": _hub,
    }
    found = []
    for name, check in checks.items():
        try:
            found.append(check())
        except OSError as error:
            found.append(Finding(name, "bad", f"{folder}: {error.strerror}", "choose another --output-dir"))
    return found


def print_findings(found: list[Finding], console: Console) -> None:
    """Show them as a table, and the mends below it."""
    table = Table(box=None, pad_edge=False)
    for title in ("", "", "found"):
        table.add_column(title, overflow="fold")
    for finding in found:
        table.add_row(*(Text(cell) for cell in (finding.name, finding.state, finding.told)))
    console.print(table)
    for finding in found:
        if finding.mend:
            console.print(Text(f"{finding.name}: {finding.mend}"), soft_wrap=True)


def _versions() -> Finding:
    """Installed packages against what pyproject.toml asks for."""
    asked = [Requirement(line) for line in importlib.metadata.requires("alignpipe") or []]
    needed = [item for item in asked if item.marker is None or item.marker.evaluate({"extra": ""})]
    wrong = [told for item in needed if (told := _wrong(item)) is not None]
    names = ("torch", "transformers", "accelerate")
    told = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    told = f"Python {sys.version.split()[0]}, {told}"
    if not wrong:
        return Finding("versions", "ok", told)
    return Finding("versions", "bad", "; ".join(wrong), "pip install --upgrade alignpipe installs what fits")


def _wrong(asked: Requirement) -> str | None:
    try:
        version = importlib.metadata.version(asked.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{asked.name} is not installed, needed is {asked.name}{asked.specifier}"
    if asked.specifier.contains(version, prereleases=True):
        return None
    return f"{asked.name} is {version}, needed is {asked.name}{asked.specifier}"


def _device() -> Finding:
    memory = format_bytes(psutil.virtual_memory().total)
    cpu = f"{psutil.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {memory}"
    if not torch.cuda.is_available():
        which = "MPS, " if torch.backends.mps.is_available() else "no GPU, "
        return Finding("device", "ok", which + cpu)
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    told = ", ".join(f"{gpu.name} {format_bytes(gpu.total_memory)}" for gpu in gpus)
    return Finding("device", "ok", f"{told}; {cpu}")


def _processes() -> Finding:
    """Whether two processes on this machine reach each other as those of `launch=ddp` do."""
    new = get_context("spawn")
    answers: Queue[float] = new.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    pair = [new.Process(target=_meet, args=(rank, address, answers), daemon=True) for rank in range(2)]
    own = dict(os.environ)
    os.environ |= environment(LaunchConfig(num_machines=1, timeout=PATIENCE), len(pair))
    for process in pair:
        process.start()
    for name in os.environ.keys() - own.keys():
        del os.environ[name]
    for process in pair:
        process.join(PATIENCE)
    met = all(process.exitcode == 0 for process in pair)
    for process in pair:
        process.kill()
    if not met:
        mend = "name the network interface that both use in GLOO_SOCKET_IFNAME, such as lo"
        return Finding("processes", "bad", "two processes do not reach each other", mend)
    return Finding("processes", "ok", f"two processes add a number in {answers.get() * 1000:.1f} ms")


def _meet(rank: int, address: str, answers: "Queue[float]") -> None:
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE / 2)
    )
    one = torch.ones(1)
    dist.all_reduce(one)
    began = time.perf_counter()
    dist.all_reduce(one)
    if rank == 0:
        answers.put(time.perf_counter() - began)
    dist.destroy_process_group()
    assert one.item() == 4


def _room(folder: Path) -> Finding:
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    told = f"{format_bytes(free)} free in {folder}"
    if free < FEW_BYTES:
        mend = "alignpipe clean says what no run needs, alignpipe plan how much one does"
        return Finding("room", "look", told, mend)
    if disk.f_files and disk.f_favail < FEW_INODES:
        return Finding("room", "look", f"{told}, but only {disk.f_favail} files more", "remove some files")
    return Finding("room", "ok", told)


def _disk(folder: Path) -> Finding:
    block = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(PROBE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        rate = PROBE_BYTES / (time.perf_counter() - began)
    return Finding("disk", "ok", f"writes {format_bytes(rate)} a second, down to the disk")


def _locks(folder: Path) -> Finding:
    """Whether a lock that this process holds is seen by another one."""
    new = get_context("spawn")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as temporary:
        path = Path(temporary, "lock")
        with FileLock(path):
            other = new.Process(target=_try_lock, args=(path,), daemon=True)
            other.start()
            other.join(PATIENCE)
    if other.exitcode == 0:
        return Finding("locks", "ok", f"hold in {folder}")
    mend = (
        "two runs at once would write the same stage there: run one at a time, or choose another --output-dir"
    )
    return Finding("locks", "bad", f"do not hold in {folder}", mend)


def _try_lock(path: Path) -> None:
    try:
        FileLock(path).acquire(timeout=0)
    except Timeout:
        sys.exit(0)
    sys.exit(1)


def _hub() -> Finding:
    if constants.HF_HUB_OFFLINE:
        return Finding(
            "hub", "ok", "not asked: HF_HUB_OFFLINE is set, folders and what is cached can be used"
        )
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_PATIENCE)
    except Exception as error:
        told = f"{constants.ENDPOINT} does not answer ({type(error).__name__})"
        return Finding(
            "hub", "look", told, "models and data from folders work; HF_HUB_OFFLINE=1 saves the waiting"
        )
    return Finding("hub", "ok", f"{constants.ENDPOINT} answers")
