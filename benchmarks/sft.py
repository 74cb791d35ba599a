"""sft against SFTTrainer, the best of padded, grouped by length and packed: `python -m benchmarks.sft`."""

import sys

from benchmarks.case import Case, Side
from benchmarks.runner import main

CASES = (
    Case(
        name="sft",
        ours=Side("alignpipe", "benchmarks.ours:sft"),
        peers=tuple(
            Side(f"SFTTrainer {way}", "benchmarks.peers:sft", {"way": way})
            for way in ("padded", "grouped", "packed")
        ),
        targets={"S": 1.8, "M": 2.0},
        flops=6,
        settings={"batch_size": 8},
        same_losses=True,
        max_memory=0.6,
    ),
)

if __name__ == "__main__":
    sys.exit(main(CASES))
