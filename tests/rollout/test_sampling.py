"""Random numbers by address, and the tokens drawn with them."""

import numpy as np
import pytest
import torch

from alignpipe.rollout.sampling import pick, uniforms

MASK = 2**64 - 1


def plain_uniform(*address):
    """The same number in plain integers."""
    state = 0
    for part in address:
        state = (state + 0x9E3779B97F4A7C15 * ((part & MASK) + 1)) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return (state >> 11) / 2**53


@pytest.fixture(scope="module")
def table():
    """(100 prompts, 20 samples, 50 positions)."""
    return uniforms(7, 3, np.arange(100)[:, None, None], np.arange(20)[:, None], np.arange(50)).numpy()


@pytest.mark.parametrize("address", [(0, 0, 0, 0, 0), (7, 3, 99, 19, 49), (2**32 - 1, 10**6, 2**40, 5, 2047)])
def test_uniforms_equal_the_hash_in_plain_integers(address):
    assert uniforms(*address).item() == plain_uniform(*address)


def test_first_splitmix64_output_is_the_published_one():
    # Seed 0 of the reference implementation gives 0xe220a8397b1dcdaf first.
    assert plain_uniform(0) == (0xE220A8397B1DCDAF >> 11) / 2**53


def test_uniforms_of_a_group_are_those_of_its_members(table):
    picked = np.array([3, 99, 0, 57])
    found = uniforms(7, 3, picked, np.array([1, 0, 19, 4]), 8)
    assert found.tolist() == [table[p, s, 8] for p, s in zip(picked, (1, 0, 19, 4), strict=True)]


def test_uniforms_are_uniform_and_all_different(table):
    assert table.min() >= 0
    assert table.max() < 1
    assert len(np.unique(table)) == table.size
    counts = np.histogram(table, bins=100, range=(0, 1))[0]
    expected = table.size / 100
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # 99 degrees of freedom: mean 99, deviation 14.
    assert chi_square < 99 + 5 * 14


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_neighbouring_addresses_are_independent(table, axis):
    first, second = np.moveaxis(table, axis, 0)[:-1].ravel(), np.moveaxis(table, axis, 0)[1:].ravel()
    correlation = np.corrcoef(first, second)[0, 1]
    assert abs(correlation) < 5 / np.sqrt(len(first))


def test_seed_and_step_give_other_numbers(table):
    prompts = np.arange(100)
    for seed, step in ((8, 3), (7, 4), (3, 7)):
        other = uniforms(seed, step, prompts, 0, 0).numpy()
        assert not np.intersect1d(other, table[:, 0, 0]).size
        assert abs(np.corrcoef(other, table[:, 0, 0])[0, 1]) < 0.5


def test_pick_takes_the_first_token_whose_distribution_function_exceeds_the_number():
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log().expand(7, -1)
    numbers = torch.tensor([0.0, 0.199, 0.201, 0.699, 0.701, 0.999, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs = pick(logits, numbers, 1.0)
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3, 3]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.2, 0.2, 0.5, 0.5, 0.3, 0.3, 0.3]))


def test_pick_never_takes_an_impossible_token_even_at_zero():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).expand(3, -1)
    tokens, _ = pick(logits, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64), 1.0)
    assert tokens.tolist() == [1, 3, 3]


def test_pick_frequencies_follow_the_temperature():
    torch.manual_seed(0)
    logits = torch.randn(6)
    count = 20000
    numbers = uniforms(0, 0, np.arange(count), 0, 0)
    for temperature in (0.5, 1.0, 2.0):
        tokens, logprobs = pick(logits.expand(count, -1), numbers, temperature)
        expected = (logits / temperature).softmax(-1)
        found = tokens.bincount(minlength=6) / count
        assert (found - expected).abs().max() < 5 * 0.5 / count**0.5
        torch.testing.assert_close(logprobs, expected.log()[tokens])


def test_pick_without_numbers_takes_the_most_probable_token():
    tokens, logprobs = pick(torch.tensor([[0.0, 2.0, 1.0]]), None, 1.0)
    assert tokens.tolist() == [1]
    torch.testing.assert_close(logprobs, torch.tensor([0.0, 2.0, 1.0]).log_softmax(-1)[1:2])
