"""A Llama of a billion weights in bf16 against the same peers, on a GPU: `python -m benchmarks.gpu_peers`.

Attention is flash-attn's on both sides where that is installed, torch's otherwise.
"""

import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.case import Case, Side
from benchmarks.runner import main

SIZE = "1B"
ATTENTION = "flash_attention_2" if find_spec("flash_attn") else "sdpa"
ROWS, PAIRS, RESPONSES, EPOCHS = 32, 16, 64, 4
BEST_OF = {"response_length": 64, "num_samples": 8, "stop_every": None}
# Rounding of bf16 differs with the shape of a batch.
_case = partial(Case, device="cuda", precision="bf16", max_loss_difference=1e-2)


def _settings(**settings: Any) -> dict[str, Any]:
    return {**settings, "attention": ATTENTION}


def _dpo(name: str, reference: str, flops: float) -> Case:
    return _case(
        name=name,
        ours=Side("alignpipe", "benchmarks.ours:dpo"),
        peers=(Side(f"DPOTrainer padded, reference {reference}", "benchmarks.peers:dpo"),),
        targets={SIZE: 1.5},
        flops=flops,
        settings=_settings(batch_size=PAIRS, reference=reference),
        same_losses=True,
    )


def _sampling(name: str, under_way: tuple[int, ...], **settings: Any) -> Case:
    return _case(
        name=name,
        ours=Side("alignpipe", "benchmarks.ours:sample", {"under_way": max(under_way)}),
        peers=tuple(
            Side(f"generate, {size} at once", "benchmarks.peers:generate", {"batch_size": size})
            for size in under_way
        ),
        targets={SIZE: 4.0},
        flops=2,
        settings=_settings(**settings),
    )


CASES = (
    _case(
        name="sft",
        ours=Side("alignpipe", "benchmarks.ours:sft"),
        peers=tuple(
            Side(f"SFTTrainer {way}", "benchmarks.peers:sft", {"way": way})
            for way in ("padded", "grouped", "packed")
        ),
        targets={SIZE: 1.3},
        flops=6,
        settings=_settings(batch_size=ROWS),
        same_losses=True,
        min_share=0.45,
    ),
    _case(
        name="rm",
        ours=Side("alignpipe", "benchmarks.ours:rm"),
        peers=(Side("RewardTrainer padded", "benchmarks.peers:rm"),),
        targets={},
        flops=6,
        settings=_settings(batch_size=PAIRS),
        same_losses=True,
        # A score is one number of a row, where a log-prob is a sum of many.
        max_loss_difference=5e-2,
    ),
    _dpo("dpo", "in step", flops=8),
    _dpo("dpo-precomputed", "precomputed", flops=6),
    _sampling("sample-mixed", (64, 128), prompts="mixed", response_length=256, num_samples=1, stop_every=64),
    _sampling("best-of-8-short", (128, 256), prompts="80", **BEST_OF),
    _sampling("best-of-8-long", (128, 256), prompts="400", **BEST_OF),
    _case(
        name="ppo",
        ours=Side("alignpipe", "benchmarks.ours:ppo"),
        peers=(Side("PPOTrainer 1.9.0", "benchmarks.peers:ppo", path="trl-1.9.0"),),
        targets={SIZE: 2.0},
        flops=2 * 5 + 2 * 6 * EPOCHS,
        settings=_settings(rollout_size=RESPONSES, response_length=64, epochs=EPOCHS),
    ),
)


def run(argv: Sequence[str] | None = None) -> int:
    """Compare on the first GPU; 5 where there is none."""
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was run", file=sys.stderr)
        return 5
    print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, attention {ATTENTION}")
    return main(CASES, argv, known=(SIZE,))


if __name__ == "__main__":
    sys.exit(run())
