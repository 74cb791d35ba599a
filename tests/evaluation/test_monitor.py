"""A monitor in its stages: what it sees, what it leaves alone, and what it does to a checkpoint."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignpipe.artifact import sha256_file
from alignpipe.compose.composition import compose
from alignpipe.errors import DataError
from alignpipe.pipeline.plan import make_plan
from alignpipe.pipeline.runner import run
from tests.project import Project

PPO = ("stage=ppo", "stage.policy=latest/sft", "stage.reference=latest/sft", "stage.reward_model=latest/rm")
DPO = ("stage=dpo", "stage.policy=latest/sft", "stage.data.path=latest/collect", "stage.monitor.every=2")
CHAIN = ("pipeline.order=[sft,collect,rm,rs,ppo]",)
FEW = ("monitor.num_prompts=12",)
WEIGHTS = "model.safetensors"
# Far from the start at the first look.
WILD = ("stage.learning_rate=0.05", "monitor.max_kl=0.001")


def _manifest(run: Path, stage: str) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((run / stage / "alignpipe.json").read_text())["metrics"]
    return metrics


def _looks(run: Path, stage: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "monitor/kl" in line]


def _hash(run: Path, stage: str) -> str:
    return sha256_file(run / stage / WEIGHTS)


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_looking_leaves_rs_and_ppo_as_they_are(copied: Project) -> None:
    words = ("model.training.rs.batch_size=4", "model.training.rs.micro_batch_size=4")
    alone = copied.run(*words, *CHAIN)
    watched = copied.run(*words, *CHAIN, "monitor=warn", *FEW, "stages.rs.monitor.every=2")
    assert alone != watched
    for stage in ("rs", "ppo"):
        assert _hash(alone, stage) == _hash(watched, stage)
        looks = _looks(watched, stage)
        assert _looks(alone, stage) == []
        assert len(looks) >= 3
        # The reward model is not what KL is.
        assert looks[-1]["monitor/proxy"] != looks[-1]["monitor/kl"]
        assert _manifest(watched, stage)["monitor"]["stopped_at"] is None
        assert "monitor" not in _manifest(alone, stage)
    # Two rollouts of four updates; rs is held against where it started, ppo against sft.
    assert [look["step"] for look in _looks(watched, "ppo")] == [0, 4, 8]
    assert _looks(watched, "rs")[0]["monitor/kl"] == pytest.approx(0, abs=1e-4)
    assert abs(_looks(watched, "ppo")[0]["monitor/kl"]) > 1e-3
    # What rs ends with is what ppo begins with, and both look at the same prompts.
    ended, began = _looks(watched, "rs")[-1], _looks(watched, "ppo")[0]
    assert ended["monitor/held_out"] == began["monitor/held_out"]


def test_looking_leaves_dpo_as_it_is(copied: Project) -> None:
    alone, watched = copied.run(*DPO), copied.run(*DPO, "monitor=warn", *FEW)
    assert _hash(alone, "dpo") == _hash(watched, "dpo")
    looks = _looks(watched, "dpo")
    assert [look["step"] for look in looks] == [0, 2, 3]
    assert looks[0]["monitor/kl"] == pytest.approx(0, abs=1e-4)
    assert looks[-1]["monitor/kl"] > 1e-5
    # The implicit reward is the log-ratio.
    assert all(look["monitor/proxy"] == look["monitor/kl"] for look in looks)


def test_restore_hands_on_the_best_weights_and_stop_those_of_the_alarm(copied: Project) -> None:
    stop, restore = (copied.run(*PPO, *WILD, *FEW, f"monitor={action}") for action in ("stop", "restore"))
    looks = _looks(stop, "ppo")
    assert looks == _looks(restore, "ppo")
    # Training would have gone on for one rollout more. So large a step ruins the policy.
    assert [look["step"] for look in looks] == [0, 4]
    assert looks[1]["monitor/held_out"] < looks[0]["monitor/held_out"]
    for folder in (stop, restore):
        found = _manifest(folder, "ppo")["monitor"]
        assert (found["alarms"]["kl"], found["best_at"], found["stopped_at"]) == (1, 0, 1)
    start = load_file(next((copied.outputs / "stages").glob("sft-*")) / WEIGHTS)
    assert _same(start, load_file(restore / "ppo" / WEIGHTS))
    assert not _same(start, load_file(stop / "ppo" / WEIGHTS))


def test_reward_model_judges_where_it_is_named(copied: Project, tmp_path: Path) -> None:
    rm = next((copied.outputs / "stages").glob("rm-*"))
    other = tmp_path / "other"
    shutil.copytree(rm, other)
    (other / "alignpipe.json").unlink()
    weights = load_file(rm / WEIGHTS)
    save_file(
        {**weights, "score.weight": -weights["score.weight"]}, other / WEIGHTS, metadata={"format": "pt"}
    )
    judged = copied.run(*PPO, "monitor=warn", *FEW, "stage.num_rollouts=1", f"stage.monitor.judge='{other}'")
    figures = json.loads((rm / "alignpipe.json").read_text())["metrics"]
    looks = _looks(judged, "ppo")
    assert len(looks) == 2
    for look in looks:
        # The other way round, and raw, since nothing beside it says how to normalise.
        raw = look["monitor/proxy"] * figures["reward_std"] + figures["reward_mean"]
        assert look["monitor/held_out"] == pytest.approx(-raw, abs=1e-4)


def test_plan_warns_where_the_monitor_and_eval_ask_the_same_prompts(copied: Project) -> None:
    def warnings(*words: str) -> list[str]:
        return [
            line for line in make_plan(copied.compose("seed=3", *words).config).warnings if "monitor" in line
        ]

    # Eval asks the first 16 of the share.
    told = re.search(r"share has (\d+)", warnings("monitor=warn", "monitor.num_prompts=1000")[0])
    assert told is not None
    share = int(told[1])
    assert warnings("monitor=warn", f"monitor.num_prompts={share - 16}") == []
    assert [
        line.partition(" of")[0] for line in warnings("monitor=warn", f"monitor.num_prompts={share - 14}")
    ] == [
        "rs: 2",
        "ppo: 2",
    ]


def test_data_without_a_held_out_prompt_is_refused(copied: Project, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(12)))
    words = (
        *PPO,
        "stage.rollout_size=8",
        f"stage.data.path={path}",
        "monitor=warn",
        "data.shares={sft:0.5,preference:0.25,rl:0.2499,eval:0.0001}",
    )
    with pytest.raises(DataError, match="no prompt in the evaluation share; add rows"):
        copied.run(*words)


def _run_whole(outputs: Path, *words: str) -> Path:
    """A run on the embedded world at its full size."""
    composed = compose([f"output_dir='{outputs}'", "seed=0", *words])
    run(composed.config, list(words), composed.yaml)
    return outputs / "runs" / (outputs / "latest").read_text().strip()


# Trains an sft, a reward model and PPO of the usual size: some minutes.
@pytest.mark.slow
def test_hacked_training_ends_at_its_peak_and_bends_without_a_monitor(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    policies = "stages.eval.policies=[sft,ppo]"
    restored = _run_whole(outputs, "experiment=reward_hacking_monitored", policies)
    hacked = _run_whole(outputs, "experiment=reward_hacking", "monitor=warn", policies)
    found = _manifest(restored, "ppo")["monitor"]
    assert "overoptimization" in found["alarms"]
    looks = _looks(hacked, "ppo")
    # One trajectory: watched it ends early.
    assert _looks(restored, "ppo") == looks[: found["stopped_at"] + 1]
    gold, proxy = ([look[f"monitor/{name}"] for look in looks] for name in ("held_out", "proxy"))
    peak = gold.index(max(gold))
    # Gao et al.: against the distance to the reference the proxy rises on while gold bends down.
    assert max(gold) - gold[-1] > 0.1
    assert proxy[-1] > proxy[peak] + 0.5
    kl = [look["monitor/kl"] for look in looks]
    assert kl[peak] < kl[-1] / 4
    # On the prompts of eval, which the monitor did not see.
    scores = [
        json.loads((folder / "eval" / "scores.json").read_text())["policies"][1]
        for folder in (restored, hacked)
    ]
    assert scores[0]["gold"]["overall"] > scores[1]["gold"]["overall"] + 0.1
    assert max(gold) - gold[found["best_at"]] < 0.05
