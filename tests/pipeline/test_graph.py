"""Every name means one thing or is an error of the right class, in one line, with the nearest name."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from alignpipe.compose.composition import compose
from alignpipe.config import Config
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import AlignpipeError, CheckpointError, ConfigError, DataError
from alignpipe.models.saving import save_model
from alignpipe.pipeline.build import build_graph
from alignpipe.pipeline.graph import Graph
from alignpipe.pipeline.plan import make_plan
from alignpipe.pipeline.store import Store
from tests.project import SMALL, Project

MakeModel = Callable[..., PreTrainedModel]


@cache
def _config(*words: str) -> Config:
    return compose([*SMALL, *words]).config


def _graph(project: Project, *words: str) -> Graph:
    return build_graph(_config(*words), Store(project.outputs))


def _error(project: Project, *words: str) -> AlignpipeError:
    with pytest.raises(AlignpipeError) as caught:
        _graph(project, *words)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture
def saved(make_llama: MakeModel, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A model folder as plain transformers would leave it."""
    save_model(make_llama(), tokenizer, tmp_path / "a model")
    return tmp_path / "a model"


def test_names_of_a_pipeline_are_its_stages_and_base(project: Project) -> None:
    graph = _graph(project)
    assert [node.name for node in graph] == ["sft", "collect", "rm", "rs", "ppo", "eval"]
    assert graph.nodes["sft"].models["policy"].path == "tiny"
    assert {role: ref.stage for role, ref in graph.nodes["ppo"].models.items()} == {
        "policy": "rs",
        "reference": "sft",
        "reward_model": "rm",
    }
    assert graph.nodes["ppo"].parents == ["rs", "sft", "rm"]
    assert graph.nodes["rm"].data["data"].stage == "collect"
    assert graph.lineage("ppo") == {"rs", "sft"}
    shares = {node.name: node.data["data"].share for node in graph}
    assert shares == {
        "sft": "sft",
        "collect": "preference",
        "rm": "train",
        "rs": "rl",
        "ppo": "rl",
        "eval": "eval",
    }


def test_stage_of_a_run_is_found_by_run_by_latest_and_by_folder(finished: Project) -> None:
    run = (finished.outputs / "latest").read_text().strip()
    key = _graph_key(finished, f"{run}/sft")
    folder = next((finished.outputs / "stages").glob("sft-*"))
    assert folder.name == f"sft-{key}"
    assert _graph_key(finished, "latest/sft") == key
    assert _graph_key(finished, f"'{folder}'") == key


def _graph_key(project: Project, name: str) -> str:
    ref = _graph(project, "stage=dpo", f"stage.policy={name}").nodes["dpo"].models["policy"]
    assert ref.kind == "sft"
    assert Path(ref.path).is_dir()
    return ref.key


def test_collected_rankings_of_a_run_are_data(finished: Project) -> None:
    ref = _graph(finished, "stage=dpo", "stage.data.path=latest/collect").nodes["dpo"].data["data"]
    assert ref.source is not None and ref.source.kind == "collect"
    assert _error(finished, "stage=dpo", "stage.data.path=latest/sft").exit_code == 2


def test_folder_is_a_model_by_any_path_that_leads_there(
    project: Project, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved.parent)
    for label in (f"'{saved}'", "'./a model'", "'a model'"):
        ref = _graph(project, "stage=sft", f"stage.policy={label}").nodes["sft"].models["policy"]
        assert ref.path == str(saved.resolve())
        assert ref.kind is None


def test_unknown_name_gets_the_nearest(project: Project) -> None:
    error = _error(project, "stages.ppo.policy=sfft")
    assert isinstance(error, ConfigError)
    assert str(error).startswith("stages.ppo.policy: 'sfft' is no stage")
    assert "Did you mean sft?" in str(error)


def test_stage_that_runs_later_and_the_stage_itself_are_refused(project: Project) -> None:
    for words in (["stages.rs.policy=ppo"], ["stages.rs.policy=rs"], ["pipeline.order=[sft,rm,collect]"]):
        error = _error(project, *words)
        assert isinstance(error, ConfigError)
        assert "does not run before" in str(error)
    assert "order is sft, collect, rm" in str(_error(project, "stages.rs.policy=ppo"))


@pytest.mark.parametrize(
    ("role", "value", "needed"),
    [
        ("policy", "rm", "a policy"),
        ("reward_model", "sft", "a reward model"),
        ("policy", "collect", "a policy"),
    ],
)
def test_wrong_kind_by_name_of_a_stage_is_an_error_of_words(
    project: Project, role: str, value: str, needed: str
) -> None:
    error = _error(project, f"stages.ppo.{role}={value}")
    assert isinstance(error, ConfigError)
    assert f"stages.ppo.{role}: {value} is made by a stage of kind {value}; needed is {needed}" in str(error)


@pytest.mark.parametrize(
    ("role", "kind"),
    [("policy", "rm"), ("reward_model", "sft"), ("reference", "collect"), ("policy", "eval")],
)
def test_wrong_kind_by_folder_is_an_error_of_the_checkpoint(finished: Project, role: str, kind: str) -> None:
    folder = next((finished.outputs / "stages").glob(f"{kind}-*"))
    error = _error(finished, "stage=ppo", "stage.reward_model=latest/rm", f"stage.{role}='{folder}'")
    assert isinstance(error, CheckpointError)
    assert f"of kind {kind}" in str(error)


def test_plain_language_model_is_no_reward_model(project: Project, saved: Path) -> None:
    error = _error(project, "stage=ppo", f"stage.reward_model='{saved}'")
    assert isinstance(error, CheckpointError)
    assert "without a scalar head" in str(error)


def test_reward_model_that_is_not_given_is_asked_for(project: Project) -> None:
    error = _error(project, "stage=ppo")
    assert isinstance(error, ConfigError)
    assert "stage.reward_model=latest/rm" in str(error)


def test_folder_that_holds_no_whole_model_is_refused(project: Project, saved: Path) -> None:
    words = ["stage=sft", f"stage.policy='{saved}'"]
    weights = saved / "model.safetensors"
    content = weights.read_bytes()
    for cut in (content[:-1], content[:100], content[:4], b"", content + b"x"):
        weights.write_bytes(cut)
        error = _error(project, *words)
        assert isinstance(error, CheckpointError)
        assert "model.safetensors: cut short or damaged" in str(error)
    weights.write_bytes(content)
    _graph(project, *words)
    (saved / "config.json").write_text("{", encoding="utf-8")
    assert "config.json: not JSON" in str(_error(project, *words))
    (saved / "config.json").unlink()
    assert "no config.json in it" in str(_error(project, *words))
    assert isinstance(_error(project, *words), CheckpointError)


def test_missing_folder_names_its_nearest_sibling(project: Project, saved: Path) -> None:
    error = _error(project, "stage=sft", f"stage.policy='{saved.parent}/a modle'")
    assert isinstance(error, CheckpointError)
    assert "Did you mean a model?" in str(error)
    error = _error(project, "stage=sft", f"stage.policy='{saved.parent}/none/here'")
    assert isinstance(error, CheckpointError)
    assert "is not there either" in str(error)


def test_unfinished_stage_of_a_run_is_no_model(copied: Project) -> None:
    run = (copied.outputs / "latest").read_text().strip()
    folder = next((copied.outputs / "stages").glob("sft-*"))
    (folder / "alignpipe.json").unlink()
    error = _error(copied, "stage=dpo", f"stage.policy={run}/sft")
    assert isinstance(error, CheckpointError)
    assert "not finished" in str(error)
    error = _error(copied, "stage=dpo", f"stage.policy={run}/sfft")
    assert isinstance(error, ConfigError)
    assert "Did you mean sft?" in str(error)


def test_order_must_hold_each_known_stage_once(project: Project) -> None:
    assert "is empty" in str(_error(project, "pipeline.order=[]"))
    assert "sft stands in it twice" in str(_error(project, "pipeline.order=[sft,sft]"))
    unknown = _error(project, "pipeline.order=[sft,colect]")
    assert "Did you mean collect?" in str(unknown)
    assert {_error(project, f"pipeline.order={order}").exit_code for order in ("[]", "[sft,sft]")} == {2}


def test_policies_of_an_eval_cannot_be_empty(project: Project) -> None:
    assert "stages.eval.policies: is empty" in str(_error(project, "stages.eval.policies=[]"))


@pytest.fixture
def demonstrations(tmp_path: Path) -> Path:
    """A file of demonstrations."""
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Question {number}?", "completion": f"Answer {number}."} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_gold_judge_needs_the_embedded_world(project: Project, demonstrations: Path) -> None:
    error = _error(project, f"data='{demonstrations}'")
    assert isinstance(error, ConfigError)
    assert "stages.collect.judge: the gold judge needs data=toy" in str(error)
    error = _error(project, "stage=eval", f"data='{demonstrations}'", "stage.judge=toy")
    assert "set stage.judge=auto" in str(error)


def test_data_of_a_wrong_type_is_an_error_of_the_data(project: Project, demonstrations: Path) -> None:
    error = _error(project, "stage=rm", f"data='{demonstrations}'")
    assert isinstance(error, DataError)
    assert "needs rankings" in str(error)


def test_file_that_one_share_reads_is_used_whole_and_else_is_split(
    project: Project, demonstrations: Path
) -> None:
    alone = _graph(project, "stage=sft", f"data='{demonstrations}'")
    assert alone.nodes["sft"].data["data"].share == "train"
    words = [f"data='{demonstrations}'", "stages.rs.reward_model=rm", "stages.rm.data.path=toy"]
    both = _graph(project, *words, "pipeline.order=[sft,rm,rs]")
    assert both.nodes["sft"].data["data"].share == "sft"
    assert both.nodes["rs"].data["data"].share == "rl"
    assert both.nodes["rs"].data["demonstrations"].share == "sft"


def test_hub_id_is_read_from_the_cache_when_offline(
    make_llama: MakeModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    cache_folder = tmp_path / "hub" / "models--owner--name"
    commit = "0123456789abcdef0123456789abcdef01234567"
    save_model(make_llama(), tokenizer, cache_folder / "snapshots" / commit)
    (cache_folder / "refs").mkdir()
    (cache_folder / "refs" / "main").write_text(commit)
    code = (
        "import sys, json; from pathlib import Path\n"
        "from alignpipe.compose.composition import compose\n"
        "from alignpipe.pipeline.plan import make_plan\n"
        "node = make_plan(compose(sys.argv[1:]).config).graph.nodes['sft']\n"
        "assert 'torch' not in sys.modules\n"
        "print(json.dumps([node.models['policy'].revision, node.inputs['models']['policy']]))"
    )
    done = _offline(tmp_path, "-c", code, "stage=sft", "model=owner/name")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [commit, f"owner/name@{commit}"]
    absent = _offline(tmp_path, "-m", "alignpipe", "plan", "stage=sft", "model=owner/other")
    assert absent.returncode == 5
    assert "the hub cannot be reached and the cache has no such model" in absent.stderr
    assert len(absent.stderr.strip().splitlines()) == 1


def _offline(folder: Path, *call: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub")}
    words = [*SMALL, f"output_dir='{folder / 'outputs'}'"]
    return subprocess.run(
        [sys.executable, *call, *words], capture_output=True, text=True, check=False, env=environment
    )


def test_second_sft_of_another_name_is_another_stage_with_the_same_key(copied: Project) -> None:
    words = ["+stage@stages.again=sft", "stages.again.policy=base", "pipeline.order=[sft,again]"]
    plan = make_plan(copied.compose(*words).config)
    assert [row.state for row in plan.rows] == ["reuse", "reuse"]
    assert len({row.key for row in plan.rows}) == 1


def test_ptx_reads_demonstrations_only_where_they_are_learnt(project: Project, tmp_path: Path) -> None:
    words = ["pipeline.order=[sft,collect,rm,ppo]", "stages.ppo.policy=sft"]
    assert set(_graph(project, *words).nodes["ppo"].data) == {"data"}
    ref = _graph(project, *words, "stages.ppo.ptx_coef=1").nodes["ppo"].data["ptx_data"]
    assert (ref.name, ref.share) == ("toy", "sft")
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "It rains."}\n' * 5)
    words.append("stages.ppo.ptx_coef=1")
    ref = _graph(project, *words, f"stages.ppo.ptx_data={texts}").nodes["ppo"].data["ptx_data"]
    # No other stage reads the file.
    assert (ref.name, ref.share) == (str(texts), "train")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Why?"}\n' * 5)
    error = str(_error(project, *words, f"stages.ppo.ptx_data={prompts}"))
    assert error.startswith(f"stages.ppo.ptx_data.path: {prompts} has neither demonstrations nor text")
    assert error.endswith("or set stages.ppo.ptx_coef=0")


SECOND = (
    "+stage@stages.rm_2=rm",
    "stages.rm_2.policy=sft",
    "stages.rm_2.data.path=collect",
    "stages.ppo.policy=sft",
    "pipeline.order=[sft,collect,rm,rm_2,ppo]",
)


def test_judge_by_name_is_a_model_of_the_stage_where_it_looks(project: Project) -> None:
    watched = _graph(project, *SECOND, "monitor=warn", "stages.ppo.monitor.judge=rm_2").nodes["ppo"]
    assert watched.models["judge"].stage == "rm_2"
    assert watched.parents == ["sft", "rm", "rm_2"]
    # A monitor that never looks reads nothing.
    assert "judge" not in _graph(project, *SECOND, "stages.ppo.monitor.judge=rm_2").nodes["ppo"].models


@pytest.mark.parametrize(
    ("judge", "told"),
    [
        ("rm", "stages.ppo.monitor.judge: rm is what ppo is trained on"),
        ("sft", "stages.ppo.monitor.judge: sft is made by a stage of kind sft; needed is a reward model"),
        ("rm_3", "stages.ppo.monitor.judge: 'rm_3' is no stage, run, folder or hub id. Did you mean rm"),
        ("auot", "stages.ppo.monitor.judge: 'auot' is no stage, run, folder or hub id. Did you mean auto"),
    ],
)
def test_judge_that_cannot_judge_is_refused(project: Project, judge: str, told: str) -> None:
    error = _error(project, *SECOND, "monitor=stop", f"stages.ppo.monitor.judge={judge}")
    assert isinstance(error, ConfigError)
    assert str(error).startswith(told)


@pytest.mark.parametrize(
    ("word", "told"), [("judge=toy", "the gold judge needs"), ("action=restore", "auto is nobody")]
)
def test_monitor_without_a_judge_of_its_data_is_refused(
    project: Project, prompts: Path, word: str, told: str
) -> None:
    words = (
        "stages.ppo.policy=sft",
        "pipeline.order=[sft,collect,rm,ppo]",
        f"stages.ppo.data.path={prompts}",
    )
    assert _graph(project, *words, "monitor=warn").nodes["ppo"]
    error = _error(project, *words, "monitor=warn", f"monitor.{word}")
    assert str(error).startswith("stages.ppo.monitor.judge: ")
    assert told in str(error)


def test_restore_without_a_judge_is_an_error_of_words() -> None:
    with pytest.raises(ConfigError, match=r"monitor\.action: restore goes back to what a judge liked best"):
        _config("monitor=restore", "monitor.judge=none")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Prompts from elsewhere."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(40)))
    return path
