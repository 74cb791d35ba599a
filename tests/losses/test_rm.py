"""Losses of rankings by hand, by loops over pairs and orders, at ties and at extremes."""

import itertools
import math

import pytest
import torch

from alignpipe.losses.rm import (
    centering_losses,
    kwise_loss,
    kwise_losses,
    pair_accuracy,
    pair_losses,
    pair_margins,
    plackett_luce_losses,
    ranked_pairs,
)


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


def sigmoid_loss(gap):
    return math.log1p(math.exp(-gap))


def test_a_margin_is_what_the_winner_must_win_by():
    # Gap 1, margin 1/2: -log sigmoid(1/2). The second pair's worths stand the other way round: no margin below 0.
    scores, ranks = torch.tensor([2.0, 1.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 1.0, 2.0])
    worths = torch.tensor([0.7, 0.2, 0.2, 0.7])
    found = kwise_losses(scores, ranks, torch.tensor([0, 0, 1, 1]), worths=worths)
    assert found.tolist() == pytest.approx([sigmoid_loss(0.5), sigmoid_loss(1.0)], abs=1e-6)


def test_margins_smoothing_and_ties_equal_a_loop_over_pairs():
    torch.manual_seed(3)
    groups = torch.tensor([0] * 4 + [1] * 2 + [2] * 6)
    scores, worths = torch.randn(12), torch.rand(12)
    ranks = torch.randint(1, 4, (12,)).float()
    expected = []
    for group in range(3):
        terms = []
        for i, j in itertools.combinations((groups == group).nonzero().flatten().tolist(), 2):
            gap = float(scores[i] - scores[j])
            if ranks[i] == ranks[j]:
                terms.append(0.5 * sigmoid_loss(gap) + 0.5 * sigmoid_loss(-gap))
            else:
                sign = 1 if ranks[i] < ranks[j] else -1
                margin = max(0.0, sign * float(worths[i] - worths[j]))
                # Mislabelled with probability 1/5: then the other one has the margin to keep.
                right, wrong = sigmoid_loss(sign * gap - margin), sigmoid_loss(-sign * gap - margin)
                terms.append(0.8 * right + 0.2 * wrong)
        expected.append(sum(terms) / len(terms))
    found = kwise_losses(scores, ranks, groups, worths=worths, label_smoothing=0.2, ties="half")
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_smoothed_labels_are_learnt_to_their_odds_and_no_further():
    # Conservative Bradley-Terry is least where sigmoid(gap) is 1 - epsilon.
    gap = torch.tensor([math.log(0.9 / 0.1)], requires_grad=True)
    pair_losses(gap, torch.zeros(1), 0.9).sum().backward()
    assert gap.grad.item() == pytest.approx(0.0, abs=1e-7)


def test_half_ties_pull_tied_scores_together_and_dropped_ones_leave_them():
    ranks, groups = torch.tensor([1.0, 1.0]), torch.tensor([0, 0])
    scores = torch.tensor([1.0, -1.0], requires_grad=True)
    (half,) = torch.autograd.grad(kwise_losses(scores, ranks, groups, ties="half").sum(), scores)
    assert half[0] > 0 > half[1]
    (dropped,) = torch.autograd.grad(kwise_losses(scores, ranks, groups).sum(), scores)
    assert dropped.tolist() == [0.0, 0.0]
    # Equal scores are what a tie asks for.
    even = torch.zeros(2, requires_grad=True)
    (still,) = torch.autograd.grad(kwise_losses(even, ranks, groups, ties="half").sum(), even)
    assert still.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("k", [2, 3, 5])
def test_plackett_luce_probabilities_of_all_orders_sum_to_one(k):
    torch.manual_seed(k)
    scores = torch.randn(k, dtype=torch.float64)
    orders = torch.tensor(list(itertools.permutations(range(1, k + 1))))  # (K!, K) ranks
    groups = torch.arange(len(orders)).repeat_interleave(k)
    losses = plackett_luce_losses(scores.repeat(len(orders)), orders.flatten().double(), groups)
    assert losses.neg().exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    # Each by the product of its choices: the best of all, then the best of the rest, ...
    for order, loss in zip(orders.tolist(), losses.tolist(), strict=True):
        left = [scores[order.index(rank)].exp().item() for rank in range(1, k + 1)]
        chance = math.prod(left[place] / sum(left[place:]) for place in range(k))
        assert loss == pytest.approx(-math.log(chance), abs=1e-10)


def test_plackett_luce_of_pairs_is_the_pairwise_loss():
    torch.manual_seed(0)
    scores, ranks = torch.randn(8), torch.tensor([1.0, 2.0, 2.0, 1.0] * 2)
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    torch.testing.assert_close(
        plackett_luce_losses(scores, ranks, groups), kwise_losses(scores, ranks, groups)
    )


def test_plackett_luce_learns_no_order_inside_a_tied_group():
    # a is best, b and c are tied, d is worst: b and c each stand against themselves and d alone.
    a, b, c, d = 0.3, 1.2, -0.4, 0.9
    scores = torch.tensor([a, b, c, d], requires_grad=True)
    loss = plackett_luce_losses(scores, torch.tensor([1.0, 2.0, 2.0, 4.0]), torch.zeros(4, dtype=torch.long))
    expected = math.log(sum(map(math.exp, (a, b, c, d)))) - a + sigmoid_loss(b - d) + sigmoid_loss(c - d)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    tied = plackett_luce_losses(scores, torch.ones(4), torch.zeros(4, dtype=torch.long))
    assert tied.item() == 0
    assert torch.autograd.grad(tied.sum(), scores)[0].tolist() == [0.0] * 4


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_plackett_luce_has_finite_gradients_at_extremes(size):
    scores = torch.tensor([size, 0.0, -size], requires_grad=True)
    loss = plackett_luce_losses(scores, torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, dtype=torch.long))
    loss.backward()
    assert loss.isfinite().all()
    assert scores.grad.isfinite().all()


def test_centering_is_the_squared_sum_of_each_untied_pair():
    # Prompt 0: (2 + 1)^2 and (2 - 3)^2; the tied pair is none. Prompt 1 is all tied.
    scores, ranks = torch.tensor([2.0, 1.0, -3.0, 5.0, 6.0]), torch.tensor([1.0, 2.0, 2.0, 1.0, 1.0])
    found = centering_losses(scores, ranks, torch.tensor([0, 0, 0, 1, 1]))
    assert found.tolist() == [(9 + 1) / 2, 0.0]


@pytest.mark.parametrize("loss", ["kwise", "half", "plackett_luce", "centering"])
def test_order_of_rows_and_of_responses_changes_no_loss(loss):
    torch.manual_seed(5)
    groups = torch.tensor([0] * 4 + [1] * 2 + [2] * 9)
    scores, ranks, worths = torch.randn(15), torch.randint(1, 4, (15,)).float(), torch.rand(15)
    functions = {
        "kwise": lambda s, r, g, w: kwise_losses(s, r, g, 3, worths=w, label_smoothing=0.1),
        "half": lambda s, r, g, w: kwise_losses(s, r, g, 3, worths=w, ties="half"),
        "plackett_luce": lambda s, r, g, w: plackett_luce_losses(s, r, g, 3),
        "centering": lambda s, r, g, w: centering_losses(s, r, g, 3),
    }
    expected = functions[loss](scores, ranks, groups, worths)
    mixed = torch.randperm(15)
    found = functions[loss](scores[mixed], ranks[mixed], groups[mixed], worths[mixed])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
