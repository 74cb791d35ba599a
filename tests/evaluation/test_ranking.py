"""Agreement of scores with rankings, against numbers worked out by hand."""

import math

import pytest

from alignpipe.data.examples import Example, RankedExample
from alignpipe.evaluation.ranking import bucket_report, length_report, pair_report


def _row(
    ranks: tuple[float, ...], gold: tuple[float, ...] | None = None, lengths: tuple[int, ...] = ()
) -> RankedExample:
    """Responses of so many tokens, of one where no lengths are given, after a prompt of one."""
    sizes = lengths or (1,) * len(ranks)
    return RankedExample(tuple(Example([1] + [2] * n, [False] + [True] * n) for n in sizes), ranks, gold, 1)


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


def test_accuracy_by_rank_gap_counts_each_pair_in_its_bucket() -> None:
    # Ranks 1, 2, 4: one place apart and right (3 > 2), three apart and wrong (3 < 5), two apart and wrong (2 < 5).
    report = bucket_report([_row((1, 2, 4)), _row((1, 2))], [[3.0, 2.0, 5.0], [0.0, 1.0]])
    assert report["rank_gap"] == {
        "1-2": {"accuracy": 0.5, "pairs": 2},
        "2-3": {"accuracy": 0.0, "pairs": 1},
        "3+": {"accuracy": 0.0, "pairs": 1},
    }


def test_accuracy_by_score_gap_and_gold_gap() -> None:
    rows = [_row((1, 2), (0.9, 0.3)), _row((1, 2), (0.2, 0.25)), _row((1, 2))]
    report = bucket_report(rows, [[2.0, 0.0], [0.0, 0.6], [0.1, 0.0]])
    # A gap of exactly 2 opens the last bucket. By rank the second is wrong, by gold right.
    assert report["score_gap"] == {
        "0-0.5": {"accuracy": 1.0, "pairs": 1},
        "0.5-1": {"accuracy": 0.0, "pairs": 1},
        "2+": {"accuracy": 1.0, "pairs": 1},
    }
    assert report["gold_gap"] == {
        "0-0.1": {"accuracy": 1.0, "pairs": 1},
        "0.5+": {"accuracy": 1.0, "pairs": 1},
    }


def test_length_report_by_hand() -> None:
    rows = [_row((1, 2), lengths=(4, 2)), _row((2, 1), lengths=(3, 1)), _row((1, 2), lengths=(5, 5))]
    scores = [[8.0, 2.0], [4.0, 1.0], [16.0, 16.0]]
    report = length_report(rows, scores)
    # Longer is better, longer is worse, equal: 1 + 0 + 1/2 of 3.
    assert report["length_accuracy"] == pytest.approx(0.5)
    # Scores rise with length, not in a line: the order agrees wholly.
    assert report["length_spearman"] == pytest.approx(1.0)
    lengths, flat = [4, 2, 3, 1, 5, 5], [8, 2, 4, 1, 16, 16]
    middle, centre = sum(lengths) / 6, sum(flat) / 6
    shared = sum((a - middle) * (b - centre) for a, b in zip(lengths, flat, strict=True))
    spread = [sum((x - m) ** 2 for x in column) for column, m in ((lengths, middle), (flat, centre))]
    assert report["length_pearson"] == pytest.approx(shared / math.sqrt(spread[0] * spread[1]))


def test_tied_values_share_the_mean_of_their_places() -> None:
    # Lengths 1, 1, 2, 3 have the places 1.5, 1.5, 3, 4; scores 1, 2, 3, 4 their own: rho = 4.5 / sqrt(4.5 * 5).
    report = length_report([_row((1, 2, 3, 4), lengths=(1, 1, 2, 3))], [[1.0, 2.0, 3.0, 4.0]])
    assert report["length_spearman"] == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_equal_lengths_have_no_correlation_and_no_rows_no_figure() -> None:
    assert length_report([_row((1, 2))], [[1.0, 0.0]]) == {
        "length_pearson": None,
        "length_spearman": None,
        "length_accuracy": 0.5,
    }
    assert length_report([], [])["length_accuracy"] is None
    assert bucket_report([], []) == {"rank_gap": {}, "score_gap": {}, "gold_gap": {}}
