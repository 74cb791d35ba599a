"""The best-of-n curve against every subset, and its KL bound."""

import itertools
import math

import pytest
import torch

from alignpipe.losses.best_of_n import best_of_n, best_of_n_able, best_of_n_kl


def every_subset(scores, gold, n):
    chosen = [
        max(subset, key=lambda i: scores[i]) for subset in itertools.combinations(range(len(scores)), n)
    ]
    return sum(gold[i] for i in chosen) / len(chosen)


def test_best_of_n_equals_the_mean_over_every_subset():
    torch.manual_seed(0)
    scores, gold = torch.randn(3, 6), torch.randn(3, 6)
    own, other = best_of_n(scores), best_of_n(scores, gold)
    for row, n in itertools.product(range(3), range(1, 7)):
        proxies = scores[row].tolist()
        assert own[row, n - 1].item() == pytest.approx(every_subset(proxies, proxies, n))
        assert other[row, n - 1].item() == pytest.approx(every_subset(proxies, gold[row].tolist(), n))


def test_best_of_n_ends_are_the_mean_and_the_best():
    scores = torch.tensor([[3.0, 1.0, 2.0]])
    gold = torch.tensor([[-5.0, 0.0, 2.0]])
    assert best_of_n(scores)[0].tolist() == pytest.approx([2.0, 8 / 3, 3.0])
    assert best_of_n(scores, gold)[0].tolist() == pytest.approx([-1.0, (-5 - 5 + 2) / 3, -5.0])


def test_best_of_n_does_not_care_for_the_order_of_samples():
    torch.manual_seed(1)
    scores, gold, order = torch.randn(2, 8), torch.randn(2, 8), torch.randperm(8)
    torch.testing.assert_close(best_of_n(scores[:, order], gold[:, order]), best_of_n(scores, gold))


def test_best_of_n_stays_exact_for_many_samples():
    # Of N consecutive numbers the best of n is (n / (n + 1)) * (N + 1) on average.
    curve = best_of_n(torch.arange(1.0, 129.0)[None])[0]
    expected = [n / (n + 1) * 129 for n in range(1, 129)]
    assert curve.tolist() == pytest.approx(expected)


def test_best_of_n_kl_known_values():
    bound = best_of_n_kl(64)
    assert bound[0].item() == 0.0
    assert bound[1].item() == pytest.approx(math.log(2) - 0.5)
    assert bound[63].item() == pytest.approx(3.17, abs=0.01)


def test_curve_over_able_responses_equals_every_subset_that_holds_one():
    torch.manual_seed(3)
    scores, able = torch.randn(4, 5), torch.rand(4, 5) < 0.6
    able[0], able[1] = False, True
    curve = best_of_n_able(scores, able)
    for n in range(1, 6):
        best = [
            max(scores[row, i].item() for i in subset if able[row, i])
            for row in range(4)
            for subset in itertools.combinations(range(5), n)
            if able[row, list(subset)].any()
        ]
        assert curve[n - 1].item() == pytest.approx(sum(best) / len(best))


def test_curve_over_able_responses_is_the_plain_one_where_all_are():
    scores = torch.randn(3, 4)
    torch.testing.assert_close(best_of_n_able(scores, scores > -99), best_of_n(scores).mean(0))
