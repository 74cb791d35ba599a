"""K-wise losses by hand, by loops over pairs, at ties and at extremes."""

import itertools
import math

import pytest
import torch

from alignpipe.losses.rm import kwise_loss, kwise_losses, pair_accuracy, pair_margins, ranked_pairs


def loop_loss(scores, ranks):
    pairs = [(w, x) for w, x in itertools.permutations(range(len(scores)), 2) if ranks[w] < ranks[x]]
    terms = [math.log1p(math.exp(-(scores[w] - scores[x]))) for w, x in pairs]
    return sum(terms) / len(terms) if terms else 0.0


def test_kwise_loss_of_two_by_hand():
    # sigmoid(ln 3) = 3/4
    found = kwise_loss(torch.tensor([math.log(3.0), 0.0]), torch.tensor([1.0, 2.0]))
    assert found.item() == pytest.approx(-math.log(0.75))


@pytest.mark.parametrize("k", [2, 4, 9])
def test_kwise_loss_of_equal_scores_is_ln2_whatever_k(k):
    assert kwise_loss(torch.zeros(k), torch.arange(k).float()).item() == pytest.approx(math.log(2))


def test_kwise_losses_equal_a_loop_over_pairs_with_ties_and_mixed_sizes():
    torch.manual_seed(0)
    sizes = [4, 2, 9, 3]
    groups = torch.tensor([g for g, size in enumerate(sizes) for _ in range(size)])
    scores = torch.randn(len(groups))
    ranks = torch.randint(1, 4, (len(groups),)).float()
    expected = [loop_loss(scores[groups == g].tolist(), ranks[groups == g].tolist()) for g in range(4)]
    assert kwise_losses(scores, ranks, groups).tolist() == pytest.approx(expected, abs=1e-6)
    mixed = torch.randperm(len(groups))
    assert kwise_losses(scores[mixed], ranks[mixed], groups[mixed]).tolist() == pytest.approx(
        expected, abs=1e-6
    )


def test_kwise_losses_ignore_a_shift_of_one_prompts_scores():
    torch.manual_seed(1)
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    scores, ranks = torch.randn(6), torch.tensor([1.0, 2, 3, 3, 1, 2])
    shifted = scores + 7.0 * (groups == 1)
    torch.testing.assert_close(kwise_losses(shifted, ranks, groups), kwise_losses(scores, ranks, groups))


def test_kwise_losses_of_all_ties_are_zero_with_zero_gradient():
    scores = torch.tensor([3.0, -1.0, 2.0, 5.0], requires_grad=True)
    losses = kwise_losses(
        scores, torch.tensor([1.0, 1.0, 2.0, 2.0]), torch.tensor([0, 0, 1, 1]), num_groups=3
    )
    assert losses.tolist() == [0.0, 0.0, 0.0]
    losses.sum().backward()
    assert scores.grad.abs().max() == 0


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_kwise_loss_has_finite_gradients_at_extremes(size):
    scores = torch.tensor([size, 0.0, -size], requires_grad=True)
    loss = kwise_loss(scores, torch.tensor([1.0, 2.0, 3.0]))
    loss.backward()
    assert loss.isfinite()
    assert scores.grad.isfinite().all()
    # Sure and right: no push. Sure and wrong: every pair pushes with its full weight of 1/3.
    expected = [0.0, 0.0, 0.0] if size > 0 else [-2 / 3, 0.0, 2 / 3]
    assert scores.grad.tolist() == pytest.approx(expected, abs=1e-6)


def test_pair_accuracy_and_margins_count_untied_pairs_only():
    scores = torch.tensor([2.0, 1.0, 1.0, 0.0, 5.0])
    ranks = torch.tensor([1.0, 2.0, 2.0, 2.0, 1.0])
    groups = torch.tensor([0, 0, 0, 1, 1])
    correct, total = pair_accuracy(scores, ranks, groups)
    assert (correct.tolist(), total.tolist()) == ([2, 1], [2, 1])
    assert sorted(pair_margins(scores, ranks, groups).tolist()) == [1.0, 1.0, 5.0]
    worse, _ = pair_accuracy(-scores, ranks, groups)
    assert worse.tolist() == [0, 0]


def test_pair_accuracy_does_not_count_equal_scores_as_correct():
    correct, total = pair_accuracy(torch.ones(2), torch.tensor([1.0, 2.0]), torch.tensor([0, 0]))
    assert (correct.item(), total.item()) == (0, 1)


def test_ranked_pairs_never_cross_prompts():
    winners, losers = ranked_pairs(torch.tensor([1.0, 2.0, 1.0, 2.0]), torch.tensor([0, 0, 1, 1]))
    assert sorted(zip(winners.tolist(), losers.tolist(), strict=True)) == [(0, 1), (2, 3)]
