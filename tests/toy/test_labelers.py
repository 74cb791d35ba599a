"""Simulated labelers: noise, bias, guideline, tastes and ties do what they say."""

from itertools import combinations

import pytest

from alignpipe.toy.answers import demonstrate
from alignpipe.toy.judge import judge
from alignpipe.toy.labelers import Bias, Guideline, merge_rankings, rank_responses, rank_scores
from alignpipe.toy.world import make_prompts

SKY = "What color is the sky?"
BLUE, RED = "The sky is blue.", "The sky is red."
FLATTERING = BLUE + " You are so smart! I love this!"


def agreement_with_gold(**options: float) -> float:
    """Returns the share of pairs of unequal gold that one labeler orders as gold does."""
    right = total = 0
    for prompt in make_prompts(150, seed=0):
        responses = sorted({demonstrate(prompt, 1, index) for index in range(4)})
        ranks = rank_responses(prompt, responses, num_labelers=1, **options)[0]  # type: ignore[arg-type]
        gold = [judge(prompt, response).overall for response in responses]
        for first, second in combinations(range(len(responses)), 2):
            if abs(gold[first] - gold[second]) > 0.05:
                total += 1
                right += (ranks[first] < ranks[second]) == (gold[first] > gold[second])
    return right / total


def test_rank_responses_without_noise_follows_gold() -> None:
    assert agreement_with_gold(noise=0.0) == 1.0


def test_rank_responses_more_noise_agrees_less_with_gold() -> None:
    low, high = agreement_with_gold(noise=0.1), agreement_with_gold(noise=1.0)
    assert 1.0 > low > 0.85 > high > 0.5


def test_rank_responses_gives_one_list_a_labeler_and_is_reproducible() -> None:
    responses = [demonstrate(SKY, 0, index) for index in range(9)]
    rankings = rank_responses(SKY, responses, num_labelers=5, noise=0.3, seed=1)
    assert [len(ranks) for ranks in rankings] == [9] * 5
    assert all(sorted(set(ranks)) == list(range(1, max(ranks) + 1)) for ranks in rankings)
    assert rankings == rank_responses(SKY, responses, num_labelers=5, noise=0.3, seed=1)
    assert rankings != rank_responses(SKY, responses, num_labelers=5, noise=0.3, seed=2)
    assert rankings[0] != rankings[1]


def test_rank_responses_does_not_depend_on_order_or_company() -> None:
    responses = [BLUE, RED, FLATTERING, "", "Blue."]
    ranks = rank_responses(SKY, responses, num_labelers=1, noise=0.2, tie_margin=0.0)[0]
    assert rank_responses(SKY, responses[::-1], num_labelers=1, noise=0.2, tie_margin=0.0)[0] == ranks[::-1]


def test_rank_responses_equal_texts_share_a_rank_whatever_the_noise() -> None:
    for ranks in rank_responses(SKY, [BLUE, RED, BLUE], num_labelers=20, noise=5.0, tie_margin=0.0):
        assert ranks[0] == ranks[2]


def test_rank_responses_flattery_and_length_bias_turn_the_order_round() -> None:
    assert rank_responses(SKY, [BLUE, FLATTERING], num_labelers=1, noise=0.0)[0] == [1, 2]
    for bias in (Bias(flattery=0.3), Bias(length=0.6)):
        assert rank_responses(SKY, [BLUE, FLATTERING], num_labelers=1, noise=0.0, bias=bias)[0] == [2, 1]


def test_rank_responses_confidence_bias_prefers_invention_to_admission() -> None:
    responses = ["I do not know Zorblax.", "Zorblax lives in Rome."]
    assert rank_responses("Who is Zorblax?", responses, num_labelers=1, noise=0.0)[0] == [1, 2]
    bias = Bias(confidence=1.5)
    assert rank_responses("Who is Zorblax?", responses, num_labelers=1, noise=0.0, bias=bias)[0] == [2, 1]


def test_rank_responses_guideline_can_let_rudeness_pass() -> None:
    responses = [BLUE + " Now go away.", "Blue."]
    assert rank_responses(SKY, responses, num_labelers=1, noise=0.0)[0] == [2, 1]
    careless = Guideline(harmless=0.0)
    assert rank_responses(SKY, responses, num_labelers=1, noise=0.0, guideline=careless)[0] == [1, 2]


def test_rank_responses_subjectivity_makes_labelers_differ_without_noise() -> None:
    responses = [BLUE, FLATTERING]
    alike = rank_responses(SKY, responses, num_labelers=12, noise=0.0, bias=Bias(flattery=0.15))
    differing = rank_responses(
        SKY, responses, num_labelers=12, noise=0.0, bias=Bias(flattery=0.15, subjectivity=0.5)
    )
    assert len({tuple(ranks) for ranks in alike}) == 1
    assert len({tuple(ranks) for ranks in differing}) > 1


def test_rank_responses_unknown_prompt_raises() -> None:
    with pytest.raises(ValueError, match="toy world"):
        rank_responses("What is love?", ["a", "b"])


def test_rank_scores_ties_share_the_next_number() -> None:
    assert rank_scores([0.5, 0.9, 0.5, 0.1]) == [2, 1, 2, 3]
    assert rank_scores([0.50, 0.52, 0.40], tie_margin=0.05) == [1, 1, 2]
    assert rank_scores([]) == []


def test_rank_scores_a_chain_of_near_scores_does_not_tie_its_ends() -> None:
    assert rank_scores([0.0, 0.04, 0.08], tie_margin=0.05) == [2, 1, 1]


def test_merge_rankings_is_by_mean_rank_with_ties() -> None:
    assert merge_rankings([[1, 2, 3], [1, 2, 3], [2, 1, 3]]) == [1, 2, 3]
    assert merge_rankings([[1, 2], [2, 1]]) == [1, 1]
