"""Several sets as one: how rows are counted, shares, places, keys."""

import json
from pathlib import Path

import pytest

from alignpipe.compose import compose
from alignpipe.data.mixture import mix, read_portion
from alignpipe.data.shares import share_of
from alignpipe.data.sources import content_hash, find_mixture, read_parts, readable_types
from alignpipe.errors import ConfigError, DataError
from alignpipe.pipeline.plan import make_plan
from tests.data.conftest import make_config


def _file(folder: Path, name: str, number: int) -> str:
    path = folder / f"{name}.jsonl"
    rows = [{"prompt": f"Say {name} {i}.", "response": f"{name} {i}."} for i in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_mix_ends_with_the_set_that_is_scarcest_for_its_weight() -> None:
    # 100 / 0.7 = 142.9, 30 / 0.3 = 100: an epoch of 100 rows.
    large, small = mix([100, 30], [0.7, 0.3], "first_exhausted")
    assert (len(large), len(small)) == (70, 30)
    assert len(set(large)) == 70 and small == list(range(30))
    assert max(large) > 90, "drawn from the whole set, not from its head"


def test_mix_weights_need_not_add_up_to_one() -> None:
    assert mix([100, 30], [7, 3], "first_exhausted") == mix([100, 30], [0.7, 0.3], "first_exhausted")


def test_mix_repeats_only_where_it_is_told_to() -> None:
    large, small = mix([100, 30], [0.5, 0.5], "all_exhausted")
    assert large == list(range(100))
    assert len(small) == 100
    assert {small.count(row) for row in range(30)} == {3, 4}
    fewer, all_of_them = mix([100, 30], [0.5, 0.5], "first_exhausted")
    assert (len(fewer), len(set(fewer)), all_of_them) == (30, 30, list(range(30)))


def test_mix_of_one_is_all_of_it_and_an_empty_set_does_not_count() -> None:
    assert mix([5], [0.2], "first_exhausted") == [list(range(5))]
    assert mix([0, 5], [1, 1], "first_exhausted") == [[], list(range(5))]


def test_portion_has_the_weights_in_its_first_rows_too_and_shares_within_each(tmp_path: Path) -> None:
    names = {_file(tmp_path, "a", 300): 0.75, _file(tmp_path, "b", 300): 0.25}
    config = make_config(mixture=names)
    source = find_mixture(config)
    found = read_parts(source, "demonstrations")
    portion = read_portion(source, found, "train")
    counts = portion.rows_by_source()
    assert counts["a.jsonl"] == pytest.approx(3 * counts["b.jsonl"], abs=2)
    assert portion.take(range(40)).rows_by_source() == {"a.jsonl": 30, "b.jsonl": 10}
    held_out = read_portion(source, found, "eval").records
    assert {share_of(row.prompt[0].content, config.shares) for row in held_out} == {"eval"}
    assert not {row.prompt for row in held_out} & {row.prompt for row in portion.records}
    for record, place, name in zip(portion.records, portion.places, portion.sources, strict=True):
        file, _, line = place.rpartition(":")
        assert Path(file).name == name
        row = json.loads(Path(file).read_text().splitlines()[int(line) - 1])
        assert record.prompt[0].content == row["prompt"]


def test_mixture_reads_what_all_its_sets_hold(tmp_path: Path) -> None:
    source = find_mixture(make_config(mixture={_file(tmp_path, "a", 3): 1.0, "toy": 1.0}))
    assert readable_types(source) == {"demonstrations", "prompts"}


def test_content_hash_of_a_mixture_knows_content_and_weights(tmp_path: Path) -> None:
    a, b = _file(tmp_path, "a", 5), _file(tmp_path, "b", 5)

    def digest(weights: dict[str, float]) -> str:
        return content_hash(find_mixture(make_config(mixture=weights)))

    first = digest({a: 0.5, b: 0.5})
    assert first == digest({a: 0.5, b: 0.5})
    assert first != digest({a: 0.6, b: 0.4})
    _file(tmp_path, "b", 6)
    assert first != digest({a: 0.5, b: 0.5})


def test_plan_counts_the_rows_of_a_mixture_and_its_key_knows_the_weights(tmp_path: Path) -> None:
    a, b = _file(tmp_path, "a", 100), _file(tmp_path, "b", 100)

    def plan(words: str) -> tuple[int | None, str, list[str]]:
        made = make_plan(compose(["stage=sft", f"output_dir={tmp_path}/out", words]).config)
        return made.rows[0].rows, made.rows[0].key, made.warnings

    rows, key, warnings = plan(f"stage.data.mixture={{{a}: 0.8, {b}: 0.2}}")
    assert rows is not None and 90 < rows < 125
    assert any("an epoch mixes" in told and "of a.jsonl" in told for told in warnings)
    assert plan(f"data.mixture={{{a}: 0.8, {b}: 0.2}}")[1] == key
    assert plan(f"stage.data.mixture={{{a}: 0.7, {b}: 0.3}}")[1] != key


@pytest.mark.parametrize("weight", ["0", "-1", "nan"])
def test_weight_that_is_not_above_zero_is_refused(weight: str) -> None:
    with pytest.raises(ConfigError, match="weight must be a number above 0"):
        compose(["stage=sft", f"stage.data.mixture={{./a.jsonl: {weight}}}"])


def test_file_that_is_not_there_is_named_with_the_nearest(tmp_path: Path) -> None:
    _file(tmp_path, "rows", 5)
    config = compose(["stage=sft", f"data.mixture={{{tmp_path}/rowz.jsonl: 1}}"]).config
    with pytest.raises(DataError, match=r"did you mean .*rows.jsonl"):
        make_plan(config)
