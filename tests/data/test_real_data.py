"""Real files, with the blemishes they really have."""

from collections.abc import Callable
from pathlib import Path

import pytest

from alignpipe.config import DataConfig
from alignpipe.data.encoding import encode_demonstrations, encode_rankings
from alignpipe.data.sources import detect_format, find_source, read_records
from alignpipe.data.template import ALPACA, PLAIN
from alignpipe.data.tokenizer import Tokenizer

Config = Callable[..., DataConfig]


def test_hh_pairs_reject_exactly_the_bad_rows(shared: Path, config: Config) -> None:
    source = find_source(str(shared / "data" / "hh_harmless_pairs.jsonl"), config())
    found = read_records(source, "rankings")
    assert [row.line for row in found.rejected] == [221, 317, 335, 827, 939, 1013]
    reasons = {row.line: row.reason for row in found.rejected}
    assert reasons[335] == reasons[1013] == "chosen is empty"
    assert reasons[221] == "chosen and rejected differ in their prompt"
    assert (len(found.records), found.num_rows) == (1494, 1500)
    assert all(record.prompt[-1].role == "user" for record in found.records)


def test_hh_pairs_a_part_is_over_the_context(shared: Path, config: Config) -> None:
    source = find_source(str(shared / "data" / "hh_harmless_pairs.jsonl"), config(max_rows=200))
    tokenizer = Tokenizer.load(shared / "models" / "stories260K", PLAIN)
    records = read_records(source, "rankings").records
    dropped = encode_rankings(records, tokenizer, 512, "drop")
    assert 0.1 < dropped.num_overflow / len(records) < 0.5
    assert len(dropped.examples) == len(records) - dropped.num_overflow
    cut = encode_rankings(records, tokenizer, 512, "cut")
    assert max(len(one.ids) for example in cut.examples for one in example.examples) == 512


def test_alpaca_rows_encode_with_their_template(shared: Path, config: Config) -> None:
    source = find_source(str(shared / "data" / "alpaca_roleplay.json"), config(max_rows=100))
    tokenizer = Tokenizer.load(shared / "models" / "stories260K", ALPACA)
    records = read_records(source, "demonstrations").records
    encoded = encode_demonstrations(records, tokenizer, 1024, "drop")
    assert detect_format(source) == "alpaca"
    first, record = encoded.examples[0], records[encoded.kept[0]]
    assert first.ids[-1] == tokenizer.eos_id
    text = tokenizer.decode(first.ids)
    opening = "Below is an instruction that describes a task, paired with an input"
    assert text.startswith(opening)
    assert text.endswith(f"### Response:{record.response}")


def test_gsm8k_questions_and_answers_are_all_usable(shared: Path, config: Config) -> None:
    found = read_records(find_source(str(shared / "data" / "gsm8k_train.jsonl"), config()), "demonstrations")
    assert (len(found.records), found.rejected, found.format) == (7473, [], "prompt_completion")
    assert all("#### " in record.response for record in found.records)


@pytest.mark.parametrize("name", ["hh_harmless_pairs.jsonl", "alpaca_roleplay.json", "gsm8k_train.jsonl"])
def test_real_file_prompts_can_be_read_for_evaluation(name: str, shared: Path, config: Config) -> None:
    found = read_records(find_source(str(shared / "data" / name), config()), "prompts")
    assert len(found.records) > 1000
