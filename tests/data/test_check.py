"""The report on a data set: counts, faults, repeats, lengths."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignpipe.config import DataConfig
from alignpipe.data.check import check_data, print_report
from alignpipe.data.records import Message
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import DataError

Write, Config = Callable[[str, Any], Path], Callable[..., DataConfig]
PAIRS = [
    {"prompt": "a?", "chosen": "yes", "rejected": "no"},
    {"prompt": "a?", "chosen": "no", "rejected": "yes"},
    {"prompt": "b?", "chosen": "one<eos>", "rejected": "two"},
    {"prompt": "b?", "chosen": "one<eos>", "rejected": "two"},
    {"prompt": "c?", "chosen": "same", "rejected": "same"},
    {"prompt": "d?", "chosen": "", "rejected": "x"},
    {"prompt": "e?", "chosen": "same", "rejected": "same"},
]


def test_check_data_of_pairs_counts_everything(write: Write, config: Config) -> None:
    path = write("pairs.jsonl", PAIRS)
    report = check_data(config(path=str(path)))
    assert (report["format"], report["kind"], report["columns"]) == (
        "preference",
        "file",
        ["prompt", "chosen", "rejected"],
    )
    assert (report["rows"], report["usable"], report["bad_allowed"]) == (7, 4, False)
    assert report["bad"] == [
        {"reason": "chosen and rejected are equal", "rows": 2, "first": f"{path}:5"},
        {"reason": "chosen is empty", "rows": 1, "first": f"{path}:6"},
    ]
    assert (report["duplicates"], report["first_duplicate"]) == (1, f"{path}:4")
    assert (report["same_prompt"], report["contradictions"]) == (1, 1)
    assert report["types"] == ["demonstrations", "prompts", "rankings"]
    assert report["stages"] == ["rm", "dpo", "sft", "collect", "rs", "ppo", "eval"]
    assert sum(report["shares"].values()) == 4
    assert report["lengths"]["percentiles"] == {"50": 10, "90": 10, "99": 10, "100": 10}
    assert json.loads(json.dumps(report)) == report


def test_check_data_with_tokenizer_measures_tokens(write: Write, config: Config) -> None:
    path = write("pairs.jsonl", PAIRS[:3])
    tokenizer = Tokenizer.toy()
    lengths = [
        len(tokenizer.encode_prompt(read_prompt("a?")))
        + len(tokenizer.encode_response(read_prompt("a?"), "yes"))
    ]
    report = check_data(config(path=str(path)), tokenizer, max_length=lengths[0])
    prompt, responses = tokenizer.encode_responses(read_prompt("b?"), ["one<eos>", "two"])
    assert report["lengths"]["unit"] == "tokens"
    assert report["lengths"]["percentiles"]["100"] == len(prompt) + max(map(len, responses))
    assert report["lengths"]["over"] == pytest.approx(1 / 3)
    assert report["controls"] == 1


def read_prompt(text: str) -> Any:
    return (Message("user", text),)


@pytest.mark.parametrize(
    ("rows", "stages"),
    [
        ([{"prompt": "a", "completion": "b"}], ["sft", "collect", "rs", "ppo", "eval"]),
        ([{"text": "a"}], ["sft"]),
        ([{"prompt": "a"}], ["collect", "rs", "ppo", "eval"]),
    ],
)
def test_check_data_says_what_it_suits(rows: Any, stages: list[str], write: Write, config: Config) -> None:
    assert check_data(config(path=str(write("a.jsonl", rows))))["stages"] == stages


def test_check_data_of_toy_reads_rankings(config: Config) -> None:
    report = check_data(config(path="toy"), Tokenizer.toy())
    assert (report["rows"], report["usable"], report["format"]) == (200, 200, "toy")
    assert set(report["shares"]) == {"sft", "preference", "rl", "eval"}


def test_check_data_of_a_broken_file_is_refused(write: Write, config: Config) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1:2"):
        check_data(config(path=str(write("a.jsonl", "{{"))))


def test_print_report_shows_first_places(write: Write, config: Config) -> None:
    path = write("pairs.jsonl", PAIRS)
    shown = io.StringIO()
    print_report(check_data(config(path=str(path))), Console(file=shown, width=60))
    assert f"bad rows        2: chosen and rejected are equal (first {path}:5)" in shown.getvalue()
    assert "7, 4 usable" in shown.getvalue()
    assert "more bad rows than data.max_bad allows" in shown.getvalue()
