"""The cache of groups attends as if each sample stood alone, whoever enters, leaves or moves."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from alignpipe.rollout import cache as module
from alignpipe.rollout.cache import GroupCache

HEADS, KEY_HEADS, WIDTH, LAYERS = 4, 2, 8, 2
LONGEST, NEW_TOKENS = 50, 12


def make_cache(num_groups, size, max_new_tokens=NEW_TOKENS):
    torch.manual_seed(0)
    return GroupCache(
        num_groups=num_groups,
        size=size,
        longest_prompt=LONGEST,
        max_new_tokens=max_new_tokens,
        device=torch.device("cpu"),
    )


class Reference:
    """Samples side by side, each with keys and values of its own."""

    def __init__(self, cache):
        self.cache, self.samples = cache, {}

    def enter(self, group, length):
        states = [tuple(torch.randn(KEY_HEADS, length, WIDTH) for _ in range(2)) for _ in range(LAYERS)]
        self.cache.enter(group, states)
        first = group * self.cache.size
        self.samples |= dict.fromkeys(range(first, first + self.cache.size), states)

    def end(self, *samples):
        """Samples get no more tokens; a group of which none goes on is freed."""
        groups = {sample // self.cache.size for sample in samples}
        for sample in samples:
            del self.samples[sample]
        self.cache.leave(sorted(groups - {sample // self.cache.size for sample in self.samples}))

    def assert_step(self):
        """One token each; what the cache attends to is what each sample alone does."""
        given = sorted(self.samples)
        order, positions = self.cache.open(given)
        samples = [given[place] for place in order.tolist()]
        assert sorted(samples) == given
        lengths = [self.samples[sample][0][0].shape[1] for sample in samples]
        assert positions.tolist() == lengths
        grown = {sample: [] for sample in samples}
        for layer in range(LAYERS):
            query = torch.randn(len(samples), HEADS, 1, WIDTH)
            new = [torch.randn(len(samples), KEY_HEADS, 1, WIDTH) for _ in range(2)]
            self.cache.update(*new, layer)
            found = self.cache.attend(layer, query, 0.3)
            for row, sample in enumerate(samples):
                pairs = zip(self.samples[sample][layer], new, strict=True)
                keys, values = (torch.cat([old, more[row]], 1) for old, more in pairs)
                grown[sample].append((keys, values))
                expected = scaled_dot_product_attention(query[row], keys, values, scale=0.3, enable_gqa=True)
                torch.testing.assert_close(found[row], expected.transpose(0, 1))
        self.samples = grown


@pytest.mark.parametrize("call", [0, 300, 10**6])
@pytest.mark.parametrize("size", [1, 3])
def test_attention_to_a_group_is_that_of_each_sample_alone(size, call, monkeypatch):
    monkeypatch.setattr(module, "CALL", {"cpu": call})
    found = Reference(make_cache(5, size))
    for group, length in enumerate([0, LONGEST, 7, 1]):
        found.enter(group, length)
    for _ in range(3):
        found.assert_step()
    # Samples end at places within their groups, and whole groups at the front, so that others move.
    found.end(*range(size), size)
    found.assert_step()
    found.enter(0, 9)
    found.assert_step()
    found.end(*[sample for sample in found.samples if sample < 3 * size])
    found.assert_step()
    found.enter(1, LONGEST)
    for _ in range(2):
        found.assert_step()


def test_groups_attend_together_while_their_padding_is_cheaper_than_a_call(monkeypatch):
    monkeypatch.setattr(module, "CALL", {"cpu": 60 * KEY_HEADS * WIDTH})
    cache = make_cache(4, 1)
    found = Reference(cache)
    for group, length in enumerate([50, 40, 7, 6]):
        found.enter(group, length)
    found.assert_step()
    # 51 columns, 10 of padding in the second group and 43 in the third; the fourth would add 44.
    assert cache.parts == [(slice(0, 3), 51), (slice(3, 4), 7)]


def test_a_group_that_was_freed_shows_nothing_of_what_was_there():
    cache = make_cache(1, 2)
    found = Reference(cache)
    found.enter(0, LONGEST)
    for _ in range(NEW_TOKENS):
        found.assert_step()
    found.end(0, 1)
    found.enter(0, 0)
    found.assert_step()


def test_what_is_read_ends_with_the_last_group():
    cache = make_cache(8, 1)
    found = Reference(cache)
    for group in range(8):
        found.enter(group, 5 + group)
    found.assert_step()
    found.end(*range(7))
    found.assert_step()
    assert cache.parts == [(slice(0, 1), 12 + 2)]


def test_values_of_another_dtype_than_keys_are_written_as_they_are_held():
    cache = make_cache(1, 2)
    cache.enter(0, [(torch.randn(KEY_HEADS, 3, WIDTH, dtype=torch.bfloat16),) * 2])
    cache.open([0, 1])
    new = torch.randn(2, KEY_HEADS, 1, WIDTH)
    cache.update(new, new, 0)
    assert torch.equal(cache.values[0][0, :, 3], new[0, :, 0].bfloat16())
