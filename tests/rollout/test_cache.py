"""The paged cache attends as if each sequence stood alone, whoever enters, leaves or moves."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from alignpipe.rollout.cache import PAGE, SHARED_PAGE, PagedCache

HEADS, KEY_HEADS, WIDTH, LAYERS = 4, 2, 8, 2


def make_cache(num_slots, num_samples):
    return PagedCache(
        num_slots=num_slots,
        num_samples=num_samples,
        longest_prompt=2 * SHARED_PAGE,
        max_new_tokens=4 * PAGE,
        device=torch.device("cpu"),
    )


class Reference:
    """Sequences side by side, each with keys and values of its own."""

    def __init__(self, cache):
        self.cache, self.sequences, self.prompts = cache, {}, {}

    def enter(self, slots, prompt, length):
        states = [tuple(torch.randn(KEY_HEADS, length, WIDTH) for _ in range(2)) for _ in range(LAYERS)]
        states = self.prompts.setdefault(prompt, states)
        self.cache.enter(slots, prompt, states)
        for slot in slots:
            self.sequences[slot] = states

    def leave(self, slots):
        self.cache.leave(slots)
        for slot in slots:
            del self.sequences[slot]

    def move(self, source, target):
        self.cache.move([source], [target])
        self.sequences[target] = self.sequences.pop(source)

    def step(self):
        """One token each; what the cache attends to is what each sequence alone does."""
        live = len(self.sequences)
        assert sorted(self.sequences) == list(range(live))
        lengths = [self.sequences[slot][0][0].shape[1] for slot in range(live)]
        assert self.cache.open(live).tolist() == lengths
        grown = {slot: [] for slot in range(live)}
        for layer in range(LAYERS):
            query = torch.randn(live, HEADS, 1, WIDTH)
            new = [torch.randn(live, KEY_HEADS, 1, WIDTH) for _ in range(2)]
            self.cache.update(*new, layer)
            found = self.cache.attend(layer, query, 0.3)
            for slot in range(live):
                pairs = zip(self.sequences[slot][layer], new, strict=True)
                keys, values = (torch.cat([old, more[slot]], 1) for old, more in pairs)
                grown[slot].append((keys, values))
                expected = scaled_dot_product_attention(query[slot], keys, values, scale=0.3, enable_gqa=True)
                torch.testing.assert_close(found[slot], expected.transpose(0, 1))
        self.sequences = grown


@pytest.mark.parametrize("num_samples", [1, 3])
def test_attention_over_pages_is_that_of_each_sequence_alone(num_samples):
    torch.manual_seed(0)
    found = Reference(make_cache(6, num_samples))
    slots = [[slot] for slot in range(6)] if num_samples == 1 else [[0, 1, 2], [3, 4], [5]]
    lengths = [0, PAGE, PAGE + 1, SHARED_PAGE, 1, 2 * SHARED_PAGE]
    for prompt, entering in enumerate(slots):
        found.enter(entering, prompt, lengths[-1 - prompt])
    for _ in range(PAGE + 2):
        found.step()
    found.leave([1, 3])
    found.enter([1, 3], 7, 40) if num_samples == 3 else found.enter([1], 7, 40)
    if num_samples == 1:
        found.enter([3], 8, 3)
    for _ in range(3):
        found.step()
    found.leave([0, 2])
    found.move(5, 0)
    found.move(4, 2)
    for _ in range(PAGE):
        found.step()


def test_a_sample_that_comes_later_reads_the_pages_of_its_prompt():
    cache = make_cache(4, 3)
    found = Reference(cache)
    found.enter([0, 1], 0, 3 * SHARED_PAGE // 2)
    found.step()
    held = np.count_nonzero(cache.shared.filled)
    found.enter([2], 0, 0)
    assert np.count_nonzero(cache.shared.filled) == held == 2
    found.step()
    found.leave([0, 1])
    found.move(2, 0)
    found.step()
    found.leave([0])
    assert not cache.shared.filled.any()
    assert not cache.own.filled.any()


def test_pages_are_made_where_more_prompts_than_planned_have_samples_left():
    torch.manual_seed(0)
    cache = make_cache(4, 4)
    planned = len(cache.shared.filled)
    found = Reference(cache)
    for slot in range(4):
        found.enter([slot], slot, 2 * SHARED_PAGE)
    assert len(cache.shared.filled) == 4 * planned
    found.step()


def test_pages_of_a_few_that_are_left_stand_in_front():
    torch.manual_seed(0)
    cache = make_cache(8, 1)
    found = Reference(cache)
    for slot in range(8):
        found.enter([slot], slot, 2 * PAGE)
    found.step()
    found.leave(list(range(7)))
    found.move(7, 0)
    found.step()
    assert cache.own.count == 3
