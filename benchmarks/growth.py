"""How the cost of sft grows with the rows: `python -m benchmarks.growth [--rows N ...] [--start N]`.

The same number of steps over files of 1k to 64k rows: time a token and memory must stay what they are. And a file of
a million rows, of which the first step must be over within a minute of the command, where rows too long are cut: which
of them would be dropped is known only when all have been encoded.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median

from benchmarks.case import Case, Job, Measured, Side
from benchmarks.runner import Options, build, measure
from benchmarks.workload import DEMONSTRATIONS

SIZE, BATCH = "S", 8
WARM_UP, STEPS = 10, 40
# Rows that the files repeat.
NUM_DISTINCT = 512
MAX_GROWTH, MAX_START = 1.10, 60.0
HEAD = "| rows | start s | microseconds a token | peak MB |\n| --- | --- | --- | --- |"
OURS = Side("alignpipe", "benchmarks.growth:train")


@dataclass(frozen=True)
class Cost:
    """Of one run.

    Attributes:
        start: seconds from the start of the process to the end of the first step.
        token: seconds a token of the later steps.
        peak: bytes resident at the most.
    """

    start: float
    token: float
    peak: int


def train(job: Job) -> Measured:
    """So many steps of the stage; the two `seconds` are the start and the cost of a token."""
    from benchmarks.ours import figures, run_stage

    clock, context = run_stage(
        job,
        "sft",
        job.settings["file"],
        *job.settings["words"],
        f"stage.max_steps={STEPS}",
        "stage.epochs=1000",
        f"stage.batch_size={BATCH}",
        f"stage.micro_batch_size={BATCH}",
        "stage.eval_rows=0",
        "stage.num_samples=0",
    )
    start = time.time() - job.settings["began"] - (time.perf_counter() - clock.marks[1])
    rates = [line["tokens_per_second"] for line in figures(context) if "tokens_per_second" in line]
    return Measured([start, median(1 / rate for rate in rates[WARM_UP:])], [], clock.peak)


def write_rows(workload: Path, count: int) -> str:
    """A file of so many rows, each with a prompt of its own; its name below the workload."""
    source = (workload / DEMONSTRATIONS).read_text().splitlines()
    name = f"rows-{count}.jsonl"
    with (workload / name).open("w", encoding="utf-8") as file:
        for index, row in enumerate(islice(cycle(map(json.loads, source)), count)):
            file.write(json.dumps(row | {"prompt": f"{row['prompt']} ({index})"}) + "\n")
    return name


def run(workload: Path, count: int, options: Options, *words: str) -> Cost:
    """Train on a file of so many rows, in a process of its own; words are of the command line."""
    name = write_rows(workload, count)
    case = Case("growth", OURS, (), {}, 6, {"file": name, "began": time.time(), "words": words})
    found = measure(case, OURS, SIZE, workload, options)
    (workload / name).unlink()
    start, token = found.seconds
    return Cost(start, token, found.peak)


def verdicts(costs: Mapping[int, Sequence[Cost]]) -> list[str]:
    """Whether the most is near the least."""
    lines = []
    for name, attribute in (("time a token", "token"), ("peak memory", "peak")):
        medians = [median(getattr(cost, attribute) for cost in found) for found in costs.values()]
        growth = max(medians) / min(medians)
        told = "met" if growth <= MAX_GROWTH else "no"
        lines.append(f"{name}: the most is {growth:.2f} of the least, at most {MAX_GROWTH:.2f}: {told}")
    return lines


def line(rows: int, costs: Sequence[Cost]) -> str:
    """A line of the table."""
    start, token, peak = (
        median(getattr(cost, name) for cost in costs) for name in ("start", "token", "peak")
    )
    return f"| {rows:,} | {start:.1f} | {token * 1e6:.0f} | {peak / 1e6:,.0f} |"


def main() -> int:
    """Run the sizes in turn, then the large file once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", type=int, default=[1000, 4000, 16000, 64000])
    parser.add_argument("--start", type=int, default=1_000_000, help="rows of the large file; 0 for none")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each size")
    parser.add_argument("--data", type=Path)
    given = parser.parse_args()
    options = Options(repetitions=1, rows=NUM_DISTINCT, data=given.data, template="plain")
    costs: dict[int, list[Cost]] = {rows: [] for rows in given.rows}
    with tempfile.TemporaryDirectory() as folder:
        workload = build(Path(folder), SIZE, options)
        for _ in range(given.pairs):
            for rows, found in costs.items():
                found.append(run(workload, rows, options))
        print(HEAD)
        for rows, found in costs.items():
            print(line(rows, found))
        if given.start:
            large = run(workload, given.start, options, "data.on_overflow=cut")
            print(line(given.start, [large]))
    print("\n" + "\n".join(verdicts(costs)))
    if given.start:
        told = "met" if large.start <= MAX_START else "no"
        print(f"start on {given.start:,} rows: {large.start:.0f} s, at most {MAX_START:.0f}: {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
