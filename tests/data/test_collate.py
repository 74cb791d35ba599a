"""Batches: right padding, masks from lengths."""

import pytest
import torch

from alignpipe.data.collate import collate
from alignpipe.data.examples import Example


def test_collate_unequal_lengths_pads_on_the_right() -> None:
    # The second example holds the pad id as a real token.
    batch = collate([Example([5, 6, 7], [False, True, True]), Example([9, 0], [False, True])], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7], [9, 0, 0]]
    assert batch.lengths.tolist() == [3, 2]
    assert batch.loss_mask.tolist() == [[False, True, True], [False, True, False]]
    assert (batch.input_ids.dtype, batch.loss_mask.dtype) == (torch.long, torch.bool)


def test_to_device_moves_every_tensor() -> None:
    moved = collate([Example([1], [False])], 0).to("meta")
    assert {moved.input_ids.device.type, moved.lengths.device.type, moved.loss_mask.device.type} == {"meta"}


@pytest.mark.parametrize("examples", [[], [Example([], [])]])
def test_collate_nothing_to_pad_is_refused(examples: list[Example]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        collate(examples, 0)
