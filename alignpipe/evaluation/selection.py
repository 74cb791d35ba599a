"""Chooses the demonstrations worth training on by what models think of them.

IFD: instruction-following difficulty (Cherry LLM, arXiv:2308.12032, equation 4); k-center (arXiv:1708.00489,
algorithm 1).

encoded rows -> refusals, a score each, the best of them, spread out -> indices of the chosen, `selection.jsonl`
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignpipe import processes
from alignpipe.artifact import write_text
from alignpipe.config import SelectionConfig, SFTConfig
from alignpipe.data.encoding import encode_demonstrations
from alignpipe.data.examples import Example
from alignpipe.data.mixture import Portion
from alignpipe.data.order import order
from alignpipe.data.selection import Refusal, refusals
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import DataError
from alignpipe.evaluation.rewards import load_reward_model
from alignpipe.rollout.score import sequence_embeddings, sequence_logprobs
from alignpipe.training.context import Context

SELECTION = "selection.jsonl"
# Rows scored between two looks at the stop signal.
ROWS_PER_RECORD = 1024
# k-center chooses among the best so many times the rows that are kept.
POOL = 2


@dataclass(frozen=True)
class Judge:
    """What a method scores rows with.

    Attributes:
        config: of the stage.
        policy: that will be trained.
        tokenizer: of the policy.
        context: other models, journals.
    """

    config: SFTConfig
    policy: PreTrainedModel
    tokenizer: Tokenizer
    context: Context

    def model(self) -> PreTrainedModel:
        """The language model that is asked."""
        if self.config.selection_model is None:
            return self.policy
        self.context.check_same_tokens("selection_model", self.tokenizer)
        return self.context.load_policy("selection_model", self.tokenizer, frozen=True)


def select(portion: Portion, judge: Judge) -> tuple[Sequence[int], dict[str, int]]:
    """Choose the rows to train on, and write down what became of each.

    Args:
        portion: the rows, demonstrations that fit into the length.
        judge: how they are scored, and by what.

    Returns:
        Indices of the chosen rows, ascending, and how many rows met each fate; all rows where selection is off.

    Raises:
        Stopped: a signal came; scores made so far are kept.
        DataError: no row is left.
    """
    config, selection = judge.config, judge.config.selection
    if not selection.is_on:
        return range(len(portion.records)), {}
    # What is judged is the last response, whatever is learnt.
    overflow, limit = config.data.on_overflow, config.max_length
    responses = encode_demonstrations(portion.records, judge.tokenizer, limit, overflow, "last").examples
    verdicts = refusals(portion.records, [row.num_items for row in responses], selection)
    scores: dict[int, float] = {}
    if selection.method != "none":
        fit = _fit(verdicts)
        found = METHODS[selection.method].score(judge, [responses[index] for index in fit])
        scores = dict(zip(fit, found, strict=True))
    if selection.method == "ifd":
        # The instruction makes such an answer less likely: it does not belong to it.
        verdicts = [Refusal("ifd_above_1") if scores.get(i, 0.0) >= 1 else v for i, v in enumerate(verdicts)]
    fit, wanted = _fit(verdicts), max(1, round(selection.keep * len(responses)))
    best = _best(fit, scores, selection, wanted)
    kept = _spread_out(judge, best, responses, wanted) if selection.diversity == "kcenter" and best else best
    for index in set(fit) - set(kept):
        verdicts[index] = Refusal("covered" if index in set(best) else "below_keep")
    fates = Counter("kept" if verdict is None else verdict.reason for verdict in verdicts)
    if not kept:
        counts = ", ".join(f"{count} {fate}" for fate, count in fates.most_common())
        raise DataError(f"selection: none of {len(responses)} rows is left ({counts}); loosen its bounds")
    _write(judge.context, portion, verdicts, scores)
    return sorted(kept), {f"selection_{fate}": count for fate, count in sorted(fates.items())}


def instruction_following_difficulty(given: Tensor, alone: Tensor) -> Tensor:
    """IFD = ppl(answer | instruction) / ppl(answer) = exp(L(answer | instruction) - L(answer)), equation 4.

    Args:
        given: (N,), mean loss of an answer's tokens after its instruction, nats.
        alone: (N,), the same without it.

    Returns:
        (N,); 1 where the instruction does not help at all.
    """
    return (given - alone).exp()


def k_center(points: Tensor, count: int, first: int) -> list[int]:
    """Greedy k-center: again and again the point that is farthest from all chosen (arXiv:1708.00489, algorithm 1).

    The radius that is left is at most twice the least possible. Takes count passes over all points.

    Args:
        points: (N, d).
        count: points to choose, at most N.
        first: index of the first one.

    Returns:
        Indices in the order they were chosen.
    """
    chosen = [first]
    nearest = (points - points[first]).norm(dim=1)
    while len(chosen) < count:
        nearest[chosen[-1]] = -1.0
        farthest = int(nearest.argmax())
        chosen.append(farthest)
        nearest = torch.minimum(nearest, (points - points[farthest]).norm(dim=1))
    return chosen


def answer_alone(row: Example) -> Example:
    """The response of a row without its prompt, but for the prompt's first token: something must stand before it."""
    begin = row.mask.index(True)
    return Example([row.ids[0], *row.ids[begin:]], [False, *row.mask[begin:]])


def _random(judge: Judge, rows: Sequence[Example]) -> list[float]:
    return [float(place) for place in order(judge.config.seed, 0, len(rows))]


def _perplexity(judge: Judge, rows: Sequence[Example]) -> list[float]:
    losses = _scored(judge, rows, "given", _mean_losses(judge, judge.model()))
    return torch.tensor(losses, dtype=torch.float64).exp().tolist()


def _ifd(judge: Judge, rows: Sequence[Example]) -> list[float]:
    losses = _mean_losses(judge, judge.model())
    given = _scored(judge, rows, "given", losses)
    alone = _scored(judge, [answer_alone(row) for row in rows], "alone", losses)
    found = instruction_following_difficulty(*torch.tensor([given, alone], dtype=torch.float64))
    values: list[float] = found.tolist()
    return values


def _reward(judge: Judge, rows: Sequence[Example]) -> list[float]:
    judge.context.check_same_tokens("reward_model", judge.tokenizer)
    reward_model = load_reward_model(judge.context, judge.tokenizer, judge.config.micro_batch_size)
    return _scored(judge, rows, "reward", lambda part: reward_model(part).tolist())


class Method(NamedTuple):
    """How rows are scored, and whether the highest scores are the best."""

    score: Callable[[Judge, Sequence[Example]], list[float]]
    highest_first: bool


METHODS = {
    "random": Method(_random, True),
    "perplexity": Method(_perplexity, False),
    "ifd": Method(_ifd, True),
    "reward": Method(_reward, True),
}


def _fit(verdicts: Sequence[Refusal | None]) -> list[int]:
    return [index for index, verdict in enumerate(verdicts) if verdict is None]


def _best(
    fit: Sequence[int], scores: Mapping[int, float], selection: SelectionConfig, wanted: int
) -> list[int]:
    """The rows to keep, best first; where they are to be spread out as well, a pool to choose them from."""
    if not scores:
        return list(fit)
    sign = -1 if METHODS[selection.method].highest_first else 1
    ranked = sorted(fit, key=lambda index: sign * scores[index])
    return ranked[: POOL * wanted if selection.diversity == "kcenter" else wanted]


def _mean_losses(judge: Judge, model: PreTrainedModel) -> Callable[[Sequence[Example]], list[float]]:
    """Rows -> mean loss of their learnt tokens under a model, nats."""

    def losses(rows: Sequence[Example]) -> list[float]:
        pad_id, size = judge.tokenizer.pad_id, judge.config.micro_batch_size
        with judge.context.autocast():
            logprobs = sequence_logprobs(model, rows, pad_id, size).double()
        found: list[float] = (-logprobs / torch.tensor([row.num_items for row in rows])).tolist()
        return found

    return losses


def _scored(
    judge: Judge, rows: Sequence[Example], name: str, score: Callable[[Sequence[Example]], list[float]]
) -> list[float]:
    """Score rows part by part, each part kept, so that a stopped stage goes on where it was."""
    journal = judge.context.journal(f"selection_{name}")
    found = [value for record in processes.from_main(journal.read) for value in record["scores"]]
    judge.context.progress.begin(f"selecting by {judge.config.selection.method}", len(rows), len(found))
    while len(found) < len(rows):
        judge.context.check_stop()
        scores = score(rows[len(found) : len(found) + ROWS_PER_RECORD])
        processes.from_main(partial(journal.append, [{"scores": scores}]))
        found += scores
        judge.context.progress.update(len(found))
    return found


def _spread_out(judge: Judge, pool: Sequence[int], responses: Sequence[Example], wanted: int) -> list[int]:
    """The rows of a pool that k-center chooses: from the best one on, or from the one in the middle of all."""
    model, rows = judge.model(), [responses[index] for index in pool]
    with judge.context.autocast():
        points = sequence_embeddings(model, rows, judge.tokenizer.pad_id, judge.config.micro_batch_size)
    ranked = judge.config.selection.method != "none"
    first = 0 if ranked else int((points - points.mean(0)).norm(dim=1).argmin())
    return [pool[index] for index in k_center(points, min(wanted, len(pool)), first)]


def _write(
    context: Context, portion: Portion, verdicts: Sequence[Refusal | None], scores: Mapping[int, float]
) -> None:
    """One line a row: where it stands, whether it is kept or why not, its score."""
    lines = []
    for index, verdict in enumerate(verdicts):
        line: dict[str, Any] = {"row": index, "place": portion.places[index], "kept": verdict is None}
        if verdict is not None:
            line["reason"] = verdict.reason
        if verdict is not None and verdict.like is not None:
            line["like"] = portion.places[verdict.like]
        if index in scores:
            line["score"] = scores[index]
        lines.append(json.dumps(line) + "\n")
    processes.from_main(lambda: write_text(context.result / SELECTION, "".join(lines)))
