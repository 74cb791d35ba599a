"""sft against SFTTrainer, the best of padded, grouped and packed, in whole or cut: `python -m benchmarks.sft`."""

import sys

from benchmarks.case import ONE_BY_ONE, Case, Side
from benchmarks.runner import main

# A step of eight rows in two forwards.
HALVES = {"micro_batch_size": 4}
CASES = (
    Case(
        name="sft",
        ours=Side("alignpipe", "benchmarks.ours:sft"),
        peers=(
            *(
                Side(f"SFTTrainer {way}", "benchmarks.peers:sft", {"way": way})
                for way in ("padded", "grouped", "packed")
            ),
            Side("SFTTrainer padded, 2 x 4 rows", "benchmarks.peers:sft", {"way": "padded", **HALVES}),
            *(
                Side(f"SFTTrainer {way}, row by row", "benchmarks.peers:sft", {"way": way, **ONE_BY_ONE})
                for way in ("padded", "packed")
            ),
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
