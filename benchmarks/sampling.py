"""Sampling against transformers' `generate` and `generate_batch`, the better: `python -m benchmarks.sampling`.

One response to each of 32 prompts of mixed length, 64 tokens on average and 256 at most; and 8 responses of 64 tokens
to each of 16 prompts of 80 and of 400 tokens, as rs and collect ask for them.
"""

import sys
from typing import Any

from benchmarks.case import Case, Side
from benchmarks.runner import main


def _case(name: str, batch_sizes: tuple[int, ...], target: float, **settings: Any) -> Case:
    generate = [
        Side(f"generate, {size} at once", "benchmarks.peers:generate", {"batch_size": size})
        for size in batch_sizes
    ]
    return Case(
        name=name,
        ours=Side("alignpipe", "benchmarks.ours:sample"),
        peers=(Side("generate_batch", "benchmarks.peers:generate_batch"), *generate),
        # On M what comes is reported alone.
        targets={"S": target},
        flops=2,
        settings=settings,
    )


BEST_OF = {"response_length": 64, "num_samples": 8, "stop_every": None}
CASES = (
    _case(
        "sample-mixed",
        (16, 32),
        2.0,
        prompts="mixed",
        response_length=256,
        num_samples=1,
        stop_every=64,
    ),
    _case("best-of-8-short", (64, 128), 1.8, prompts="80", **BEST_OF),
    _case("best-of-8-long", (64, 128), 3.0, prompts="400", **BEST_OF),
)

if __name__ == "__main__":
    sys.exit(main(CASES))
