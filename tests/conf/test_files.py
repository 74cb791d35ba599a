"""Every file of conf/ composes, is commented key by key, and keeps to the house order."""

import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import yaml

from alignpipe.compose import compose
from alignpipe.compose.composition import built_in_folder
from alignpipe.compose.yaml_files import check_file, key_lines
from alignpipe.config import (
    KINDS,
    PREFERENCE_LOSSES,
    Config,
    DataConfig,
    GateConfig,
    ModelConfig,
    RewardConfig,
    inherited,
)

CONF = built_in_folder()
FILES = sorted(CONF.rglob("*.yaml"))
PIPELINES = {
    "llama2_style": ["sft", "collect", "rm", "rs", "ppo", "eval"],
    "instructgpt_style": ["sft", "collect", "rm", "ppo", "eval"],
    "zephyr_style": ["sft", "collect", "dpo", "eval"],
    "from_scratch": ["pretrain", "sft", "collect", "rm", "rs", "ppo", "eval"],
    "llama2_rounds": [
        "sft",
        *(f"{kind}_{number}" for number in range(1, 6) for kind in ("collect", "rm", "rs")),
        "ppo_5",
        "eval",
    ],
    "online_dpo": ["sft", *(f"{kind}_{n}" for n in (1, 2, 3) for kind in ("collect", "dpo")), "eval"],
}


@cache
def _config(*words: str) -> Config:
    return compose(list(words)).config


def _name(path: Path) -> str:
    return path.relative_to(CONF).as_posix()


def _word(path: Path) -> list[str]:
    """The word that chooses a file."""
    group, _, option = _name(path).removesuffix(".yaml").rpartition("/")
    extra = {"pretrained": ["model.path=x"], "file": ["data.path=x"]}.get(option, [])
    if group == "reward":
        return ["stage=ppo", "stage.reward_model=rm", f"reward@stage.reward={option}"]
    needs_reward_model = ["stage.reward_model=rm"] if group == "stage" and option in ("rs", "ppo") else []
    return [f"{group}={option}", *extra, *needs_reward_model] if group else []


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_file_composes(path: Path) -> None:
    check_file(path)
    config = _config(*_word(path))
    assert (config.stage is None) != (config.pipeline is None)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_every_key_has_a_comment_above_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    flow = {found.key for found in key_lines(path) if "{" in text.splitlines()[found.line - 1]}
    for found in key_lines(path):
        top = found.key.split(".")[0]
        # A section of a stage or a group is named by its key, and says nothing that its keys do not.
        plain_section = re.fullmatch(
            r"run|stages?|stages\.\w+(\.data)?|pipeline|model|monitor|data(\.labelers)?", found.key
        )
        inside_flow = any(found.key.startswith(f"{key}.") for key in flow)
        if top in ("defaults", "hydra") or inside_flow or plain_section or found.key == "data.labelers.bias":
            continue
        # In the help file the keys are Hydra's own.
        assert found.comment or path.parent.name == "help", f"{_name(path)}:{found.line}: {found.key}"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_no_comment_stands_beside_a_value(path: Path) -> None:
    if path.parent.name == "help":
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert line.lstrip().startswith("#") or " #" not in line, f"{_name(path)}:{number}"


@pytest.mark.parametrize("kind", KINDS)
def test_stage_file_sets_every_key_of_its_schema_but_data(kind: str) -> None:
    found = {found.key.split(".")[0] for found in key_lines(CONF / "stage" / f"{kind}.yaml")}
    keys = found - {"defaults"}
    known = {spec.name for spec in fields(KINDS[kind])} - {
        "data",
        "demonstrations",
        "text_data",
        "ptx_data",
        "reward",
        "rollout",
    }
    assert keys == known


def test_reward_file_sets_every_key_of_its_schema() -> None:
    nested = {f"gate.{spec.name}" for spec in fields(GateConfig)}
    keys = {found.key for found in key_lines(CONF / "reward" / "sum.yaml")} - {"defaults"}
    assert keys == {spec.name for spec in fields(RewardConfig)} | nested


def test_global_package_line_is_the_first_line() -> None:
    for path in [*(CONF / "pipeline").glob("*.yaml"), *(CONF / "experiment").glob("*.yaml")]:
        assert path.read_text(encoding="utf-8").startswith("# @package _global_\n"), path


@pytest.mark.parametrize(("pipeline", "order"), PIPELINES.items())
def test_pipeline_has_its_stages_and_every_input_stands_before_its_reader(
    pipeline: str, order: list[str]
) -> None:
    config = _config(f"pipeline={pipeline}")
    assert config.pipeline is not None
    assert config.pipeline.order == order
    assert set(config.stages) == set(order)
    for name, stage in config.stages.items():
        assert isinstance(stage, KINDS[stage.kind])
        raw = {spec.name: getattr(stage, spec.name) for spec in fields(stage)}
        read = [raw[role] for role in ("policy", "reference", "reward_model") if raw.get(role)]
        for source in [*read, *raw.get("policies", [])]:
            assert source == "base" or order.index(source) < order.index(name), (name, source)


def test_default_is_the_llama2_pipeline_on_the_embedded_world() -> None:
    config = _config()
    assert config.pipeline is not None
    assert (config.pipeline.name, config.model.path, config.data.path) == ("llama2_style", "tiny", "toy")
    assert config.stages["rm"].data.path == "collect"


def test_pretraining_learns_every_token_of_raw_text() -> None:
    stage = _config("pipeline=from_scratch").stages["pretrain"]
    assert (stage.kind, stage.data.format) == ("sft", "text")
    assert vars(stage)["loss_on"] == "all"


def test_stage_data_is_the_roots_leaf_by_leaf() -> None:
    config = _config("stage=rm", "data.max_rows=7", "data.world.mix.fact=9", "stage.data.max_bad=1")
    assert config.stage is not None
    assert config.stage.data.max_rows == 7
    assert config.stage.data.world.mix["fact"] == 9
    assert (config.stage.data.max_bad, config.data.max_bad) == (1.0, 0.01)


def test_one_mix_weight_of_a_stage_leaves_the_others_as_they_were() -> None:
    config = _config("stage=sft", "stage.data.world.mix.fact=9")
    assert config.stage is not None
    assert config.stage.data.world.mix == config.data.world.mix | {"fact": 9.0}


def test_inherited_schema_points_every_leaf_at_the_root() -> None:
    data = inherited(DataConfig, "data")
    assert data.shares.eval == "${data.shares.eval}"


def test_model_training_is_read_by_the_stages() -> None:
    config = _config("stage=dpo", "model.training.dpo.learning_rate=0.3")
    assert config.stage is not None
    assert vars(config.stage)["learning_rate"] == 0.3


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_every_loss_of_dpo_has_usual_numbers_for_the_keys_it_reads_and_for_no_others(loss: str) -> None:
    stage = vars(_config("stage=dpo", f"stage.loss={loss}").stage)
    keys = {key for keys in PREFERENCE_LOSSES.values() for key in keys}
    assert {key for key in keys if stage[key] is not None} == set(PREFERENCE_LOSSES[loss])
    assert set(stage["usual"]) == set(PREFERENCE_LOSSES)


def test_a_number_that_is_said_stands_before_the_usual_one_of_a_loss() -> None:
    assert vars(_config("stage=dpo", "stage.loss=simpo", "stage.beta=7").stage)["beta"] == 7


def test_every_stage_value_that_depends_on_size_is_in_both_models() -> None:
    def training(option: str) -> dict[str, set[str]]:
        values = yaml.safe_load((CONF / "model" / f"{option}.yaml").read_text(encoding="utf-8"))["training"]
        return {kind: set(keys) for kind, keys in values.items()}

    assert training("tiny") == training("pretrained")
    assert set(training("tiny")) == set(KINDS)


def test_every_model_key_is_in_the_schema() -> None:
    known = {spec.name for spec in fields(ModelConfig)} | {"defaults"}
    for path in (CONF / "model").glob("*.yaml"):
        assert {found.key for found in key_lines(path) if "." not in found.key} <= known


def test_readme_names_every_option() -> None:
    text = (CONF / "README.md").read_text(encoding="utf-8")
    for path in FILES:
        if path.parent != CONF and path.parent.name != "help":
            assert re.search(rf"\b{path.stem}\b", text), path


def test_reward_hacking_biases_labelers_and_loosens_kl() -> None:
    hacked = _config("experiment=reward_hacking")
    plain = _config("pipeline=instructgpt_style")
    assert hacked.data.labelers.bias.flattery > plain.data.labelers.bias.flattery
    assert hacked.stages["collect"].data.labelers.bias == hacked.data.labelers.bias
    assert vars(hacked.stages["ppo"])["kl_coef"] < vars(plain.stages["ppo"])["kl_coef"]
