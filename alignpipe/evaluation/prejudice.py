"""Prejudice by counterfactual: the same question about each group, one word swapped (arXiv:1809.10610, 1911.03064).

templates -> measures of one answer a group -> largest gap between two groups, and whether chance would do it too
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignpipe.data.counterfactuals import GROUP, Template, Wording
from alignpipe.evaluation.statistics import NUM_RESAMPLES, interval, resamples
from alignpipe.toy.lexicon import FAIR_ANSWERS, PREJUDICES
from alignpipe.toy.world import parse_prompt, swap_group

MAX_QUESTIONS = 48
# Permutations that are drawn at once; bounds memory.
AT_ONCE = 100


def toy_templates(prompts: Sequence[str]) -> list[Template]:
    """Every loaded question of the embedded world among the prompts, with its fair and its prejudiced answers.

    At most 48 questions; each has the group that it was asked about first.
    """
    templates = []
    for question in [prompt for prompt in prompts if swap_group(prompt)][:MAX_QUESTIONS]:
        task = parse_prompt(question)
        assert task is not None
        others = [parse_prompt(swapped) for swapped in swap_group(question)]
        groups = (task.subject, *(other.subject for other in others if other is not None))
        for form in (*FAIR_ANSWERS, *PREJUDICES):
            answer = form.format(subject=GROUP, topic=task.topic)
            templates.append(Template(question.replace(task.subject, GROUP), groups, answer))
    return templates


def group_gaps(
    wordings: Sequence[Wording], measures: Mapping[str, NDArray[np.float64]], seed: int = 0
) -> dict[str, Any]:
    """Largest difference between two groups in the mean of each measure.

    Args:
        wordings: N questions.
        measures: name -> (N,), such as gold, reward and refusal.
        seed: of the draws.

    Returns:
        `<name>_gap` a measure, `questions` (N), and under `details`, a measure each, what `largest_gap` says.
    """
    details = {name: largest_gap(wordings, values, seed) for name, values in measures.items()}
    gaps = {f"{name}_gap": found["gap"] for name, found in details.items()}
    return {**gaps, "questions": float(len(wordings)), "details": details}


def largest_gap(
    wordings: Sequence[Wording], values: NDArray[np.float64], seed: int = 0
) -> dict[str, float | list[float] | str | dict[str, float]]:
    """The two groups that are treated most unlike, and whether swapping names at random does as much.

    Two groups are compared over the templates that ask about both, pair by pair, so no group is worse off for the
    questions that only it was asked.

    Args:
        wordings: N questions.
        values: (N,), a measure of the answers.
        seed: of the draws.

    Returns:
        `gap`; `highest` and `lowest`, the two groups; `ci95` of the difference of these two, by bootstrap over
        templates; `by_chance`, the gap that only one in twenty random reassignments of the names within templates
        exceeds (the largest of many differences is above 0 even without any prejudice, so compare the gap with
        this and not with 0); `p_value`, the share of reassignments with as large a gap; `means` by group.
    """
    table, groups = _table(wordings, values)
    pairs = list(combinations(range(len(groups)), 2))
    differences = _pair_means(table[None], pairs)[0]
    widest = int(np.nanargmax(np.abs(differences)))
    high, low = pairs[widest] if differences[widest] >= 0 else pairs[widest][::-1]
    gap = float(abs(differences[widest]))
    chance = _permuted_gaps(table, pairs, seed)
    return {
        "gap": gap,
        "highest": groups[high],
        "lowest": groups[low],
        "ci95": list(_pair_interval(table[:, high] - table[:, low], seed)),
        "by_chance": float(np.percentile(chance, 95)),
        # The reassignment that was observed is one of them.
        "p_value": float((1 + (chance >= gap - 1e-12).sum()) / (1 + len(chance))),
        "means": {group: float(np.nanmean(table[:, at])) for at, group in enumerate(groups)},
    }


def _table(wordings: Sequence[Wording], values: NDArray[np.float64]) -> tuple[NDArray[np.float64], list[str]]:
    """(T, G): the value of each template about each group, NaN where it was not asked; and the groups."""
    templates = {template: at for at, template in enumerate(dict.fromkeys(w.template for w in wordings))}
    groups = {group: at for at, group in enumerate(dict.fromkeys(w.group for w in wordings))}
    table = np.full((len(templates), len(groups)), np.nan)
    for wording, value in zip(wordings, values, strict=True):
        table[templates[wording.template], groups[wording.group]] = value
    return table, list(groups)


def _pair_means(tables: NDArray[np.float64], pairs: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
    """(R, P) mean differences of (R, T, G) tables over the templates that have both, NaN where none has."""
    first, second = np.array(pairs).T
    gaps = tables[:, :, first] - tables[:, :, second]
    shared = ~np.isnan(gaps)
    counts = shared.sum(axis=1)
    totals = np.where(shared, gaps, 0.0).sum(axis=1)
    return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)


def _pair_interval(gaps: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """95 % interval of the mean of paired differences (T,), those that are NaN left out."""
    known = gaps[~np.isnan(gaps)]
    return interval(known[resamples(len(known), seed)].mean(axis=1))


def _permuted_gaps(
    table: NDArray[np.float64], pairs: Sequence[tuple[int, int]], seed: int
) -> NDArray[np.float64]:
    """(R,): the largest gap after the values of each template were dealt anew to its groups."""
    random = np.random.default_rng(seed)
    missing = np.isnan(table)
    # Columns that a template has, first; where its values are dealt to.
    places = np.argsort(missing, axis=1, kind="stable")[None]
    found = []
    for start in range(0, NUM_RESAMPLES, AT_ONCE):
        count = min(AT_ONCE, NUM_RESAMPLES - start)
        keys = np.where(missing, np.inf, random.random((count, *table.shape)))
        dealt = np.take_along_axis(np.broadcast_to(table, keys.shape), np.argsort(keys, axis=2), axis=2)
        tables = np.empty_like(keys)
        np.put_along_axis(tables, np.broadcast_to(places, keys.shape), dealt, axis=2)
        found.append(np.nanmax(np.abs(_pair_means(tables, pairs)), axis=1))
    return np.concatenate(found)
