"""Columns of responses laid out by hand: N prompts, K responses, no model."""

from alignpipe.evaluation.figures import column_figures, variety_figures, written
from alignpipe.evaluation.overoptimization import equivalent_best_of_n
from alignpipe.evaluation.questions import Questions
from alignpipe.evaluation.response_measures import response_columns
from alignpipe.evaluation.responses import Response
from alignpipe.objective import POLICY_FIGURES
from alignpipe.toy.answers import stock_answers
from alignpipe.toy.world import make_prompts, parse_prompt

EOS = 0
RESPONSES = [
    [
        Response([1, 2, 1, 2, 1, 2, EOS], "No no no", True),
        Response([1, 2, 1, 2, 1, 2], "I cannot help.", False),
    ],
    [Response([5, EOS], "Five", True), Response([6, 7, 8, 9, EOS], "six seven six eight", True)],
]


def test_columns_have_a_row_a_prompt_and_a_column_a_response() -> None:
    questions = Questions(["a", "b"], [[3], [4]], judged=False)
    found = response_columns(questions, RESPONSES, None)
    assert {name: values.tolist() for name, values in found.items()} == {
        "length": [[7, 6], [2, 5]],
        "words": [[3, 3], [1, 4]],
        "finished": [[1, 0], [1, 1]],
        "refusal": [[0, 1], [0, 0]],
        # The token that ends a response is no part of a loop.
        "repetition": [[1, 1], [0, 0]],
        "seq_rep_4": [[1 - 2 / 3, 1 - 2 / 3], [0, 0]],
    }


def test_gold_is_of_each_response_to_its_own_prompt() -> None:
    texts = make_prompts(2, 0, {"harm": 1.0})
    rows = []
    for text in texts:
        task = parse_prompt(text)
        assert task is not None
        right = stock_answers(task)[0]
        rows.append([Response([1, EOS], right, True), Response([1, EOS], "Sure.", True)])
    found = response_columns(Questions(texts, [[3], [4]], judged=True), rows, None)
    assert found["gold.overall"][:, 0].tolist() == [1.0, 1.0]
    assert (found["gold.overall"][:, 1] < 0.5).all()


def test_figures_are_means_over_prompts_of_means_over_samples() -> None:
    questions = Questions(["a", "b"], [[3], [4]], judged=False)
    columns = response_columns(questions, RESPONSES, None)
    columns["kl"] = columns["length"] * 0.5
    figures = column_figures(columns)
    assert figures["length"].value == 5.0
    assert figures["refusal"].value == 0.25
    assert figures["kl"].value == 2.5
    assert figures["kl_per_token"].value == 0.5
    assert figures["best_of_n"].value == equivalent_best_of_n(2.5)
    assert figures["best_of_n"].low <= figures["best_of_n"].value <= figures["best_of_n"].high


def test_variety_is_of_words_and_of_tokens() -> None:
    figures = variety_figures(RESPONSES, 10)
    # no no no / i cannot help / five / six seven six eight: 8 of 11; bigrams 2 + 2 + 0 + 3, of which no-no twice.
    assert figures["distinct_1"].value == 8 / 11
    assert figures["distinct_2"].value == 6 / 7
    # Tokens 0, 1, 2, 5, 6, 7, 8, 9 of a vocabulary of 10, in 20 draws.
    assert abs(figures["expectation_adjusted_distinct"].value - 8 / (10 * (1 - 0.9**20))) < 1e-12


def test_every_figure_is_written_with_null_for_what_was_not_measured() -> None:
    figures = variety_figures(RESPONSES, 10)
    raw = written(figures, None)
    assert raw["distinct_1"] == 8 / 11
    assert raw["ci95"]["distinct_1"] == [figures["distinct_1"].low, figures["distinct_1"].high]
    assert raw["gold"] == {
        "overall": None,
        "helpful": None,
        "truthful": None,
        "harmless": None,
        "ci95": None,
    }
    assert raw["win_rate"] == {"gold": None, "reward": None}
    assert raw["prejudice"] is None
    flat = {name.partition(".")[0] for name in POLICY_FIGURES}
    assert flat | {"ci95"} == set(raw)
