"""The cache that is written in place holds what transformers' own cache holds."""

import pytest
import torch
from transformers import DynamicCache

from alignpipe.rollout.cache import RoomyLayer, spread


def filled(layers=2):
    torch.manual_seed(0)
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4), layer)
    return cache


def test_spread_cache_grows_and_shrinks_like_the_plain_one():
    plain, roomy = filled(), filled()
    rows = torch.tensor([0, 0, 1, 2, 2])
    plain.batch_select_indices(rows)
    assert spread(roomy, rows, room=4)
    assert all(type(layer) is RoomyLayer for layer in roomy.layers)
    for step in range(4):
        for layer in range(2):
            new = torch.randn(len(rows), 2, 1, 4), torch.randn(len(rows), 2, 1, 4)
            for expected, found in zip(plain.update(*new, layer), roomy.update(*new, layer), strict=True):
                assert torch.equal(expected, found)
        assert roomy.get_seq_length() == plain.get_seq_length() == 6 + step
        if step == 1:
            kept = torch.tensor([0, 3, 4])
            plain.batch_select_indices(kept)
            roomy.batch_select_indices(kept)
            rows = rows[kept]


def test_spread_cache_is_no_larger_than_it_must_be():
    cache = filled()
    spread(cache, torch.tensor([0, 1]), room=1)
    new = torch.zeros(2, 2, 1, 4)
    cache.update(new, new, 0)
    with pytest.raises(RuntimeError):
        cache.update(new, new, 0)
