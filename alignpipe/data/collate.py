"""Examples of unequal length -> one right-padded batch of tensors.

Causal models never look ahead, so on the right of a sequence padding needs no attention mask. What is real
comes from the lengths: never from comparing ids with the pad id, which a text may hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from alignpipe.data.examples import Example


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """A batch of sequences.

    Attributes:
        input_ids: (B, T) long, padded on the right.
        lengths: (B,) long, real tokens of each row.
        loss_mask: (B, T) bool, True where a token is learnt; the token at t is predicted from those before
            it.
        rows: ids of each sequence, known without a look at the device.
        shared: what several begin with may be read once for all of them.
    """

    input_ids: torch.Tensor
    lengths: torch.Tensor
    loss_mask: torch.Tensor
    rows: tuple[Sequence[int], ...]
    shared: bool = True

    def to(self, device: torch.device | str) -> "TokenBatch":
        """Returns the batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            lengths=self.lengths.to(device),
            loss_mask=self.loss_mask.to(device),
        )

    def part(self, rows: Sequence[int]) -> "TokenBatch":
        """Returns some rows, no wider than the longest of them."""
        chosen = tuple(self.rows[row] for row in rows)
        width = max(map(len, chosen))
        index = torch.tensor(rows, device=self.input_ids.device)
        return replace(
            self,
            input_ids=self.input_ids[index, :width],
            lengths=self.lengths[index],
            loss_mask=self.loss_mask[index, :width],
            rows=chosen,
        )


def collate(examples: Sequence[Example], pad_id: int, *, shared: bool = True) -> TokenBatch:
    """Pads examples on the right to the longest of them.

    Args:
        examples: Sequences.
        pad_id: Fills up the shorter ones.
        shared: What several begin with may be read once for all of them.

    Raises:
        ValueError: There is no example, or one is empty.
    """
    lengths = [len(example.ids) for example in examples]
    if not lengths or min(lengths) == 0:
        raise ValueError("a batch needs at least one example, and each at least one token")
    width = max(lengths)
    ids = [example.ids + [pad_id] * (width - len(example.ids)) for example in examples]
    mask = [example.mask + [False] * (width - len(example.mask)) for example in examples]
    rows = tuple(example.ids for example in examples)
    return TokenBatch(torch.tensor(ids), torch.tensor(lengths), torch.tensor(mask), rows, shared)
