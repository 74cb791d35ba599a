"""dpo_loss from probabilities, at step 0, and at extremes."""

import math

import pytest
import torch

from alignpipe.losses.dpo import dpo_loss


def logs(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_dpo_loss_is_ln2_where_the_policy_is_its_reference():
    chosen, rejected = torch.randn(5), torch.randn(5)
    found = dpo_loss(chosen, rejected, chosen, rejected, beta=0.3)
    torch.testing.assert_close(found.losses, torch.full((5,), math.log(2)))
    assert found.chosen_rewards.abs().max() == found.rejected_rewards.abs().max() == 0


def test_dpo_loss_equals_the_bradley_terry_odds_of_the_probability_ratios():
    # With beta = 1 the preference probability is a / (a + b), a and b the ratios policy / reference.
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = (
        (0.3, 0.02),
        (0.1, 0.4),
        (0.2, 0.1),
        (0.2, 0.1),
    )
    found = dpo_loss(
        logs(*policy_chosen),
        logs(*policy_rejected),
        logs(*reference_chosen),
        logs(*reference_rejected),
        beta=1.0,
    )
    for i in range(2):
        a, b = policy_chosen[i] / reference_chosen[i], policy_rejected[i] / reference_rejected[i]
        assert found.losses[i].item() == pytest.approx(-math.log(a / (a + b)))
        assert found.chosen_rewards[i].item() == pytest.approx(math.log(a))


def test_dpo_loss_beta_is_a_power_of_the_odds():
    found = dpo_loss(logs(0.4), logs(0.1), logs(0.1), logs(0.1), beta=0.5)
    assert found.losses.item() == pytest.approx(-math.log(2 / 3))


def test_dpo_gradient_raises_chosen_and_lowers_rejected_by_beta_times_doubt():
    chosen = torch.zeros(1, requires_grad=True)
    rejected = torch.zeros(1, requires_grad=True)
    dpo_loss(chosen, rejected, torch.zeros(1), torch.zeros(1), beta=0.1).losses.sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.05)
    assert rejected.grad.item() == pytest.approx(0.05)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_dpo_gradients_are_finite_at_extremes(size):
    chosen = torch.tensor([size], requires_grad=True)
    found = dpo_loss(chosen, torch.tensor([-size]), torch.zeros(1), torch.zeros(1), beta=1.0)
    found.losses.sum().backward()
    assert found.losses.isfinite().all()
    assert chosen.grad.item() == (0.0 if size > 0 else -1.0)


def test_dpo_rewards_carry_no_gradient():
    found = dpo_loss(
        torch.zeros(1, requires_grad=True), torch.zeros(1), torch.zeros(1), torch.zeros(1), beta=1.0
    )
    assert not found.chosen_rewards.requires_grad
    assert not found.rejected_rewards.requires_grad
