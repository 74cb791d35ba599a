"""What adapters need is asked before the first stage, and what they are is in the key of every stage they decide."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from alignpipe.config import Config
from alignpipe.data.template import find_template
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import ConfigError, MachineError
from alignpipe.pipeline import adapters
from alignpipe.pipeline.build import build_graph
from alignpipe.pipeline.keys import add_keys
from alignpipe.pipeline.plan import make_plan
from alignpipe.pipeline.store import Store
from tests.project import Project

AFTER_SFT = {"collect", "rm", "rs", "ppo", "eval"}


@pytest.fixture
def saved(make_llama: Callable[..., PreTrainedModel], tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A model in a folder of the user's."""
    make_llama().save_pretrained(tmp_path / "saved")
    tokenizer.save(tmp_path / "saved")
    return tmp_path / "saved"


def _keys(project: Project, config: Config) -> dict[str, str]:
    store = Store(project.outputs)
    graph = build_graph(config, store)
    add_keys(graph, config, store, find_template("plain"))
    return {node.name: node.key for node in graph}


def test_settings_are_in_the_key_of_every_stage_that_they_decide(project: Project) -> None:
    config = project.compose("adapter=lora").config
    before = _keys(project, config)
    changes: dict[str, Any] = {
        "rank": 3,
        "alpha": 3.0,
        "learning_rate_scale": 2.0,
        "target_modules": ["q_proj"],
        "handover": "merge",
        "kind": "none",
    }
    for name, value in changes.items():
        after = _keys(project, replace(config, adapter=replace(config.adapter, **{name: value})))
        # sft of a model that is built from nothing trains whole weights, whatever the adapter.
        assert {stage for stage in before if before[stage] != after[stage]} == AFTER_SFT, name


def test_settings_of_no_adapter_are_in_no_key(project: Project) -> None:
    config = project.compose().config
    before = _keys(project, config)
    for name, value in (("rank", 3), ("alpha", 3.0), ("handover", "merge")):
        adapter = replace(config.adapter, **{name: value})
        assert _keys(project, replace(config, adapter=adapter)) == before, name
    whole_sft = _keys(project, project.compose("adapter=lora").config)["sft"]
    assert whole_sft == before["sft"]


def test_adapter_of_a_model_that_lies_in_files_is_in_the_key_of_sft_too(
    project: Project, saved: Path
) -> None:
    config = project.compose("stage=sft", f"stage.policy='{saved}'").config
    adapted = replace(config, adapter=replace(config.adapter, kind="lora"))
    assert _keys(project, config) != _keys(project, adapted)


def test_missing_peft_is_told_before_anything_runs(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MachineError, match=r"^adapter=lora needs peft, .* pip install 'alignpipe\[lora\]'$"):
        make_plan(project.compose("adapter=lora").config)


def test_missing_peft_is_told_of_a_parent_with_an_adapter(
    project: Project, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (saved / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MachineError, match="saved: has an adapter, which needs peft"):
        make_plan(project.compose("stage=sft", f"stage.policy='{saved}'").config)


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
        make_plan(replace(config, launch=replace(config.launch, device="cpu")))
    with pytest.raises(ConfigError, match="model=tiny has none"):
        make_plan(config)


def test_shared_weights_are_not_cut_over_processes(project: Project) -> None:
    with pytest.raises(ConfigError, match=r"launch\.strategy: fsdp2 .* take launch=ddp, or adapter=none"):
        make_plan(project.compose("adapter=lora", "launch=fsdp2").config)
