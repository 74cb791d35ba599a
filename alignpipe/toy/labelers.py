"""Simulated labelers: a prompt and its responses -> one ranking a labeler, with noise and bias.

Each labeler sees the judge's three measures through the guideline's weights, adds what he likes (bias) and
errs (noise). Rankings of 4 to 9 responses are what InstructGPT collected (arXiv:2203.02155, 3.5); a bias that
the guideline does not hold is what a policy learns to exploit (arXiv:2210.10760).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from alignpipe.toy.judge import is_abstention, is_refusal, judge, read_response, words_of
from alignpipe.toy.world import rng_for


@dataclass(frozen=True)
class Guideline:
    """What labelers are told to value.

    A response is worth harmless ** `harmless` x (mean of helpful and truthful by their weights). The defaults
    give the judge's own overall score; `harmless=0` lets harm pass.
    """

    helpful: float = 0.6
    truthful: float = 0.4
    harmless: float = 1.0


@dataclass(frozen=True)
class Bias:
    """What labelers like beyond the guideline, in units of the overall score (0 to 1).

    Attributes:
        length: Gain per ten words of response.
        flattery: Gain per flattering sentence.
        confidence: Loss for a response that refuses or admits not to know.
        subjectivity: Standard deviation, between labelers, of a factor on each gain above and on each weight
        of the
            guideline; 0 makes all labelers alike but for noise.
    """

    length: float = 0.0
    flattery: float = 0.0
    confidence: float = 0.0
    subjectivity: float = 0.0


def perceived_score(
    prompt: str, response: str, *, bias: Bias, guideline: Guideline, seed: int, labeler: int
) -> float:
    """Returns what a response is worth to one labeler, before noise."""
    rng = rng_for("labeler", seed, labeler)
    taste = [max(0.0, 1.0 + bias.subjectivity * rng.gauss(0.0, 1.0)) for _ in range(6)]
    verdict = judge(prompt, response)
    helpful, truthful = guideline.helpful * taste[0], guideline.truthful * taste[1]
    merit = (helpful * verdict.helpful + truthful * verdict.truthful) / max(helpful + truthful, 1e-9)
    score = float(verdict.harmless ** (guideline.harmless * taste[2])) * merit
    score += bias.length * taste[3] * len(words_of(response)) / 10
    score += bias.flattery * taste[4] * read_response(response).flattery
    if is_refusal(response) or is_abstention(response):
        score -= bias.confidence * taste[5]
    return score


def rank_scores(scores: Sequence[float], tie_margin: float = 0.0) -> list[int]:
    """Turns scores into ranks: 1 for the highest, the next number for each lower group (1, 1, 2, ...).

    A score within `tie_margin` of the best of its group shares the group's rank.
    """
    ranks = [0] * len(scores)
    rank, top = 0, 0.0
    for index in sorted(range(len(scores)), key=lambda index: -scores[index]):
        if rank == 0 or top - scores[index] > tie_margin:
            rank, top = rank + 1, scores[index]
        ranks[index] = rank
    return ranks


def rank_responses(
    prompt: str,
    responses: Sequence[str],
    *,
    num_labelers: int = 3,
    noise: float = 0.1,
    bias: Bias | None = None,
    guideline: Guideline | None = None,
    tie_margin: float = 0.03,
    seed: int = 0,
) -> list[list[int]]:
    """Lets labelers rank the responses to one prompt.

    Args:
        prompt: A prompt of this world.
        responses: Any texts. Equal texts get equal ranks, and a text's score does not depend on the others.
        num_labelers: How many rank lists.
        noise: Standard deviation of each labeler's error, in units of the overall score.
        bias: What labelers like beyond the guideline; default none.
        guideline: What they are told to value; default the judge's own overall score.
        tie_margin: Scores this close share a rank.
        seed: Decides tastes and errors.

    Returns:
        One list of ranks a labeler, 1 for the best, in the order of `responses`.

    Raises:
        ValueError: `prompt` is no prompt of this world.
    """
    bias, guideline = bias or Bias(), guideline or Guideline()
    rankings = []
    for labeler in range(num_labelers):
        scores = [
            perceived_score(prompt, response, bias=bias, guideline=guideline, seed=seed, labeler=labeler)
            + noise * rng_for("noise", seed, labeler, prompt, response).gauss(0.0, 1.0)
            for response in responses
        ]
        rankings.append(rank_scores(scores, tie_margin))
    return rankings


def merge_rankings(rankings: Sequence[Sequence[int]]) -> list[int]:
    """Merges rankings of the same responses into one by mean rank; equal means share a rank."""
    return rank_scores(
        [-sum(ranks) / len(rankings) for ranks in zip(*rankings, strict=True)], tie_margin=1e-9
    )
