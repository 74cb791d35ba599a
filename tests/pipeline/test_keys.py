"""A key changes with everything that can change a result, and with nothing else."""

import json
import os
import shutil
from functools import cache
from pathlib import Path

import pytest

from alignpipe.compose.composition import compose
from alignpipe.config import Config
from alignpipe.data.template import find_template
from alignpipe.pipeline.build import build_graph
from alignpipe.pipeline.keys import add_keys, why_not_reused
from alignpipe.pipeline.plan import make_plan
from alignpipe.pipeline.store import Store
from tests.project import SMALL, Project

ALL = {"sft", "collect", "rm", "rs", "ppo", "eval"}
AFTER_RM = {"rm", "rs", "ppo", "eval"}


@cache
def _config(*words: str) -> Config:
    return compose([*SMALL, *words]).config


def _keys(outputs: Path, *words: str) -> dict[str, str]:
    config, store = _config(*words), Store(outputs)
    graph = build_graph(config, store)
    add_keys(graph, config, store, find_template("plain"))
    return {node.name: node.key for node in graph}


def _changed(outputs: Path, *words: str) -> set[str]:
    before, after = _keys(outputs), _keys(outputs, *words)
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("seed=1", ALL),
        ("data.world.mix.fact=9", ALL),
        ("data.shares={sft:0.4,preference:0.27,rl:0.18,eval:0.15}", ALL),
        ("launch.precision=bf16", ALL),
        ("model.compile=true", ALL),
        ("model.kernels=liger", ALL),
        ("model.architecture.num_layers=3", ALL),
        ("model.training.sft.learning_rate=0.1", ALL),
        ("data.labelers.bias.length=0.5", ALL - {"sft"}),
        ("data.labelers.noise=0.5", ALL - {"sft"}),
        ("stages.collect.num_samples=5", ALL - {"sft"}),
        ("model.training.rm.learning_rate=0.1", AFTER_RM),
        ("stages.rm.seed=5", AFTER_RM),
        ("stages.rs.replay=0.1", {"rs", "ppo", "eval"}),
        ("stages.ppo.kl_coef=0.3", {"ppo", "eval"}),
        ("stages.ppo.reference=base", {"ppo", "eval"}),
        ("stages.eval.policies=[sft,base,rs,ppo]", {"eval"}),
        ("stages.eval.num_prompts=15", {"eval"}),
    ],
)
def test_change_reaches_what_depends_on_it_and_nothing_else(
    tmp_path: Path, word: str, expected: set[str]
) -> None:
    assert _changed(tmp_path, word) == expected


def test_what_cannot_change_a_result_is_in_no_key(tmp_path: Path) -> None:
    words = [
        f"output_dir='{tmp_path}/elsewhere'",
        "model.training.sft.log_steps=7",
        "stages.ppo.save_steps=3",
        "model.training.sft.micro_batch_size=4",
        "rollout.batch_size=3",
        "launch.device=cpu",
        "trackers=[]",
        "run.name=mine",
        "model.attn_implementation=eager",
        "rollout.url=http://node0:8000/v1",
        "rollout.served_model=policy",
        "rollout.timeout=3",
    ]
    assert _changed(tmp_path, *words) == set()


def test_monitor_that_never_looks_is_in_no_key(tmp_path: Path) -> None:
    words = ["monitor.max_kl=3", "monitor.judge=toy", "stages.ppo.monitor.every=7"]
    assert _changed(tmp_path, *words) == set()
    assert _changed(tmp_path, "monitor=warn") == {"rs", "ppo", "eval"}
    assert _keys(tmp_path, "monitor=warn") != _keys(tmp_path, "monitor=warn", *words)


def test_judge_is_in_the_key_by_what_it_learnt_and_not_by_name(tmp_path: Path) -> None:
    words = ("monitor=warn", "pipeline.order=[sft,collect,rm,rm_2,rm_3,ppo]", "stages.ppo.policy=sft")
    second = ("+stage@stages.rm_2=rm", "stages.rm_2.policy=sft", "stages.rm_2.data.path=collect")
    third = ("+stage@stages.rm_3=rm", "stages.rm_3.policy=sft", "stages.rm_3.data.path=collect")
    both = (*words, *second, *third, "stages.rm_2.seed=1")

    def key(judge: str, *more: str) -> str:
        return _keys(tmp_path, *both, f"stages.ppo.monitor.judge={judge}", *more)["ppo"]

    assert key("rm_2", "stages.rm_3.seed=1") == key("rm_3", "stages.rm_3.seed=1")
    assert key("rm_2", "stages.rm_3.seed=2") != key("rm_3", "stages.rm_3.seed=2")
    assert key("toy") != key("none")


def test_template_is_in_every_key(project: Project) -> None:
    before = make_plan(project.compose().config)
    after = make_plan(project.compose("model.chat_template=alpaca").config)
    assert not {row.key for row in before.rows} & {row.key for row in after.rows}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of demonstrations."""
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"Question {n}?", "completion": f"Answer {n}."}) for n in range(40)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _file_key(outputs: Path, path: Path) -> str:
    return _keys(outputs, "stage=sft", f"data='{path}'")["sft"]


def test_one_changed_byte_of_data_changes_the_key(tmp_path: Path, rows: Path) -> None:
    before = _file_key(tmp_path, rows)
    rows.write_bytes(rows.read_bytes().replace(b"Answer 7.", b"Answer 7!"))
    # Same size: the time of the file is what tells that it has to be read again.
    os.utime(rows, ns=(1, 1))
    assert _file_key(tmp_path, rows) != before


def test_time_name_and_place_of_data_do_not_count(tmp_path: Path, rows: Path) -> None:
    before = _file_key(tmp_path, rows)
    os.utime(rows, (1, 1))
    assert _file_key(tmp_path, rows) == before
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(rows, tmp_path / "elsewhere" / "other.jsonl")
    assert _file_key(tmp_path, Path(moved)) == before


def test_settings_of_the_world_are_in_no_key_of_a_files_rows(tmp_path: Path, rows: Path) -> None:
    words = ["stage=sft", f"data='{rows}'"]
    before = _keys(tmp_path, *words)
    assert _keys(tmp_path, *words, "data.world.num_prompts=999", "data.labelers.noise=0.9") == before
    assert _keys(tmp_path, *words, "data.on_overflow=cut") != before


@pytest.mark.parametrize(
    ("words", "name", "told"),
    [
        (["stages.ppo.kl_coef=0.3"], "ppo", "settings.kl_coef 0.1 -> 0.3"),
        (["stages.rm.seed=4"], "rm", "settings.seed 0 -> 4"),
        (["launch.precision=bf16", "stages.sft.weight_decay=0.25"], "sft", "precision fp32 -> bf16; "),
    ],
)
def test_what_differs_is_told_by_its_key(finished: Project, words: list[str], name: str, told: str) -> None:
    store, config = Store(finished.outputs), _config(*words)
    graph = build_graph(config, store)
    add_keys(graph, config, store, find_template(config.model.chat_template.replace("auto", "plain")))
    assert told in why_not_reused(graph.nodes[name], store)


def test_first_of_its_kind_has_nothing_to_differ_from(tmp_path: Path) -> None:
    config, store = _config(), Store(tmp_path)
    graph = build_graph(config, store)
    add_keys(graph, config, store, "")
    assert why_not_reused(graph.nodes["sft"], store) == "the first of its kind here"
