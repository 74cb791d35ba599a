"""Margins from a column, from ranks, from gold; and the bootstrap's draws."""

from dataclasses import replace
from pathlib import Path

import pytest

from alignpipe.compose.composition import compose
from alignpipe.config import DataConfig, RMConfig
from alignpipe.data.bootstrap import bootstrap_weights
from alignpipe.data.margins import check_margins, worths
from alignpipe.data.records import Message, Ranking
from alignpipe.data.sources import DataSource, read_records
from alignpipe.errors import DataError

PROMPT = (Message("user", "How many?"),)
PAIR = Ranking(PROMPT, ("three", "four"), (1.0, 2.0))
FOUR = Ranking(PROMPT, ("a", "b", "c", "d"), (2.0, 1.0, 4.0, 2.0), gold=(0.5, 0.9, 0.1, 0.4))


@pytest.fixture(scope="module")
def config() -> RMConfig:
    config = compose(["stage=rm"]).config.stage
    assert isinstance(config, RMConfig)
    return config


def _read(path: Path, config: DataConfig) -> list[Ranking]:
    return read_records(DataSource("file", str(path), config), "rankings").records


@pytest.mark.parametrize(("degrees", "margins"), [("small", [1, 2 / 3, 1 / 3, 0]), ("large", [3, 2, 1, 0])])
def test_degrees_are_those_of_llama_2(config: RMConfig, degrees: str, margins: list[float]) -> None:
    settings = replace(config, margin="column", margin_degrees=degrees)
    for word, margin in zip(("significantly", "better", "slightly", "negligibly"), margins, strict=True):
        assert worths(replace(PAIR, margin=word), settings) == [margin, 0]


def test_worths_of_numbers_ranks_and_gold(config: RMConfig) -> None:
    assert worths(FOUR, config) == [0] * 4
    twice = replace(config, margin_scale=2.0)
    assert worths(replace(PAIR, margin=0.25), replace(twice, margin="column")) == [0.5, 0]
    assert worths(FOUR, replace(twice, margin="rank")) == [-4, -2, -8, -4]
    assert worths(FOUR, replace(twice, margin="gold")) == [1.0, 1.8, 0.2, 0.8]


@pytest.mark.parametrize("margin", ["column", "gold"])
def test_a_row_without_what_the_margin_is_read_from_is_named(config: RMConfig, margin: str) -> None:
    full = replace(PAIR, margin=1.0, gold=(1.0, 0.0))
    check_margins([full, full], replace(config, margin=margin), "rm")
    with pytest.raises(DataError, match=r"rm: row 2 of those read has no (margin|gold)"):
        check_margins([full, PAIR], replace(config, margin=margin), "rm")


def test_margins_are_read_as_numbers_and_as_words(tmp_path: Path, config: RMConfig) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2}\n'
        '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": "Significantly better"}\n'
        '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": "slightly"}\n'
        '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": null}\n'
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    )
    found = [ranking.margin for ranking in _read(path, config.data)]
    assert found == [2.0, "significantly", "slightly", None, None]
    table = tmp_path / "pairs.csv"
    table.write_text("prompt,chosen,rejected,gap\na,b,c,0.5\na,b,c,\n")
    named = replace(config.data, columns=replace(config.data.columns, margin="gap"))
    assert [ranking.margin for ranking in _read(table, named)] == [0.5, None]


@pytest.mark.parametrize("margin", ['"much"', "-1", "true", "[1]"])
def test_a_margin_that_is_none_spoils_its_row(tmp_path: Path, config: RMConfig, margin: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c", "margin": ' + margin + "}\n")
    with pytest.raises(
        DataError, match=r"pairs.jsonl:1: margin holds .*number of at least 0 or one of signific"
    ):
        _read(path, config.data)


def test_bootstrap_weights_are_poisson_with_mean_one_and_each_heads_own() -> None:
    drawn = [bootstrap_weights([5, prompt], 0, 3) for prompt in range(4000)]
    for member in range(3):
        weights = [row[member] for row in drawn]
        assert sum(weights) / 4000 == pytest.approx(1.0, abs=0.06)
        assert weights.count(0) / 4000 == pytest.approx(0.3679, abs=0.03)
        assert weights.count(2) / 4000 == pytest.approx(0.1839, abs=0.03)
    alike = sum(row[0] == row[1] for row in drawn) / 4000
    # Two independent Poisson(1) agree with probability exp(-2) I_0(2) = 0.3085.
    assert alike == pytest.approx(0.3085, abs=0.03)
    assert bootstrap_weights([5, 7], 0, 3) == drawn[7]
    assert [bootstrap_weights([5, p], 1, 3) for p in range(50)] != drawn[:50]
