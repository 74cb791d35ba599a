"""PPO's pieces by hand, by explicit sums, and under padding."""

import math

import pytest
import torch

from alignpipe.losses.ppo import (
    adapt_kl_coef,
    explained_variance,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_loss,
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
    found = shape_rewards(kl_k1(logprobs, reference), torch.tensor([10.0, -3.0]), mask, kl_coef=0.1)
    torch.testing.assert_close(found, torch.tensor([[0.0, -0.1, 9.95, 0.0], [0.0, 0.0, 0.0, -3.2]]))


def test_shape_rewards_of_the_reference_itself_are_the_score_alone():
    logprobs = torch.randn(3, 5)
    mask = response_mask([(2, 5), (1, 2), (0, 0)], 5)
    found = shape_rewards(kl_k1(logprobs, logprobs), torch.tensor([2.0, 3.0, 4.0]), mask, kl_coef=0.5)
    assert found.sum(1).tolist() == [2.0, 3.0, 0.0]
    assert found[0, 4] == 2.0
    assert found[1, 1] == 3.0


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


def _expected_loss_gradient(estimator, logits, reference, sampler=None):
    """Gradient with respect to the logits of the loss in expectation over tokens, exactly."""
    logits = logits.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    old = logprobs.detach() if sampler is None else sampler.log()
    ratio = (logprobs.detach() - old).exp()
    losses = kl_loss(estimator(logprobs, reference.log()), ratio, torch.ones(len(logits), dtype=torch.bool))
    (old.exp() * losses).sum().backward()
    return logits.grad


def _divergence_gradient(logits, reference, *, forward):
    logits = logits.clone().requires_grad_()
    p, q = logits.softmax(0), reference
    (q * (q / p).log() if forward else p * (p / q).log()).sum().backward()
    return logits.grad


LOGITS = torch.tensor([0.3, -0.7, 1.1, 0.0], dtype=torch.float64)
REFERENCE = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)


@pytest.mark.parametrize("sampler", [None, torch.tensor([0.25, 0.25, 0.4, 0.1], dtype=torch.float64)])
def test_k2_as_a_loss_has_the_gradient_of_kl_on_and_off_policy(sampler):
    found = _expected_loss_gradient(kl_k2, LOGITS, REFERENCE, sampler)
    torch.testing.assert_close(found, _divergence_gradient(LOGITS, REFERENCE, forward=False))


@pytest.mark.parametrize("sampler", [None, torch.tensor([0.25, 0.25, 0.4, 0.1], dtype=torch.float64)])
def test_k3_as_a_loss_has_the_gradient_of_the_reverse_divergence(sampler):
    found = _expected_loss_gradient(kl_k3, LOGITS, REFERENCE, sampler)
    torch.testing.assert_close(found, _divergence_gradient(LOGITS, REFERENCE, forward=True))
    assert (found - _divergence_gradient(LOGITS, REFERENCE, forward=False)).abs().max() > 0.05


def test_k1_as_a_loss_has_no_gradient():
    assert _expected_loss_gradient(kl_k1, LOGITS, REFERENCE).abs().max() < 1e-12


def test_k1_in_the_reward_has_the_gradient_of_k2_as_a_loss():
    logits = LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(0)[:, None]  # one token a response, each with its probability
    mask = torch.ones(4, 1, dtype=torch.bool)
    kl = kl_k1(logprobs.detach(), REFERENCE.log()[:, None])
    rewards = shape_rewards(kl, torch.zeros(4, dtype=torch.float64), mask, kl_coef=0.3)
    losses, _ = policy_loss(logprobs, logprobs.detach(), rewards, mask, clip_range=0.2)
    (logprobs.detach().exp() * losses).sum().backward()
    torch.testing.assert_close(logits.grad, 0.3 * _expected_loss_gradient(kl_k2, LOGITS, REFERENCE))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        # Worse and ever more likely: without the bound its loss would be 5 and go on pulling.
        (5.0, -1.0, 3.0, 0.0),
        (2.0, -1.0, 2.0, 2.0),
        (0.5, -1.0, 0.8, 0.0),
        # A good token is bounded by the first clip alone.
        (5.0, 1.0, -1.2, 0.0),
        (1.1, 1.0, -1.1, -1.1),
    ],
)
def test_dual_clip_bounds_the_loss_of_bad_tokens_alone(ratio, advantage, loss, slope):
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    losses, _ = policy_loss(
        logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), mask, 0.2, dual_clip=3.0
    )
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(slope)


def test_kl_loss_is_zero_outside_of_the_mask():
    mask = torch.tensor([[True, False]])
    losses = kl_loss(torch.tensor([[2.0, float("inf")]]), torch.tensor([[1.5, 1.0]]), mask)
    assert losses.tolist() == [[3.0, 0.0]]
