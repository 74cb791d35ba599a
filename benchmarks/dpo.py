"""dpo against DPOTrainer, the reference in every step or once before: `python -m benchmarks.dpo`."""

import sys

from benchmarks.case import ONE_BY_ONE, Case, Side
from benchmarks.runner import main


def _case(name: str, reference: str, targets: dict[str, float], flops: float) -> Case:
    peer = f"DPOTrainer padded, reference {reference}"
    return Case(
        name=name,
        ours=Side("alignpipe", "benchmarks.ours:dpo"),
        peers=(
            Side(peer, "benchmarks.peers:dpo"),
            Side(f"{peer}, pair by pair", "benchmarks.peers:dpo", ONE_BY_ONE),
        ),
        targets=targets,
        flops=flops,
        settings={"batch_size": 4, "reference": reference},
        same_losses=True,
        max_memory=0.6,
    )


CASES = (
    _case("dpo", "in step", {"S": 3.0, "M": 3.0}, flops=8),
    _case("dpo-precomputed", "precomputed", {"S": 3.0, "M": 3.5}, flops=6),
)

if __name__ == "__main__":
    sys.exit(main(CASES))
