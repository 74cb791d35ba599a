"""One side of a case in a process of its own: `python -m benchmarks.process JOB.json RESULT.json`."""

import json
import sys
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from benchmarks.case import SEED, SIZES, Job, Measured, Size

# Rows of the matrices that are multiplied to learn the machine's rate, how often between two looks at the clock, and
# for how long.
PROBE_ROWS, PROBE_PRODUCTS = {"cpu": 2048, "cuda": 8192}, {"cpu": 1, "cuda": 50}
PROBE_SECONDS = 0.5


def matrix_rate(size: Size, device: str = "cpu", precision: str = "fp32") -> float:
    """Floating point operations a second of products at the sizes of the model's feed-forward blocks."""
    import torch

    rows, at_once = PROBE_ROWS[device], PROBE_PRODUCTS[device]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shapes = (rows, size.hidden), (size.hidden, size.intermediate), (size.intermediate, size.hidden)
    left, right, back = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)

    def multiply(times: int) -> None:
        for _ in range(times):
            torch.mm(torch.mm(left, right), back)
        if device == "cuda":
            torch.cuda.synchronize()

    multiply(1)
    began, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < PROBE_SECONDS or not done:
        multiply(at_once)
        done += at_once
    return done * 4 * rows * size.hidden * size.intermediate / passed


def run(job: Job) -> Measured:
    """Call the function of a job between two probes of the machine."""
    import torch

    torch.set_num_threads(job.threads)
    torch.manual_seed(SEED)
    module, _, name = job.function.partition(":")
    function = getattr(import_module(module), name)
    probe = SIZES[job.size], job.device, job.precision
    before = matrix_rate(*probe)
    found: Measured = function(job)
    rates = [before, matrix_rate(*probe)]
    return Measured(found.seconds, found.tokens, found.peak, found.losses, rates)


def main(source: Path, target: Path) -> None:
    """Read a job, run it, write what was measured."""
    given = json.loads(source.read_text())
    job = Job(**given | {"workload": Path(given["workload"]), "scratch": Path(given["scratch"])})
    target.write_text(json.dumps(asdict(run(job))))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
