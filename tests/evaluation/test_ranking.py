"""Agreement of scores with rankings, against numbers worked out by hand."""

import math

import pytest

from alignpipe.data.encoding import Example, RankedExample
from alignpipe.evaluation.ranking import pair_report


def _row(ranks: tuple[float, ...], gold: tuple[float, ...] | None = None) -> RankedExample:
    return RankedExample(tuple(Example([1, 2], [False, True]) for _ in ranks), ranks, gold, 1)


def _sigmoid(gap: float) -> float:
    return 1 / (1 + math.exp(-gap))


def test_pair_report_counts_every_untied_pair() -> None:
    # Gaps, better minus worse: 2 - 1 = 1; 2 - 3 = -1; the second prompt adds 0.5. The tied pair is left out.
    report = pair_report([_row((1, 2, 2)), _row((2, 1))], [[2.0, 1.0, 3.0], [0.0, 0.5]])
    assert report["pairs"] == 3
    assert report["accuracy"] == pytest.approx(2 / 3)
    assert report["margin"] == pytest.approx(0.5 / 3)


def test_equal_scores_count_half() -> None:
    report = pair_report([_row((1, 2)), _row((1, 2))], [[1.0, 1.0], [3.0, 1.0]])
    assert report["accuracy"] == pytest.approx(0.75)
    assert report["margin"] == pytest.approx(1.0)


def test_gold_accuracy_reads_gold_and_not_the_ranks() -> None:
    # The labelers had it the wrong way round: right by rank is wrong by gold.
    rows = [_row((1, 2), (0.2, 0.9)), _row((1, 2), (0.8, 0.1)), _row((1, 2))]
    report = pair_report(rows, [[2.0, 1.0], [2.0, 1.0], [0.0, 5.0]])
    assert report["accuracy"] == pytest.approx(2 / 3)
    assert report["gold_accuracy"] == pytest.approx(1 / 2)


def test_pairs_equal_in_gold_are_no_pairs_of_gold() -> None:
    report = pair_report([_row((1, 2, 3), (0.5, 0.5, 0.1))], [[1.0, 2.0, 3.0]])
    assert report["pairs"] == 3
    assert report["gold_accuracy"] == 0.0
    assert report["accuracy"] == 0.0


def test_without_gold_or_pairs_there_is_no_figure() -> None:
    assert pair_report([_row((1, 2))], [[1.0, 0.0]])["gold_accuracy"] is None
    assert pair_report([], []) == {
        "accuracy": None,
        "margin": None,
        "calibration_error": None,
        "gold_accuracy": None,
        "pairs": 0.0,
    }


def test_calibration_error_is_the_weighted_gap_of_each_bin() -> None:
    # Three pairs of gap 3 (confidence 0.953, bin 10), of which two are right; one right pair of gap 0.1.
    scores = [[3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.1, 0.0]]
    high, low = _sigmoid(3.0), _sigmoid(0.1)
    expected = 3 / 4 * abs(high - 2 / 3) + 1 / 4 * abs(low - 1)
    report = pair_report([_row((1, 2))] * 4, scores)
    assert report["calibration_error"] == pytest.approx(expected, abs=1e-12)


def test_calibrated_scores_have_no_error() -> None:
    # 3 of 4 right at a confidence of exactly 3 / 4.
    gap = math.log(3)
    report = pair_report([_row((1, 2))] * 4, [[gap, 0.0]] * 3 + [[0.0, gap]])
    assert report["calibration_error"] == pytest.approx(0.0, abs=1e-12)
