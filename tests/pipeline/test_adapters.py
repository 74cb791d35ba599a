"""What adapters need is asked before the first stage, and what they are is in the key of every stage they decide."""

import sys
from pathlib import Path

import pytest

from alignpipe.data.template import find_template
from alignpipe.errors import ConfigError, MachineError
from alignpipe.pipeline import adapters
from alignpipe.pipeline.graph import build_graph
from alignpipe.pipeline.keys import add_keys
from alignpipe.pipeline.plan import make_plan
from alignpipe.pipeline.store import Store
from tests.project import Project

AFTER_SFT = {"collect", "rm", "rs", "ppo", "eval"}


def _keys(project: Project, *words: str) -> dict[str, str]:
    config, store = project.compose(*words).config, Store(project.outputs)
    graph = build_graph(config, store)
    add_keys(graph, config, store, find_template("plain"))
    return {node.name: node.key for node in graph}


def _changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(
    "word",
    [
        "adapter.rank=3",
        "adapter.alpha=3",
        "adapter.learning_rate_scale=2",
        "adapter.target_modules=[q_proj]",
        "adapter.handover=merge",
        "adapter.kind=none",
    ],
)
def test_settings_are_in_the_key_of_every_stage_that_they_decide(project: Project, word: str) -> None:
    before = _keys(project, "adapter=lora")
    # sft of a model that is built from nothing trains whole weights, whatever the adapter.
    assert _changed(before, _keys(project, "adapter=lora", word)) == AFTER_SFT


def test_settings_of_no_adapter_are_in_no_key(project: Project) -> None:
    before = _keys(project)
    for word in ("adapter.rank=3", "adapter.alpha=3", "adapter.handover=merge", "model.adapter.rank=7"):
        assert _keys(project, word) == before, word
    assert _keys(project, "adapter=lora")["sft"] == before["sft"]


def test_adapter_of_a_model_that_lies_in_files_is_in_the_key_of_sft_too(
    finished: Project, project: Project
) -> None:
    sft = next((finished.outputs / "stages").glob("sft-*"))
    words = ("stage=sft", f"stage.policy='{sft}'")
    assert _keys(project, *words) != _keys(project, *words, "adapter=lora")


def test_missing_peft_is_told_before_anything_runs(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    make_plan(project.compose().config)
    with pytest.raises(MachineError, match=r"^adapter=lora needs peft, .* pip install 'alignpipe\[lora\]'$"):
        make_plan(project.compose("adapter=lora").config)


def test_missing_peft_is_told_of_a_parent_with_an_adapter(
    finished: Project, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft = next((finished.outputs / "stages").glob("sft-*"))
    folder = tmp_path / "parent"
    folder.mkdir()
    for path in sft.iterdir():
        if path.name != "alignpipe.json":
            (folder / path.name).symlink_to(path)
    (folder / "adapter_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MachineError, match="parent: has an adapter, which needs peft"):
        make_plan(project.compose("stage=sft", f"stage.policy='{folder}'").config)


def test_four_bits_are_refused_where_they_cannot_run(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = project.compose("adapter=qlora").config
    there = {"bitsandbytes": False}

    def find(name: str) -> object:
        return object() if there.get(name, True) else None

    monkeypatch.setattr(adapters, "find_spec", find)
    monkeypatch.setattr(adapters, "DRIVER", tmp_path / "nvidiactl")
    with pytest.raises(
        MachineError, match=r"needs bitsandbytes, .* pip install 'alignpipe\[qlora\]'"
    ) as caught:
        make_plan(config)
    assert caught.value.exit_code == 5 and "\n" not in str(caught.value)
    there["bitsandbytes"] = True
    with pytest.raises(MachineError, match="needs a CUDA device"):
        make_plan(config)
    (tmp_path / "nvidiactl").touch()
    with pytest.raises(MachineError, match="needs a CUDA device"):
        make_plan(project.compose("adapter=qlora", "launch=cpu").config)
    with pytest.raises(ConfigError, match="model=tiny has none"):
        make_plan(config)
