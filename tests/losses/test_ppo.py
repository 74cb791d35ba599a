"""PPO's pieces by hand, by explicit sums, and under padding."""

import math

import pytest
import torch

from alignpipe.losses.ppo import (
    adapt_kl_coef,
    explained_variance,
    gae,
    kl_k1,
    kl_k2,
    kl_k3,
    policy_loss,
    shape_rewards,
    value_loss,
)


def response_mask(spans, length):
    return torch.tensor([[start <= t < end for t in range(length)] for start, end in spans])


def test_shape_rewards_puts_the_score_on_the_last_response_token():
    logprobs = torch.tensor([[-9.0, -1.0, -2.0, -9.0], [-1.0, -1.0, -1.0, -1.0]])
    reference = torch.tensor([[-5.0, -2.0, -2.5, -1.0], [-1.0, -1.0, -1.0, -3.0]])
    mask = response_mask([(1, 3), (0, 4)], 4)
    found = shape_rewards(logprobs, reference, torch.tensor([10.0, -3.0]), mask, kl_coef=0.1)
    torch.testing.assert_close(found, torch.tensor([[0.0, -0.1, 9.95, 0.0], [0.0, 0.0, 0.0, -3.2]]))


def test_shape_rewards_of_the_reference_itself_are_the_score_alone():
    logprobs = torch.randn(3, 5)
    mask = response_mask([(2, 5), (1, 2), (0, 0)], 5)
    found = shape_rewards(logprobs, logprobs, torch.tensor([2.0, 3.0, 4.0]), mask, kl_coef=0.5)
    assert found.sum(1).tolist() == [2.0, 3.0, 0.0]
    assert found[0, 4] == 2.0
    assert found[1, 1] == 3.0


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.8, 0.0)])
def test_gae_equals_the_explicit_double_sum(gamma, gae_lambda):
    torch.manual_seed(0)
    spans = [(2, 7), (0, 3), (4, 5)]
    mask = response_mask(spans, 8)
    rewards, values = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    for row, (start, end) in enumerate(spans):
        for t in range(8):
            expected = 0.0
            if start <= t < end:
                for i in range(t, end):
                    after = values[row, i + 1].item() if i + 1 < end else 0.0
                    delta = rewards[row, i].item() + gamma * after - values[row, i].item()
                    expected += (gamma * gae_lambda) ** (i - t) * delta
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(returns, (advantages + values) * mask)


def test_gae_with_lambda_one_gives_the_discounted_sum_of_rewards_as_return():
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    _, returns = gae(rewards, torch.tensor([[5.0, -3.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool), 0.5, 1.0)
    assert returns.tolist() == [[3.0, 4.0, 4.0]]


def test_gae_ignores_what_stands_outside_of_the_mask():
    torch.manual_seed(1)
    mask = response_mask([(1, 4)], 6)
    rewards, values = torch.randn(1, 6), torch.randn(1, 6)
    expected = gae(rewards, values, mask, 1.0, 0.95)
    dirty = gae(rewards.masked_fill(~mask, 1e9), values.masked_fill(~mask, float("nan")), mask, 1.0, 0.95)
    torch.testing.assert_close(dirty, expected)


def test_policy_loss_ratio_is_exactly_one_on_equal_logprobs():
    torch.manual_seed(2)
    logprobs = (torch.randn(4, 6) * 5).requires_grad_()
    advantages = torch.randn(4, 6)
    mask = torch.rand(4, 6) > 0.3
    losses, ratio = policy_loss(logprobs, logprobs.detach(), advantages, mask, clip_range=0.2)
    assert (ratio == 1).all()
    torch.testing.assert_close(losses, -advantages * mask)
    losses.sum().backward()
    # The policy gradient of REINFORCE, since nothing is clipped.
    torch.testing.assert_close(logprobs.grad, -advantages * mask)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 1.0, -1.2, 0.0),
        (1.5, -1.0, 1.5, 1.5),
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
        (1.1, 2.0, -2.2, -2.2),
    ],
)
def test_policy_loss_clips_only_what_already_moved_far_enough(ratio, advantage, loss, slope):
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    losses, found = policy_loss(
        logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), mask, clip_range=0.2
    )
    losses.sum().backward()
    assert found.item() == pytest.approx(ratio)
    assert losses.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(slope)


def test_policy_loss_is_finite_at_extremes_and_blind_outside_of_the_mask():
    logprobs = torch.tensor([[1e4, -1e4, float("inf")]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    losses, ratio = policy_loss(
        logprobs, torch.zeros(1, 3), torch.tensor([[-1.0, 1.0, 1.0]]), mask, clip_range=0.2
    )
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logprobs.grad.isfinite().all()
    assert (losses[0, 2].item(), ratio[0, 2].item()) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("value", "loss", "slope"),
    [(1.1, 0.5 * 0.9**2, -0.9), (1.9, 0.5 * 0.8**2, 0.0), (0.0, 0.5 * 4.0, -2.0)],
)
def test_value_loss_takes_the_worse_of_the_plain_and_the_clipped_error(value, loss, slope):
    # Old value 1, return 2, range 0.2: a value beyond 1.2 is held at 1.2 and learns no more this rollout.
    values = torch.tensor([[value, 5.0]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    losses = value_loss(values, torch.ones(1, 2), torch.full((1, 2), 2.0), mask, value_clip_range=0.2)
    losses.sum().backward()
    assert losses[0].tolist() == pytest.approx([loss, 0.0])
    assert values.grad[0].tolist() == pytest.approx([slope, 0.0])


@pytest.mark.parametrize(("kl", "expected"), [(6.0, 0.1), (60.0, 0.12), (0.0, 0.08), (6.6, 0.11)])
def test_adapt_kl_coef_moves_by_at_most_a_fifth_in_a_horizon(kl, expected):
    assert adapt_kl_coef(0.1, kl, target_kl=6.0, num_samples=100, kl_horizon=100) == pytest.approx(expected)


def test_explained_variance_is_one_for_the_returns_and_zero_for_a_constant():
    returns = torch.tensor([[1.0, 2.0, 6.0, 99.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert explained_variance(returns - 4.0, returns, mask).item() == pytest.approx(1.0)
    assert explained_variance(torch.zeros(1, 4), returns, mask).item() == pytest.approx(0.0, abs=1e-6)
    assert explained_variance(2 * returns, returns, mask).item() == pytest.approx(0.0, abs=1e-6)


def test_kl_estimators_average_to_the_exact_divergence():
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    exact = (p * (p / q).log()).sum()
    # Expectations under p, taken over the whole vocabulary rather than by sampling.
    torch.testing.assert_close((p * kl_k1(p.log(), q.log())).sum(), exact)
    torch.testing.assert_close((p * kl_k3(p.log(), q.log())).sum(), exact)
    assert (p * kl_k2(p.log(), q.log())).sum().item() == pytest.approx(exact.item(), rel=0.1)
    assert (kl_k3(p.log(), q.log()) >= 0).all()
    assert kl_k1(p.log(), q.log()).min() < 0
