"""Every loss over preferences against its paper's formula in float64, at step 0, and at extremes."""

import inspect
import math

import numpy as np
import pytest
import torch

from alignpipe.config import PREFERENCE_LOSSES, REFERENCE_FREE
from alignpipe.losses.dpo import LOSSES, Responses, kl_baseline, nll

SETTINGS = {
    "beta": 0.7,
    "label_smoothing": 0.2,
    "gamma_beta_ratio": 0.4,
    "desirable_weight": 1.5,
    "undesirable_weight": 0.5,
}


def apply(loss, chosen, rejected, **changed):
    keys = {key: {**SETTINGS, **changed}[key] for key in PREFERENCE_LOSSES[loss]}
    return LOSSES[loss](chosen, rejected, **keys)


def responses(logprobs, reference=0.0, lengths=1, baseline=0.0):
    logprobs = torch.as_tensor(logprobs, dtype=torch.float64)
    others = (torch.as_tensor(value, dtype=torch.float64) for value in (reference, lengths, baseline))
    return Responses(logprobs, *(value.expand(logprobs.shape) for value in others))


def random_side(seed, count=6, baseline=0.0):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 9, count)
    return responses(
        -lengths * generator.uniform(0.05, 2, count),
        -lengths * generator.uniform(0.05, 2, count),
        lengths,
        baseline,
    )


def s(x):
    return 1 / (1 + np.exp(-x))


def formula(name, c, r):
    """Each loss once more, from its paper, in numpy: c and r hold log pi, log ref, tokens and z."""
    (pc, fc, nc, z), (pr, fr, nr, _) = ([part.numpy() for part in side] for side in (c, r))
    b, e, g = SETTINGS["beta"], SETTINGS["label_smoothing"], SETTINGS["gamma_beta_ratio"]
    h = (pc - pr) - (fc - fr)
    h_mean = (pc - fc) / nc - (pr - fr) / nr
    odds = [np.exp(p / n) / (1 - np.exp(p / n)) for p, n in ((pc, nc), (pr, nr))]
    return {
        "sigmoid": lambda: -np.log(s(b * h)),
        "conservative": lambda: -(1 - e) * np.log(s(b * h)) - e * np.log(s(-b * h)),
        "robust": lambda: (-(1 - e) * np.log(s(b * h)) + e * np.log(s(-b * h))) / (1 - 2 * e),
        "hinge": lambda: np.maximum(0, 1 - b * h),
        "ipo": lambda: (h_mean - 1 / (2 * b)) ** 2,
        "sigmoid_norm": lambda: -np.log(s(b * h_mean)),
        "apo_zero": lambda: 1 - s(b * (pc - fc)) + s(b * (pr - fr)),
        "simpo": lambda: -np.log(s(b / nc * pc - b / nr * pr - g * b)),
        "orpo": lambda: -pc / nc - b * np.log(s(np.log(odds[0] / odds[1]))),
        "kto": lambda: np.concatenate([1.5 * (1 - s(b * (pc - fc - z))), 0.5 * (1 - s(b * (z - (pr - fr))))]),
    }[name]()


def sides_of(loss):
    chosen, rejected = random_side(1, baseline=0.3), random_side(2, baseline=0.3)
    if loss in REFERENCE_FREE:
        zeros = torch.zeros_like(chosen.reference)
        return chosen._replace(reference=zeros), rejected._replace(reference=zeros)
    return chosen, rejected


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_its_papers_formula(loss):
    chosen, rejected = sides_of(loss)
    found = apply(loss, chosen, rejected)
    np.testing.assert_allclose(found.losses.numpy(), formula(loss, chosen, rejected), rtol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_is_the_slope_of_the_formula(loss):
    chosen, rejected = sides_of(loss)
    for place, side in enumerate((chosen, rejected)):
        logprobs = side.logprobs.clone().requires_grad_()
        pair = [chosen, rejected]
        pair[place] = side._replace(logprobs=logprobs)
        apply(loss, *pair).losses.sum().backward()
        for row in range(len(logprobs)):
            ends = []
            for step in (1e-5, -1e-5):
                moved = side.logprobs.clone()
                moved[row] += step
                pair[place] = side._replace(logprobs=moved)
                ends.append(formula(loss, *pair).sum())
            assert logprobs.grad[row].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-8)


def test_config_names_exactly_the_keys_that_each_loss_takes():
    assert set(LOSSES) == set(PREFERENCE_LOSSES)
    for name, loss in LOSSES.items():
        taken = [key for key, found in inspect.signature(loss).parameters.items() if found.kind == 3]
        assert taken == list(PREFERENCE_LOSSES[name]), name


@pytest.mark.parametrize("loss", ["sigmoid", "conservative", "robust", "sigmoid_norm"])
def test_logistic_losses_are_ln2_where_the_policy_is_its_reference(loss):
    side = random_side(3)
    same = side._replace(logprobs=side.reference)
    found = apply(loss, same, same, beta=0.3)
    torch.testing.assert_close(found.losses, torch.full((6,), math.log(2), dtype=torch.float64))
    assert found.margins.abs().max() == found.chosen_rewards.abs().max() == 0


@pytest.mark.parametrize(
    ("loss", "expected"), [("hinge", 1), ("ipo", 1 / 1.96), ("apo_zero", 1), ("kto", None)]
)
def test_other_losses_where_the_policy_is_its_reference(loss, expected):
    side = random_side(3)
    same = side._replace(logprobs=side.reference)
    losses = apply(loss, same, same).losses.tolist()
    # A half of each weight: nothing is gained or lost yet.
    assert losses == pytest.approx([expected] * 6 if expected else [0.75] * 6 + [0.25] * 6)


def test_sigmoid_equals_the_bradley_terry_odds_of_the_probability_ratios():
    # With beta = 1 the preference probability is a / (a + b), a and b the ratios policy / reference.
    chosen = responses(np.log([0.3, 0.02]), np.log([0.2, 0.1]))
    rejected = responses(np.log([0.1, 0.4]), np.log([0.2, 0.1]))
    found = apply("sigmoid", chosen, rejected, beta=1.0)
    for i, (a, b) in enumerate([(1.5, 0.5), (0.2, 4.0)]):
        assert found.losses[i].item() == pytest.approx(-math.log(a / (a + b)))
        assert found.chosen_rewards[i].item() == pytest.approx(math.log(a))
        assert found.margins[i].item() == pytest.approx(math.log(a / b))


def test_conservative_is_least_at_the_odds_of_a_right_label():
    right = math.log(0.8 / 0.2) / SETTINGS["beta"]
    losses = [
        apply("conservative", responses([right + shift]), responses([0.0])).losses.item()
        for shift in (-0.1, 0.0, 0.1)
    ]
    assert losses[1] < min(losses[0], losses[2])


def test_robust_over_flipped_labels_has_the_expectation_of_dpo_over_true_ones():
    chosen, rejected = random_side(4), random_side(5)
    kept, flipped = apply("robust", chosen, rejected), apply("robust", rejected, chosen)
    expected = apply("sigmoid", chosen, rejected)
    torch.testing.assert_close(0.8 * kept.losses + 0.2 * flipped.losses, expected.losses)


def test_ipo_on_sums_would_be_another_loss():
    # OpenRLHF 0.8 squares the difference of summed log-ratios: its target moves with the length of a response.
    chosen, rejected = responses([-4.0], [-8.0], 4), responses([-9.0], [-6.0], 6)
    found = apply("ipo", chosen, rejected, beta=0.5).losses.item()
    assert found == pytest.approx((4 / 4 - -3 / 6 - 1) ** 2)
    assert found != pytest.approx((4 - -3 - 1) ** 2)


def test_losses_a_token_do_not_change_when_a_response_is_said_twice():
    once = responses([-3.0], [-2.0], 5), responses([-4.0], [-1.0], 3)
    twice = responses([-6.0], [-4.0], 10), responses([-8.0], [-2.0], 6)
    for loss in ("ipo", "sigmoid_norm", "simpo", "orpo"):
        assert apply(loss, *once).losses.item() == pytest.approx(apply(loss, *twice).losses.item())
    assert apply("sigmoid", *once).losses.item() != pytest.approx(apply("sigmoid", *twice).losses.item())


def test_kto_takes_sides_of_any_size():
    for good, bad in ((4, 2), (3, 0), (0, 2)):
        chosen, rejected = random_side(6, good, 0.1), random_side(7, bad, 0.1)
        found = apply("kto", chosen, rejected)
        assert (len(found.losses), len(found.chosen_rewards), len(found.rejected_rewards)) == (
            good + bad,
            good,
            bad,
        )
        alone = [apply("kto", random_side(6, good, 0.1), random_side(7, 0)).losses] if good else []
        assert not alone or torch.equal(found.losses[:good], alone[0])


def test_kl_baseline_is_the_mean_log_ratio_and_never_below_0():
    assert kl_baseline(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -3.0])) == pytest.approx(1.5)
    assert kl_baseline(torch.tensor([-5.0, -2.0]), torch.tensor([-3.0, -3.0])) == 0.0


def test_nll_is_a_token_mean_of_the_chosen_and_zero_after_it():
    chosen = responses([-4.0, -3.0], 0.0, torch.tensor([2, 6]))
    assert nll(chosen, torch.zeros(2)).tolist() == [2.0, 0.5]
    assert nll(chosen, torch.zeros(3)).tolist() == [2.0, 0.5, 0.0]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_losses_and_gradients_are_finite_at_extremes(loss, size):
    # A log-prob a token cannot be above 0, but for a hair.
    chosen = torch.tensor([min(size, 0.0)], requires_grad=True)
    rejected = torch.tensor([min(-size, 0.0)], requires_grad=True)
    reference = 0.0 if loss in REFERENCE_FREE else -size
    one, zero = torch.ones(1), torch.zeros(1)
    found = apply(
        loss,
        Responses(chosen, one * reference, one, zero),
        Responses(rejected, -one * reference, one, zero),
        beta=1.0,
    )
    found.losses.sum().backward()
    assert found.losses.isfinite().all()
    assert chosen.grad.isfinite().all() and rejected.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_rewards_and_margins_carry_no_gradient(loss):
    chosen, rejected = sides_of(loss)
    chosen.logprobs.requires_grad_()
    found = apply(loss, chosen, rejected)
    assert found.losses.requires_grad
    assert not any(part.requires_grad for part in found[1:])
