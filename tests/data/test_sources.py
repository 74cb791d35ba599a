"""Sources: what a name stands for, what its content is, what becomes of its bad rows."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from alignpipe.config import DataConfig
from alignpipe.data.preferences import write_rankings
from alignpipe.data.records import Message, Ranking
from alignpipe.data.sources import (
    DataSource,
    content_hash,
    detect_format,
    find_source,
    read_records,
    readable_types,
    write_rejected,
)
from alignpipe.errors import ConfigError, DataError, MachineError

Write, Config = Callable[[str, Any], Path], Callable[..., DataConfig]
ROW = {"prompt": "x", "completion": "y"}


def test_find_source_file_is_absolute(write: Write, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("a.jsonl", [ROW])
    monkeypatch.chdir(path.parent)
    assert find_source("a.jsonl", config()) == DataSource("file", str(path), config())


def test_find_source_missing_file_names_its_place_and_neighbour(
    write: Write, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("train.jsonl", [ROW])
    monkeypatch.chdir(path.parent)
    with pytest.raises(DataError) as error:
        find_source("trian.jsonl", config())
    assert str(error.value) == f"no data file {path.parent}/trian.jsonl; did you mean train.jsonl?"
    with pytest.raises(DataError, match="there is no folder"):
        find_source("deep/er/x.jsonl", config())


def test_find_source_word_with_slash_is_a_hub_id_unless_its_folder_is_here(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_source("owner/data", config()).kind == "hub"
    for name in ("owner/data.jsonl", "/owner/data", "owner"):
        with pytest.raises(DataError, match="no data file"):
            find_source(name, config())
    (tmp_path / "owner").mkdir()
    with pytest.raises(DataError, match="no data file"):
        find_source("owner/data", config())


def test_find_source_folder_reads_its_data_files_in_order(write: Write, config: Config) -> None:
    folder = write("b.jsonl", [{"text": "b"}]).parent
    write("a.csv", "text\na\n")
    write("readme.md", "not data")
    found = read_records(find_source(str(folder), config()), "text")
    assert [record.text for record in found.records] == ["a", "b"]
    assert found.places == [f"{folder}/a.csv:2", f"{folder}/b.jsonl:1"]


def test_find_source_folder_without_data_is_refused(tmp_path: Path, config: Config) -> None:
    with pytest.raises(DataError, match="holds no data file"):
        find_source(str(tmp_path), config())


def test_hub_offline_names_the_id_and_the_mend(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    source = DataSource("hub", "owner/absent", config())
    for call in (content_hash, detect_format, readable_types):
        with pytest.raises(MachineError, match=r"owner/absent: the hub cannot be reached.*hf download"):
            call(source)


def test_hub_offline_with_a_cached_commit_hashes_to_it(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refs = tmp_path / "datasets--owner--cached" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("a" * 40)
    assert content_hash(DataSource("hub", "owner/cached", config())) == "a" * 40
    assert content_hash(DataSource("hub", "owner/cached", config(revision="b" * 40))) == "b" * 40


def test_content_hash_of_a_file_is_that_of_its_bytes(write: Write, config: Config) -> None:
    path = write("a.jsonl", [ROW] * 50_000)
    source = find_source(str(path), config())
    assert content_hash(source) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert content_hash(source, lambda asked: f"known {asked.name}") == "known a.jsonl"


def test_content_hash_of_a_folder_follows_names_and_bytes(write: Write, config: Config) -> None:
    source = find_source(str(write("a.jsonl", [ROW]).parent), config())
    write("b.jsonl", [ROW])
    hashes = {content_hash(source)}
    write("b.jsonl", [ROW, ROW])
    hashes.add(content_hash(source))
    Path(source.path, "b.jsonl").rename(Path(source.path, "c.jsonl"))
    hashes.add(content_hash(source))
    assert len(hashes) == 3


def test_content_hash_of_toy_follows_the_world_alone(config: Config) -> None:
    first, same = config(), config(max_bad=0.5)
    labelers = replace(first.labelers, noise=0.7)
    world = replace(first.world, seed=1)
    hashes = [content_hash(DataSource("toy", "toy", one)) for one in (first, same, config(labelers=labelers))]
    assert len(set(hashes)) == 1
    assert content_hash(DataSource("toy", "toy", config(world=world))) != hashes[0]


def test_rankings_written_are_read_unchanged(tmp_path: Path, config: Config) -> None:
    rankings = [
        Ranking((Message("user", "é\u2028x", "in"),), ("a", "b\n"), (2.0, 1.0), (0.25, 1.0)),
        Ranking((Message("system", "s"), Message("user", "x")), ("a", "b", "c"), (1.0, 1.0, 2.0)),
    ]
    write_rankings(rankings, tmp_path / "rankings.jsonl", labels=[[[2, 1], [1, 1]], [[1, 1, 2]]])
    source = find_source(str(tmp_path), config())
    assert (source.kind, detect_format(source)) == ("collect", "ranked")
    assert read_records(source, "rankings").records == rankings
    assert json.loads((tmp_path / "rankings.jsonl").read_text().split("\n")[0])["labels"] == [[2, 1], [1, 1]]
    assert content_hash(source) == hashlib.sha256((tmp_path / "rankings.jsonl").read_bytes()).hexdigest()


def test_max_bad_is_a_fraction_of_the_rows(write: Write, config: Config) -> None:
    path = write("a.jsonl", [ROW] * 99 + [{"prompt": "x", "completion": ""}])
    found = read_records(find_source(str(path), config(max_bad=0.01)), "demonstrations")
    assert (len(found.records), len(found.rejected), found.num_rows) == (99, 1, 100)
    with pytest.raises(
        DataError, match=r"a\.jsonl:100: completion is empty\. 1 of 100 rows .* data\.max_bad=0\.009"
    ):
        read_records(find_source(str(path), config(max_bad=0.009)), "demonstrations")


def test_max_bad_of_one_still_needs_a_row(write: Write, config: Config) -> None:
    path = write("a.jsonl", [{"prompt": "x", "completion": ""}] * 3)
    with pytest.raises(DataError, match="3 of 3 rows cannot be used"):
        read_records(find_source(str(path), config(max_bad=1.0)), "demonstrations")


def test_write_rejected_says_file_line_and_reason(write: Write, config: Config, tmp_path: Path) -> None:
    path = write("a.jsonl", [ROW, {"prompt": "\ud800", "completion": "y"}])
    found = read_records(find_source(str(path), config(max_bad=1.0)), "demonstrations")
    write_rejected(found.rejected, tmp_path / "new" / "rejected.jsonl")
    assert json.loads((tmp_path / "new" / "rejected.jsonl").read_text()) == {
        "file": str(path),
        "line": 2,
        "reason": "prompt holds a lone surrogate, half a character",
    }


@pytest.mark.parametrize("want", ["demonstrations", "rankings", "prompts", "text"])
def test_toy_gives_every_type_and_always_the_same(want: Any, config: Config) -> None:
    source = find_source("toy", config())
    assert want in readable_types(source)
    first, second = read_records(source, want), read_records(source, want)
    assert first == second
    assert first.num_rows == len(first.records) == 200
    assert first.format == detect_format(source) == "toy"
    assert read_records(find_source("toy", config(max_rows=7)), want).records == first.records[:7]


def test_toy_rankings_hold_distinct_responses_and_gold(config: Config) -> None:
    records = read_records(find_source("toy", config()), "rankings").records
    assert all(len(set(record.responses)) == len(record.responses) == 4 for record in records)
    # Labelers with little noise put the response of most gold first or near it.
    best = [max(record.gold) - record.gold[record.best] for record in records]
    assert sum(best) / len(best) < 0.05


def test_toy_prompts_of_all_types_are_the_same(config: Config) -> None:
    source = find_source("toy", config())
    prompts = [record.prompt for record in read_records(source, "prompts").records]
    assert [record.prompt for record in read_records(source, "demonstrations").records] == prompts
    assert [record.prompt for record in read_records(source, "rankings").records] == prompts


def test_toy_prompts_get_as_many_demonstrations_as_asked_for(config: Config) -> None:
    world = replace(config().world, num_demonstrations=3)
    records = read_records(find_source("toy", config(world=world)), "demonstrations").records
    prompts = [record.prompt for record in records]
    assert len(records) == 600
    assert all(prompts.count(prompt) == 3 for prompt in prompts[:5])
    assert len({record.response for record in records}) > 200


def test_toy_world_too_small_or_unknown_kind_is_one_line(config: Config) -> None:
    world = config().world
    with pytest.raises(ConfigError, match=r"lower data\.world\.num_prompts"):
        read_records(find_source("toy", config(world=replace(world, num_prompts=10**6))), "prompts")
    with pytest.raises(ConfigError, match=r"data\.world\.mix\.fcat: .*Did you mean fact"):
        read_records(find_source("toy", config(world=replace(world, mix={"fcat": 1.0}))), "prompts")
    only = replace(
        world, mix={kind: 0.0 for kind in ("fact", "list", "count", "sum", "repeat", "howto", "loaded")}
    )
    prompts = read_records(find_source("toy", config(world=only)), "prompts").records
    assert len(prompts) == 200


def test_data_is_imported_without_torch_or_transformers() -> None:
    names = ("check", "encoding", "order", "shares", "sources", "template", "tokenizer")
    modules = ", ".join(f"alignpipe.data.{name}" for name in names)
    heavy = {"torch", "transformers", "datasets", "pyarrow"}
    code = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
