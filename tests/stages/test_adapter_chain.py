"""Every stage with adapters: what is handed on, what a first step must show, and what stops and goes on."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignpipe.artifact import sha256_file, verify
from alignpipe.config import ArchitectureConfig
from alignpipe.data.collate import collate
from alignpipe.data.examples import Example
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.models.loading import ModelSource, load_policy
from alignpipe.models.saving import save_model
from alignpipe.models.scalar_head import load_scalar_model, sequence_scores
from alignpipe.pipeline.plan import make_plan
from tests.project import Project
from tests.stopping import stopped_at_the_first_save

LORA = ("adapter=lora", "adapter.rank=4", "model.training.dpo.log_steps=1", "model.training.ppo.log_steps=1")
# PPO alone, one rollout: what stands before it is reused.
SHORT = ("pipeline.order=[sft,collect,rm,ppo]", "model.training.ppo.num_rollouts=1")
POLICIES = ("sft", "rs", "ppo")
Chain = tuple[Project, Path, tuple[str, ...]]
WEIGHTS = "model.safetensors"
IDS = torch.tensor([[5, 17, 300, 4, 9, 88]])


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Adapters on a base that lies in a folder, as a pretrained model does."""
    folder = tmp_path_factory.mktemp("base") / "model"
    architecture = ArchitectureConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, seed=0)
    tokenizer = Tokenizer.toy()
    save_model(load_policy(ModelSource("tiny", architecture=architecture), tokenizer), tokenizer, folder)
    return (*LORA, f"model.path='{folder}'")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, words: tuple[str, ...]) -> Chain:
    """A finished llama2_style chain of adapters, the folder of its run, and the words it was run with."""
    project = Project(tmp_path_factory.mktemp("adapters") / "outputs")
    return project, project.run(*words), words


@pytest.fixture
def adapted(chain: Chain, tmp_path: Path) -> Project:
    """A copy of it, to be changed at will."""
    shutil.copytree(chain[0].outputs, tmp_path / "outputs", symlinks=True)
    return Project(tmp_path / "outputs")


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_every_stage_leaves_an_adapter_on_the_first_ones_base(chain: Chain) -> None:
    _, run, words = chain
    base = Path(words[-1].split("'")[1])
    for name in (*POLICIES, "rm"):
        verify(run / name)
        assert (run / name / WEIGHTS).samefile(run / "sft" / WEIGHTS), name
        assert (run / name / "adapter_model.safetensors").is_file()
    # Bit for bit, after five stages, and a copy: what the user does with his own file touches none of them.
    assert sha256_file(run / "ppo" / WEIGHTS) == sha256_file(base / WEIGHTS)
    assert not (run / "ppo" / WEIGHTS).samefile(base / WEIGHTS)


def test_folders_open_after_the_outputs_were_moved(adapted: Project, tmp_path: Path) -> None:
    moved = shutil.move(adapted.outputs, tmp_path / "moved")
    found = {}
    for folder in (Path(moved) / "stages").iterdir():
        if folder.name.startswith(POLICIES):
            found[folder.name.partition("-")[0]] = _logits(AutoModelForCausalLM.from_pretrained(folder))
    assert len(found) == 3
    assert not torch.equal(found["sft"], found["rs"]) and not torch.equal(found["rs"], found["ppo"])


def test_reward_model_gives_the_raw_scores_of_plain_transformers(chain: Chain) -> None:
    folder = chain[1] / "rm"
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = Tokenizer.load(folder, "")
    ours = load_scalar_model(ModelSource(str(folder)), tokenizer)
    batch = collate([Example(IDS[0].tolist(), [False] * 6)], tokenizer.pad_id)
    torch.testing.assert_close(_logits(plain)[0], sequence_scores(ours, batch), atol=1e-5, rtol=1e-5)


def test_dpo_begins_at_ln_2_from_the_sft_adapter(adapted: Project, words: tuple[str, ...]) -> None:
    run = adapted.run(*words, "pipeline=zephyr_style")
    assert _lines(run / "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert adapted.states()["sft"] == "reused"


def test_first_minibatch_meets_the_policy_that_sampled_and_its_reference(
    adapted: Project, words: tuple[str, ...]
) -> None:
    # From sft, held to sft: were the base the reference, KL would not be 0.
    line = _lines(adapted.run(*words, *SHORT, "stages.ppo.policy=sft") / "ppo")[0]
    assert line["ppo/ratio_first"] == pytest.approx(1.0, abs=1e-5)
    assert line["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    other = _lines(adapted.run(*words, *SHORT, "stages.ppo.policy=sft", "stages.ppo.reference=base") / "ppo")[
        0
    ]
    assert abs(other["objective/kl"]) > 1e-2


def test_stopped_and_resumed_equals_never_stopped(chain: Chain, adapted: Project) -> None:
    words = (*chain[2], "stages.ppo.save_steps=1")
    folder = next((adapted.outputs / "stages").glob("ppo-*"))
    shutil.rmtree(folder)
    with stopped_at_the_first_save():
        adapted.run(*words)
    state = load_file(next((adapted.outputs / "work").glob("ppo-*/states/step-*/state*.safetensors")))
    trained = {name for name in state if name.startswith("module.")}
    assert trained and all("lora_" in name or "score" in name for name in trained)
    adapted.run(*words)
    assert sha256_file(folder / "adapter_model.safetensors") == sha256_file(
        chain[1] / "ppo" / "adapter_model.safetensors"
    )


def test_every_reward_model_is_an_adapter_of_its_own(
    adapted: Project, words: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text("def score(prompts, responses):\n    return [3.0] * len(responses)\n")
    reward = (
        f"stages.ppo.reward.function={tmp_path}/mine.py:score",
        "stages.ppo.reward.models={latest/rm:0.5}",
    )
    run = adapted.run(*words, *SHORT, "stages.ppo.policy=sft", *reward, "stages.ppo.reward.gate.model=rm")
    (line,) = _lines(run / "ppo")
    # One adapter under two names.
    assert line["reward/rm"] == pytest.approx(line["reward/latest/rm"], abs=1e-5)
    assert line["reward/function"] == 3.0
    assert 0 <= line["reward/gated"] <= 1


def test_whole_weights_go_on_from_an_adapter_and_the_other_way(adapted: Project, chain: Chain) -> None:
    sft = chain[1] / "sft"
    whole = (
        adapted.run("stage=sft", f"stage.policy='{sft}'", "stage.learning_rate=1e-9", "stage.max_steps=1")
        / "sft"
    )
    assert not (whole / "adapter_config.json").exists()
    # At next to no learning rate the result is the parent with its adapter, not the bare base.
    plain = [_logits(AutoModelForCausalLM.from_pretrained(folder)) for folder in (whole, sft)]
    torch.testing.assert_close(plain[0], plain[1], atol=1e-4, rtol=1e-4)
    again = adapted.run("stage=sft", f"stage.policy='{whole}'", "stage.max_steps=1", *LORA) / "sft"
    assert sha256_file(again / WEIGHTS) == sha256_file(whole / WEIGHTS)


def test_model_built_from_nothing_is_first_trained_whole(copied: Project) -> None:
    words = ("adapter=lora", "adapter.rank=4", "pipeline.order=[sft,collect,rm]")
    run = copied.run(*words)
    assert copied.states() == {"sft": "reused", "collect": "done", "rm": "done"}
    assert not (run / "sft" / "adapter_config.json").exists()
    assert (run / "rm" / WEIGHTS).samefile(run / "sft" / WEIGHTS)
    warnings = make_plan(copied.compose(*words).config).warnings
    assert [line for line in warnings if "adapters" in line] == [
        "sft: tiny is built from nothing, so this stage trains whole weights; "
        "they are the base of the adapters after it"
    ]


@pytest.mark.slow
def test_merged_hand_over_writes_whole_weights_in_every_stage(
    project: Project, words: tuple[str, ...]
) -> None:
    run = project.run(*words, "adapter.handover=merge")
    assert set(project.states().values()) == {"done"}
    files = {}
    for name in (*POLICIES, "rm"):
        verify(run / name)
        assert not list((run / name).glob("adapter*"))
        files[name] = sha256_file(run / name / WEIGHTS)
    assert len(set(files.values())) == 4
    assert AutoModelForSequenceClassification.from_pretrained(run / "rm").score.weight.abs().sum() > 0
    dpo = project.run(*words, "adapter.handover=merge", "pipeline=zephyr_style") / "dpo"
    assert _lines(dpo)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert not list(dpo.glob("adapter*"))
