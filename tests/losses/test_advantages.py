"""Advantages by hand, by explicit sums, and under padding."""

import pytest
import torch

from alignpipe.losses.advantages import gae, grpo, reinforce_pp, rloo


def response_mask(spans, length):
    return torch.tensor([[start <= t < end for t in range(length)] for start, end in spans])


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.8, 0.0)])
def test_gae_equals_the_explicit_double_sum(gamma, gae_lambda):
    torch.manual_seed(0)
    spans = [(2, 7), (0, 3), (4, 5)]
    mask = response_mask(spans, 8)
    rewards, values = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    advantages = gae(rewards, values, mask, gamma, gae_lambda)
    for row, (start, end) in enumerate(spans):
        for t in range(8):
            expected = 0.0
            if start <= t < end:
                for i in range(t, end):
                    after = values[row, i + 1].item() if i + 1 < end else 0.0
                    delta = rewards[row, i].item() + gamma * after - values[row, i].item()
                    expected += (gamma * gae_lambda) ** (i - t) * delta
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)


def test_gae_with_lambda_one_gives_the_discounted_sum_of_rewards_as_return():
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[5.0, -3.0, 2.0]])
    advantages = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 0.5, 1.0)
    assert (advantages + values).tolist() == [[3.0, 4.0, 4.0]]


def test_gae_ignores_what_stands_outside_of_the_mask():
    torch.manual_seed(1)
    mask = response_mask([(1, 4)], 6)
    rewards, values = torch.randn(1, 6), torch.randn(1, 6)
    expected = gae(rewards, values, mask, 1.0, 0.95)
    dirty = gae(rewards.masked_fill(~mask, 1e9), values.masked_fill(~mask, float("nan")), mask, 1.0, 0.95)
    torch.testing.assert_close(dirty, expected)


# Two prompts of three responses; the sums of the first are 1, 2 and 6, of the second 4, 4 and 4.
REWARDS = torch.tensor(
    [[1.0, 0.0, 0.0], [3.0, -1.0, 0.0], [1.0, 2.0, 3.0], [4.0, 0.0, 0.0], [2.0, 2.0, 0.0], [1.0, 1.0, 2.0]]
)
MASK = response_mask([(0, 1), (0, 2), (0, 3), (0, 1), (0, 2), (0, 3)], 3)


def test_rloo_takes_the_mean_of_the_others_off():
    found = rloo(REWARDS, MASK, 3)
    expected = torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5, 0.0, 0.0, 0.0])
    torch.testing.assert_close(found, expected[:, None] * MASK)


def test_rloo_of_two_is_the_difference():
    mask = torch.ones(2, 1, dtype=torch.bool)
    assert rloo(torch.tensor([[5.0], [2.0]]), mask, 2).flatten().tolist() == [3.0, -3.0]


def test_rloo_baseline_leaves_the_policy_gradient_unbiased():
    # Two draws from three tokens: the expectation over all nine pairs is that of REINFORCE without a baseline.
    logits = torch.tensor([0.2, -0.5, 0.9], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, 5.0, -2.0], dtype=torch.float64)
    logprobs = logits.log_softmax(0)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            advantages = rloo(reward[[i, j]][:, None], torch.ones(2, 1, dtype=torch.bool), 2).flatten()
            chance = (logprobs[i] + logprobs[j]).exp().detach()
            total = total + chance * 0.5 * (advantages[0] * logprobs[i] + advantages[1] * logprobs[j])
    (found,) = torch.autograd.grad(total, logits)
    (expected,) = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_grpo_normalizes_within_a_prompt():
    found = grpo(REWARDS, MASK, 3)
    # Mean 3, sample deviation sqrt(7).
    expected = torch.tensor([-2.0, -1.0, 3.0]) / (7**0.5 + 1e-4)
    torch.testing.assert_close(found[:3], expected[:, None] * MASK[:3])
    assert found[3:].abs().max() == 0


def test_grpo_without_deviation_is_rloo_but_for_a_factor():
    plain = grpo(REWARDS, MASK, 3, divide_by_std=False)
    torch.testing.assert_close(plain, rloo(REWARDS, MASK, 3) * 2 / 3)


def test_reinforce_pp_normalizes_the_rewards_to_come_over_the_rollout():
    found = reinforce_pp(REWARDS, MASK, 1.0)
    to_come = torch.tensor([1.0, 2.0, -1.0, 6.0, 5.0, 3.0, 4.0, 4.0, 2.0, 4.0, 3.0, 2.0])
    expected = (to_come - to_come.mean()) / to_come.var(unbiased=False).sqrt()
    torch.testing.assert_close(found[MASK], expected)
    assert found[~MASK].abs().max() == 0


def test_reinforce_pp_discounts():
    rewards, mask = torch.tensor([[0.0, 0.0, 8.0], [0.0, 0.0, 0.0]]), torch.ones(2, 3, dtype=torch.bool)
    found = reinforce_pp(rewards, mask, 0.5)
    # 2, 4, 8 and three zeros.
    gaps = found[0] - found[1, 0]
    torch.testing.assert_close(gaps / gaps[0], torch.tensor([1.0, 2.0, 4.0]))


@pytest.mark.parametrize(
    "estimator",
    [
        lambda rewards, mask: rloo(rewards, mask, 3),
        lambda rewards, mask: grpo(rewards, mask, 3),
        lambda rewards, mask: reinforce_pp(rewards, mask, 0.9),
    ],
    ids=["rloo", "grpo", "reinforce_pp"],
)
def test_estimators_do_not_see_padding(estimator):
    expected = estimator(REWARDS, MASK)
    wide = torch.nn.functional.pad(REWARDS.masked_fill(~MASK, float("nan")), (2, 3), value=float("inf"))
    found = estimator(wide, torch.nn.functional.pad(MASK, (2, 3), value=False))
    torch.testing.assert_close(found[:, 2:5], expected)
    assert found[:, :2].abs().max() == found[:, 5:].abs().max() == 0
