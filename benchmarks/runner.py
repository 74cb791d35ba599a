"""Runs cases: every side in fresh processes that take turns, so that a slow moment meets all of them; no torch here.

cases -> workload of each size -> pairs of processes -> results -> table and JSON
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from alignpipe.data.template import NAMED
from benchmarks.case import CPU_SIZES, SIZES, Case, Job, Measured, Side
from benchmarks.table import HEAD, Result, line

ROOT = Path(__file__).parents[1]
# What a person may shorten a run to; the losses are still compared.
QUICK_PAIRS = 2


class SideFailed(Exception):
    """A process ended with an error; the message is its last line."""


@dataclass(frozen=True)
class Options:
    """How long and on what.

    Attributes:
        pairs: processes of each side.
        repetitions: timed ones in a process.
        threads: of torch.
        rows: of one repetition, as many pairs of half of them; None as the size says.
        data: folder of public data; None for the embedded world.
        template: of the rows: alpaca or plain.
        first_peer: leave out all settings of a peer but the first.
    """

    pairs: int = 5
    repetitions: int = 2
    threads: int = 2
    rows: int | None = None
    data: Path | None = None
    template: str = "alpaca"
    first_peer: bool = False


def compare(case: Case, size: str, workload: Path, options: Options) -> Result:
    """Let our side and the peers take turns.

    Raises:
        SideFailed: one of them ended with an error.
    """
    peers = case.peers[:1] if options.first_peer else case.peers
    sides = [case.ours, *peers]
    found: dict[str, list[Measured]] = {side.label: [] for side in sides}
    for pair in range(options.pairs):
        # Who comes second finds a warmer machine.
        for side in sides if pair % 2 == 0 else sides[::-1]:
            found[side.label].append(measure(case, side, size, workload, options))
    ours = found.pop(case.ours.label)
    return Result(case, size, ours, found)


def measure(case: Case, side: Side, size: str, workload: Path, options: Options) -> Measured:
    """One side once, in a process of its own.

    Raises:
        SideFailed: it ended with an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        settings = {**case.settings, **side.settings}
        job = Job(
            side.function,
            workload,
            scratch / "work",
            size,
            options.repetitions,
            options.threads,
            settings,
            case.device,
            case.precision,
        )
        job.scratch.mkdir()
        (scratch / "job.json").write_text(json.dumps(asdict(job), default=str))
        names = [str(scratch / name) for name in ("job.json", "result.json")]
        call([sys.executable, "-m", "benchmarks.process", *names], options.threads, side.path)
        return Measured(**json.loads((scratch / "result.json").read_text()))


def build(folder: Path, size: str, options: Options) -> Path:
    """The workload of a size, made in a process of its own."""
    words = ["--size", size, *(["--rows", str(options.rows)] if options.rows else [])]
    words += ["--data", str(options.data.resolve())] if options.data else []
    words += ["--template", options.template]
    call([sys.executable, "-m", "benchmarks.workload", str(folder / size), *words], options.threads)
    return folder / size


def call(line: Sequence[str], threads: int, path: str = "") -> None:
    """Run a process of the benchmark.

    Args:
        line: the command.
        threads: of OpenMP.
        path: folder below `peers` of the environment that is imported from first.

    Raises:
        SideFailed: it ended with an error.
    """
    first = [str(Path(sys.prefix) / "peers" / path)] if path else []
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*first, str(ROOT)]),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SideFailed((done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1])


def run(cases: Sequence[Case], sizes: Sequence[str], options: Options, out: Path) -> int:
    """Compare, print a table line by line, write the results; 1 where a case failed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {name: version(name) for name in ("torch", "transformers", "trl")}
    print(f"{date.today()}, {cores} cores, {options.threads} threads, {versions}")
    print(f"{options.pairs} pairs, {options.repetitions} timed repetitions in each process\n\n{HEAD}")
    results: list[dict[str, Any]] = []
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            workload = build(Path(folder), size, options)
            for case in cases:
                try:
                    result = compare(case, size, workload, options)
                except SideFailed as error:
                    print(f"| {case.name} | {size} | failed: {error} |", flush=True)
                    failed = True
                    continue
                print(line(result), flush=True)
                failed = failed or not result.losses_agree
                results.append(result.as_json())
    out.parent.mkdir(parents=True, exist_ok=True)
    told = {"date": str(date.today()), "cores": cores, "versions": versions, **asdict(options)}
    out.write_text(json.dumps({**told, "results": results}, indent=1, default=str))
    print(f"\n{out}")
    return int(failed)


def main(cases: Sequence[Case], argv: Sequence[str] | None = None, known: Sequence[str] = CPU_SIZES) -> int:
    """The command line that every script of a case has.

    Args:
        cases: of the script.
        argv: in place of what the process was given.
        known: names of the sizes that the cases are for.
    """
    parser = argparse.ArgumentParser(description="Ours against the peers, side by side.")
    parser.add_argument("words", nargs="*", help="cases whose name holds one of them; all without")
    parser.add_argument("--sizes", nargs="+", choices=known, default=list(known))
    parser.add_argument("--pairs", type=int, default=Options.pairs)
    parser.add_argument("--repetitions", type=int, default=Options.repetitions)
    parser.add_argument("--threads", type=int, default=Options.threads)
    parser.add_argument("--rows", type=int, help="of one repetition, whole steps; half as many pairs")
    parser.add_argument("--data", type=Path, help="holds gsm8k_train.jsonl and hh_harmless_pairs.jsonl")
    parser.add_argument("--template", choices=NAMED, default=Options.template, help="of the rows")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks.json"))
    parser.add_argument(
        "--quick", action="store_true", help="the smallest model, few rows, one setting of a peer"
    )
    given = parser.parse_args(argv)
    options = Options(given.pairs, given.repetitions, given.threads, given.rows, given.data, given.template)
    sizes = given.sizes
    if given.quick:
        options = replace(
            options, pairs=QUICK_PAIRS, repetitions=1, rows=SIZES[known[0]].quick_rows, first_peer=True
        )
        sizes = known[:1]
    chosen = [case for case in cases if not given.words or any(word in case.name for word in given.words)]
    return run(chosen, sizes, options, given.out)
