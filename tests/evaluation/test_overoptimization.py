"""Curves are found again from points that were made of them; best-of-n is inverted."""

import math

import numpy as np
import pytest

from alignpipe.evaluation.overoptimization import equivalent_best_of_n, fit_curve, fit_overoptimization
from alignpipe.losses.best_of_n import best_of_n_kl

KL = [0.04, 0.25, 1.0, 2.25, 4.0, 9.0, 16.0]


def _rl(kl: float, a: float, b: float) -> float:
    d = math.sqrt(kl)
    return d * (a - b * math.log(d))


def _best_of_n(kl: float, a: float, b: float) -> float:
    d = math.sqrt(kl)
    return d * (a - b * d)


def test_rl_curve_is_found_again_and_peaks_where_its_slope_is_zero() -> None:
    curve = fit_curve(KL, [_rl(kl, 0.9, 0.6) for kl in KL])
    assert (curve.a, curve.b) == pytest.approx((0.9, 0.6))
    assert curve.error == pytest.approx(0.0, abs=1e-12)
    # dR/dd = a - b - b ln d = 0: d = exp(0.5), KL = e, gain = b d.
    assert curve.peak_kl == pytest.approx(math.e)
    assert curve.peak_gain == pytest.approx(0.6 * math.exp(0.5))
    assert curve.gain(4.0) == pytest.approx(_rl(4.0, 0.9, 0.6))
    assert curve.gain(0.0) == 0.0


def test_best_of_n_curve_is_found_again_and_peaks_half_way_to_zero() -> None:
    curve = fit_curve(KL, [_best_of_n(kl, 0.8, 0.2) for kl in KL], "best_of_n")
    assert (curve.a, curve.b) == pytest.approx((0.8, 0.2))
    # d = a / (2 b) = 2, gain = a^2 / (4 b) = 0.8.
    assert curve.peak_kl == pytest.approx(4.0)
    assert curve.peak_gain == pytest.approx(0.8)
    assert curve.gain(16.0) == pytest.approx(0.0, abs=1e-12)


def test_curve_is_found_through_noise() -> None:
    random = np.random.default_rng(0)
    kl = np.linspace(0.1, 20, 400)
    noisy = [_rl(at, 0.7, 0.35) + random.normal(scale=0.05) for at in kl]
    curve = fit_curve(kl.tolist(), noisy)
    assert (curve.a, curve.b) == pytest.approx((0.7, 0.35), abs=0.03)
    assert curve.error == pytest.approx(0.05, rel=0.15)


def test_curve_that_does_not_bend_down_has_no_peak() -> None:
    rising = fit_curve(KL, [math.sqrt(kl) for kl in KL])
    assert rising.b == pytest.approx(0.0, abs=1e-12)
    assert fit_curve(KL, [_rl(kl, 0.5, -0.1) for kl in KL]).peak_kl is None
    assert fit_curve(KL, [_best_of_n(kl, -0.5, 0.1) for kl in KL], "best_of_n").peak_kl == 0.0


def test_gold_and_proxy_have_a_curve_each() -> None:
    found = fit_overoptimization(KL, [_rl(kl, 0.9, 0.6) for kl in KL], [_rl(kl, 1.2, 0.1) for kl in KL])
    assert found.gold.peak_kl == pytest.approx(math.e)
    assert found.proxy.b == pytest.approx(0.1)


def test_points_that_sampling_put_at_or_below_zero_are_left_out() -> None:
    gains = [_rl(kl, 0.9, 0.6) for kl in KL]
    curve = fit_curve([0.0, -0.01, *KL], [9.0, -9.0, *gains])
    assert (curve.a, curve.b) == pytest.approx((0.9, 0.6))


def test_too_few_distances_are_refused() -> None:
    with pytest.raises(ValueError, match="two different distances"):
        fit_curve([0.0, 1.0, 1.0], [0.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="no form 'bon'"):
        fit_curve(KL, KL, "bon")


def test_equivalent_best_of_n_inverts_its_kl() -> None:
    for n, kl in enumerate(best_of_n_kl(64).tolist(), 1):
        assert equivalent_best_of_n(kl) == pytest.approx(n, rel=1e-9)
    assert equivalent_best_of_n(math.log(1e9) - (1e9 - 1) / 1e9) == pytest.approx(1e9, rel=1e-9)
    assert equivalent_best_of_n(-0.2) == 1.0
    assert equivalent_best_of_n(1e4) is None
