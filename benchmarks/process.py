"""One side of a case in a process of its own: `python -m benchmarks.process JOB.json RESULT.json`."""

import json
import sys
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from benchmarks.case import SEED, SIZES, Job, Measured, Size

# Rows of the matrices that are multiplied to learn the machine's rate, and for how long.
PROBE_ROWS, PROBE_SECONDS = 2048, 0.5


def matrix_rate(size: Size) -> float:
    """Floating point operations a second of float32 products at the sizes of the model's feed-forward blocks."""
    import torch

    left, right = torch.randn(PROBE_ROWS, size.hidden), torch.randn(size.hidden, size.intermediate)
    back = torch.randn(size.intermediate, size.hidden)
    torch.mm(torch.mm(left, right), back)
    began, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < PROBE_SECONDS or not done:
        torch.mm(torch.mm(left, right), back)
        done += 1
    return done * 4 * PROBE_ROWS * size.hidden * size.intermediate / passed


def run(job: Job) -> Measured:
    """Call the function of a job between two probes of the machine."""
    import torch

    torch.set_num_threads(job.threads)
    torch.manual_seed(SEED)
    module, _, name = job.function.partition(":")
    function = getattr(import_module(module), name)
    before = matrix_rate(SIZES[job.size])
    found: Measured = function(job)
    rates = [before, matrix_rate(SIZES[job.size])]
    return Measured(found.seconds, found.tokens, found.peak, found.losses, rates)


def main(source: Path, target: Path) -> None:
    """Read a job, run it, write what was measured."""
    given = json.loads(source.read_text())
    job = Job(**given | {"workload": Path(given["workload"]), "scratch": Path(given["scratch"])})
    target.write_text(json.dumps(asdict(run(job))))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
