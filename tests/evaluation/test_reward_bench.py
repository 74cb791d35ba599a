"""RewardBench's sections by hand, its weights, and rows read and scored from a file in its layout."""

import json
from pathlib import Path

import pytest

from alignpipe.data.examples import Example
from alignpipe.data.reward_bench import read_reward_bench
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import DataError
from alignpipe.evaluation.reward_bench import SECTIONS, benchmark_report, score_reward_bench


def _write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _row(subset: str, chosen: str, rejected: str) -> dict[str, object]:
    return {"prompt": "How many?", "chosen": chosen, "rejected": rejected, "subset": subset, "id": 7}


def test_there_are_23_subsets_and_math_weighs_as_all_of_the_code() -> None:
    assert sum(len(counts) for counts in SECTIONS.values()) == 23
    reasoning = SECTIONS["Reasoning"]
    assert reasoning["math-prm"] == sum(n for name, n in reasoning.items() if name != "math-prm") == 984
    assert {section: sum(counts.values()) for section, counts in SECTIONS.items()} == {
        "Chat": 358,
        "Chat Hard": 456,
        "Safety": 740,
        "Reasoning": 1968,
    }


def test_section_is_the_mean_over_its_subsets_by_their_listed_counts() -> None:
    report = benchmark_report(
        {
            "math-prm": [True, False],
            "hep-cpp": [True],
            "alpacaeval-easy": [True, True, True, False],
            "mt-bench-easy": [False],
            "mine": [True, True, False],
            "yours": [False],
        }
    )
    assert report["sections"] == {
        "Reasoning": pytest.approx((0.5 * 984 + 164) / (984 + 164)),
        "Chat": pytest.approx(0.75 * 100 / 128),
        # Unknown subsets count by their pairs, and not towards the score.
        "other": pytest.approx(2 / 4),
    }
    sections = report["sections"]
    assert report["score"] == pytest.approx((sections["Reasoning"] + sections["Chat"]) / 2)
    assert report["subsets"]["math-prm"] == {"accuracy": 0.5, "pairs": 2}


def test_a_file_of_unknown_subsets_has_no_score() -> None:
    assert benchmark_report({"mine": [True]}) == {
        "score": None,
        "sections": {"other": 1.0},
        "subsets": {"mine": {"accuracy": 1.0, "pairs": 1}},
    }


def test_pairs_are_scored_and_a_tie_is_no_win(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        _row("hep-go", "It is 3.", "No."),
        _row("hep-go", "No.", "It is 3."),
        _row("hep-js", "It is 3.", "It is 4."),
    ]
    pairs = read_reward_bench(_write(tmp_path / "bench.jsonl", rows))

    def lengths(examples: list[Example]) -> list[float]:
        return [float(len(example.ids)) for example in examples]

    report = score_reward_bench(pairs, tokenizer, 64, lengths)
    assert report["subsets"] == {
        "hep-go": {"accuracy": 0.5, "pairs": 2},
        "hep-js": {"accuracy": 0.0, "pairs": 1},
    }
    assert report["cut"] == 0
    # Over the length both sides are cut; the pair stays in the count.
    short = score_reward_bench(
        pairs, tokenizer, max(map(len, (p.ranking.prompt for p in pairs))) + 3, lengths
    )
    assert short["cut"] == 3
    assert sum(found["pairs"] for found in short["subsets"].values()) == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"subset": None}, "subset"),
        ({"rejected": "It is 3."}, "chosen and rejected are equal"),
        ({"chosen": ""}, "chosen"),
    ],
)
def test_a_row_that_cannot_be_scored_stops_with_its_line(
    tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    rows = [_row("hep-go", "It is 3.", "No."), {**_row("hep-go", "It is 3.", "No."), **change}]
    with pytest.raises(DataError, match=rf"bench.jsonl:2: .*{reason}"):
        read_reward_bench(_write(tmp_path / "bench.jsonl", rows))


def test_a_file_of_another_layout_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(DataError, match=r"pairs.jsonl:1: lacks subset; .* prompt, chosen, rejected, subset"):
        read_reward_bench(path)
