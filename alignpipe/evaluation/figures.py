"""Columns of measurements -> the figures of a policy, each with its 95 % interval, and how they are written down."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignpipe.evaluation.overoptimization import equivalent_best_of_n
from alignpipe.evaluation.response_measures import Columns
from alignpipe.evaluation.responses import Response
from alignpipe.evaluation.rewards import TERM
from alignpipe.evaluation.statistics import Figure, mean_figure, paired_interval, ratio_figure
from alignpipe.evaluation.text_measures import distinct, expectation_adjusted_distinct, words_of
from alignpipe.evaluation.win_rate import differences, length_controlled_win_rate, preferences, win_rate
from alignpipe.objective import POLICY_FIGURES

Figures = dict[str, Figure]
# What a win is decided by -> its column.
WIN_JUDGES = {"gold": "gold.overall", "reward": "reward"}


def column_figures(columns: Columns) -> Figures:
    """Means over the prompts of columns (N, K), and what follows from a KL.

    `kl_per_token` weighs each token alike; `best_of_n` is the n whose best-of-n stands as far from the reference.
    """
    figures = {name: mean_figure(values.mean(axis=1)) for name, values in columns.items()}
    if "kl" in figures:
        figures["kl_per_token"] = ratio_figure(columns["kl"].mean(axis=1), columns["length"].mean(axis=1))
        # It rises with the KL, so the ends of its interval are those of the KL's.
        equivalents = [equivalent_best_of_n(kl) for kl in figures["kl"]]
        known = [n for n in equivalents if n is not None]
        if len(known) == len(equivalents):
            figures["best_of_n"] = Figure(*known)
    return figures


def variety_figures(responses: Sequence[Sequence[Response]], vocabulary_size: int) -> Figures:
    """How many different words and tokens there are over all responses to all prompts."""
    words = [[words_of(response.text) for response in row] for row in responses]
    ids = [[response.ids for response in row] for row in responses]
    found = {
        "distinct_1": distinct(words, 1),
        "distinct_2": distinct(words, 2),
        "expectation_adjusted_distinct": expectation_adjusted_distinct(ids, vocabulary_size),
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def win_figures(columns: Columns, against: Columns) -> Figures:
    """Win rates over another policy on the same prompts, by each judge there is, plain and at equal length."""
    longer = differences(columns["length"], against["length"])
    figures = {}
    for judge, column in WIN_JUDGES.items():
        if column in columns:
            won = preferences(columns[column], against[column])
            figures[f"win_rate.{judge}"] = win_rate(won)
            figures[f"length_controlled_win_rate.{judge}"] = length_controlled_win_rate(won, longer)
    return figures


def perplexity(logprobs: NDArray[np.float64], tokens: NDArray[np.float64]) -> Figure:
    """exp(-sum of logprobs / number of tokens) over rows (N,) of held-out text, its interval over the rows."""
    return Figure(*np.exp(ratio_figure(-logprobs, tokens)).tolist())


def written(figures: Figures, prejudice: Mapping[str, Any] | None) -> dict[str, Any]:
    """A policy's figures as scores.json holds them: values by name, nested at the dots, intervals under `ci95`.

    Whatever was not measured is null, so that every file has the same names.
    """
    result: dict[str, Any] = {}
    for name in POLICY_FIGURES:
        *above, last = name.split(".")
        if above == ["prejudice"]:
            continue
        place = result
        for part in above:
            place = place.setdefault(part, {})
        place[last] = figures[name].value if name in figures else None
    ends = {name: [figure.low, figure.high] for name, figure in figures.items()}
    terms = {
        name.removeprefix(TERM): figure.value for name, figure in figures.items() if name.startswith(TERM)
    }
    result["gold"]["ci95"] = ends.get("gold.overall")
    return {**result, **({"reward_terms": terms} if terms else {}), "ci95": ends, "prejudice": prejudice}


def gains(columns: Sequence[Columns]) -> list[dict[str, Any]]:
    """Gold gained from each policy to the next, on the same prompts."""
    found = []
    for index, (before, after) in enumerate(pairwise(columns)):
        if "gold.overall" in before:
            then, now = (column["gold.overall"].mean(axis=1) for column in (before, after))
            mean, ends = float((now - then).mean()), paired_interval(now, then)
            found.append({"before": index, "after": index + 1, "gold": mean, "ci95": list(ends)})
    return found
