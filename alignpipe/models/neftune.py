"""NEFTune: noise on the embeddings while a model is trained (arXiv:2310.05914, algorithm 1).

embeddings (B, T, d), alpha -> embeddings + Uniform(-1, 1) * alpha / sqrt(L d), L the real tokens of each row
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def noisy_embeddings(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], alpha: float, seed: int, step: int
) -> Iterator[None]:
    """Add noise to what the input embeddings give inside the block; nothing in evaluation mode or at alpha 0.

    The noise of a row depends on the seed, the step and the row's own tokens alone: micro-batches, padding, company
    and restarts do not change it. So rows of the same tokens have the same noise within a step.

    Args:
        model: any that has input embeddings, sharded or with adapters too.
        rows: token ids of the batch that the block reads, without padding.
        alpha: strength; 5 to 15 in the paper.
        seed: of the stage.
        step: of the training.
    """
    if alpha == 0 or not model.training:
        yield
        return

    def add(_module: nn.Module, _inputs: Any, embeddings: Tensor) -> Tensor:
        noise = torch.zeros_like(embeddings).flatten(0, 1)
        # Rows are padded to one width, or lie side by side.
        padded = len(embeddings) == len(rows)
        start = 0
        for row in rows:
            noise[start : start + len(row)] = row_noise(row, embeddings, alpha, seed, step)
            start += embeddings.shape[1] if padded else len(row)
        return embeddings + noise.view_as(embeddings)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def row_noise(row: Sequence[int], like: Tensor, alpha: float, seed: int, step: int) -> Tensor:
    """The noise of one row, (L, d), drawn on the device of `like` (B, T, d) and in its type."""
    address = hashlib.sha256(f"neftune|{seed}|{step}|{list(row)}".encode()).digest()
    generator = torch.Generator(like.device).manual_seed(int.from_bytes(address[:8]) >> 1)
    length, width = len(row), like.shape[-1]
    uniform = torch.rand(length, width, generator=generator, device=like.device, dtype=like.dtype)
    return (2 * uniform - 1) * (alpha / sqrt(length * width))
