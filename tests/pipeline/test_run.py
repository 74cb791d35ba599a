"""The chain as a user meets it: everything done, nothing twice, only what changed again."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from alignpipe.artifact import read_manifest, verify
from alignpipe.errors import CheckpointError, ConfigError
from alignpipe.pipeline.plan import make_plan
from tests.project import SMALL, Project

ORDER = ["sft", "collect", "rm", "rs", "ppo", "eval"]


def _run_folder(project: Project) -> Path:
    return project.outputs / "runs" / (project.outputs / "latest").read_text().strip()


def test_chain_ends_with_every_stage_done(finished: Project) -> None:
    assert list(finished.states()) == ORDER
    assert set(finished.states().values()) == {"done"}
    assert not any((finished.outputs / "work").glob("*/"))


def test_scorecard_has_the_promised_shape(finished: Project) -> None:
    scorecard = json.loads((_run_folder(finished) / "scorecard.json").read_text())
    assert list(scorecard["policies"]) == ["base", "sft", "rs", "ppo"]
    for figures in scorecard["policies"].values():
        gold = figures["gold"]
        assert 0 <= gold["overall"] <= 1
        assert all(0 <= gold[measure] <= 1 for measure in ("helpful", "truthful", "harmless"))
        low, high = gold["ci95"]
        assert low <= gold["overall"] <= high
        assert all(isinstance(figures[name], float) for name in ("reward", "kl", "length"))
        assert set(figures["prejudice"]) >= {"gold_gap", "reward_gap", "refusal_gap", "questions"}
    # The SFT policy is its own reference.
    assert scorecard["policies"]["sft"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert scorecard["policies"]["base"]["kl"] != pytest.approx(0.0, abs=1e-3)
    assert set(scorecard["reward_model"]) >= {"accuracy", "gold_accuracy"}
    assert all(0 <= scorecard["reward_model"][name] <= 1 for name in ("accuracy", "gold_accuracy"))


def test_status_has_the_promised_shape(finished: Project) -> None:
    status = json.loads(_command(finished, "status", "--json"))
    assert status["run"] == _run_folder(finished).name
    assert [stage["name"] for stage in status["stages"]] == ORDER
    for stage in status["stages"]:
        assert {"name", "kind", "key", "state", "steps", "path", "metrics"} <= set(stage)
        assert read_manifest(Path(stage["path"])) is not None


def test_every_artifact_holds_its_kind_and_verifies(finished: Project) -> None:
    folders = sorted((finished.outputs / "stages").iterdir())
    assert len(folders) == len(ORDER)
    for folder in folders:
        manifest = verify(folder)
        assert folder.name == f"{manifest.kind}-{manifest.key}"
        assert (folder / "metrics.jsonl").is_file() or manifest.kind == "eval"


@pytest.mark.parametrize("name", ["sft", "rs", "ppo"])
def test_policy_opens_in_plain_transformers_and_generates(finished: Project, name: str) -> None:
    folder = _run_folder(finished) / name
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What color is the sky?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )["input_ids"]
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert out.shape[1] > ids.shape[1]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_reward_model_opens_in_plain_transformers(finished: Project) -> None:
    folder = _run_folder(finished) / "rm"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.num_labels == 1
    assert model.config.problem_type == "regression"
    assert model.config.pad_token_id is not None


def test_samples_and_metrics_are_written(finished: Project) -> None:
    folder = _run_folder(finished)
    assert len((folder / "sft" / "samples.jsonl").read_text().splitlines()) > 0
    rows = [json.loads(line) for line in (folder / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert {"objective/score", "objective/kl", "objective/gold", "ppo/clip_fraction"} <= set(rows[-1])


def _command(project: Project, command: str, *words: str) -> str:
    place = [] if command in ("run", "plan") else ["--output-dir", str(project.outputs)]
    call = [sys.executable, "-m", "alignpipe", command, *place, *words]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=project.outputs.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_second_run_reuses_everything_quickly_without_torch(copied: Project) -> None:
    words = [*SMALL, f"output_dir='{copied.outputs}'"]
    code = (
        "import sys; from alignpipe.cli import main\n"
        f"sys.argv = ['alignpipe', 'run', *{words!r}]\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Time on a processor, which a busy machine does not stretch as it does the clock.
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 0, done.stderr
    assert took < 5
    assert set(copied.states().values()) == {"reused"}
    assert "ppo" in done.stdout


def test_changed_key_makes_only_what_depends_on_it(copied: Project) -> None:
    copied.run("stages.ppo.kl_coef=0.3")
    assert copied.states() == {
        "sft": "reused",
        "collect": "reused",
        "rm": "reused",
        "rs": "reused",
        "ppo": "done",
        "eval": "done",
    }
    assert len(list((copied.outputs / "stages").iterdir())) == len(ORDER) + 2


def test_what_cannot_change_a_result_changes_no_key(copied: Project) -> None:
    copied.run("model.training.sft.micro_batch_size=8", "stages.ppo.log_steps=7", "rollout.batch_size=32")
    assert set(copied.states().values()) == {"reused"}


def test_labelers_are_no_part_of_what_does_not_ask_them(copied: Project) -> None:
    plan = make_plan(copied.compose("data.labelers.noise=0.5").config)
    assert {row.name: row.state for row in plan.rows} == {
        "sft": "reuse",
        "collect": "run",
        "rm": "run",
        "rs": "run",
        "ppo": "run",
        "eval": "run",
    }
    assert "labelers.noise" in {row.name: row.why for row in plan.rows}["collect"]


def test_damaged_artifact_is_made_again_and_nothing_is_deleted(copied: Project) -> None:
    folder = _run_folder(copied) / "rm"
    weights = folder.resolve() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    copied.run()
    assert copied.states()["rm"] == "done"
    assert copied.states()["sft"] == "reused"
    assert any(".replaced-" in path.name for path in (copied.outputs / "stages").iterdir())


def test_flipped_bit_in_a_parent_is_refused_when_it_is_read(copied: Project) -> None:
    weights = (_run_folder(copied) / "rm").resolve() / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its content changed"):
        copied.run("stages.ppo.kl_coef=0.3")


def test_stage_alone_reads_a_stage_of_a_run(copied: Project) -> None:
    folder = copied.run("stage=dpo", "stage.policy=latest/sft", "stage.log_steps=1")
    assert copied.states() == {"dpo": "done"}
    rows = [json.loads(line) for line in (folder / "dpo" / "metrics.jsonl").read_text().splitlines()]
    # Policy and reference are the same model at the start: ln 2 on every pair.
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_kind_can_stand_twice(copied: Project) -> None:
    copied.run(
        "+stage@stages.rs_2=rs",
        "stages.rs_2.policy=rs",
        "stages.rs_2.reward_model=rm",
        "pipeline.order=[sft,collect,rm,rs,rs_2]",
    )
    assert copied.states() == {
        "sft": "reused",
        "collect": "reused",
        "rm": "reused",
        "rs": "reused",
        "rs_2": "done",
    }


def test_stage_left_out_of_the_order_comes_from_the_store(copied: Project, project: Project) -> None:
    copied.run("pipeline.order=[ppo]", "stages.ppo.kl_coef=0.4")
    assert copied.states() == {"ppo": "done"}


def test_stage_left_out_and_not_finished_is_an_error(project: Project) -> None:
    with pytest.raises(CheckpointError, match=r"add .* to pipeline\.order"):
        project.run("pipeline.order=[ppo]")
    assert not project.outputs.exists() or not (project.outputs / "runs").exists()


def test_run_name_of_other_settings_is_refused(copied: Project) -> None:
    copied.run("run.name=mine")
    assert copied.states("mine")["ppo"] == "reused"
    with pytest.raises(ConfigError, match="mine was run with other settings"):
        copied.run("run.name=mine", "stages.ppo.kl_coef=0.9")


def test_the_same_words_land_in_the_same_folder(copied: Project) -> None:
    before = sorted((copied.outputs / "runs").iterdir())
    copied.run()
    assert sorted((copied.outputs / "runs").iterdir()) == before


def test_zephyr_style_reuses_sft_and_preferences(copied: Project) -> None:
    folder = copied.run("pipeline=zephyr_style")
    assert copied.states() == {"sft": "reused", "collect": "reused", "dpo": "done", "eval": "done"}
    scorecard = json.loads((folder / "scorecard.json").read_text())
    assert list(scorecard["policies"]) == ["base", "sft", "dpo"]
    assert (
        scorecard["reward_model"]["accuracy"] is None and scorecard["reward_model"]["gold_accuracy"] is None
    )
    assert scorecard["policies"]["dpo"]["reward"] is None


@pytest.mark.slow
def test_from_scratch_pretrains_first(project: Project) -> None:
    folder = project.run("pipeline=from_scratch")
    assert next(iter(project.states())) == "pretrain"
    assert set(project.states().values()) == {"done"}
    pretrain, sft = read_manifest(folder / "pretrain"), read_manifest(folder / "sft")
    assert pretrain is not None and sft is not None
    assert sft.parents["policy"].key == pretrain.key
