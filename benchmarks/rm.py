"""rm against RewardTrainer on pairs: `python -m benchmarks.rm`."""

import sys

from benchmarks.case import ONE_BY_ONE, Case, Side
from benchmarks.runner import main

CASES = (
    Case(
        name="rm",
        ours=Side("alignpipe", "benchmarks.ours:rm"),
        peers=(
            Side("RewardTrainer padded", "benchmarks.peers:rm"),
            Side("RewardTrainer padded, pair by pair", "benchmarks.peers:rm", ONE_BY_ONE),
        ),
        targets={"S": 2.5, "M": 2.8},
        flops=6,
        settings={"batch_size": 4},
        same_losses=True,
        max_memory=0.6,
    ),
)

if __name__ == "__main__":
    sys.exit(main(CASES))
