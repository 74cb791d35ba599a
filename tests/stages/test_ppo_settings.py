"""What each further setting of PPO does to a run, that none of them loses anything by a stop, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from alignpipe.config import PPOConfig
from alignpipe.data.collate import collate
from alignpipe.data.examples import Example
from alignpipe.errors import ConfigError, Stopped
from alignpipe.losses.ppo import kl_k3, policy_loss
from alignpipe.pipeline.store import TASK
from alignpipe.rollout.experience import Experience
from alignpipe.stages.ppo import Models, _policy_fn
from tests.launch.cases import run_stage
from tests.project import PPO_ALONE, Project

# The smallest run that learns something that can be seen.
FAST = ("stage.learning_rate=5e-3", "stage.warmup_ratio=0", "stage.num_rollouts=3")
GROUPS = ("stage.num_samples=4", "stage.rollout_size=4")
# Every setting whose state a stop could lose.
EVERYTHING = (
    "stage.reward_scaling=running",
    "stage.ema_decay=0.5",
    "stage.ptx_coef=0.5",
    "stage.kl_controller=adaptive",
    "stage.kl_horizon=50",
    "stage.kl_budget=0.001",
    "stage.on_kl_budget=warn",
    "stage.max_update_kl=0.01",
    "stage.whiten_rewards=true",
    "stage.entropy_coef=0.01",
    "stage.dual_clip=3",
    "stage.kl_in=loss",
    "stage.kl_estimator=k2",
    "stage.value_pretrain_rollouts=1",
)


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def _distance(one: Path, two: Path) -> float:
    mine, theirs = _weights(one), _weights(two)
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


def test_kl_budget_ends_training_before_the_policy_is_trained_on(
    copied: Project, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copied.run(*PPO_ALONE, *FAST, "stage.kl_budget=0.001") / "ppo"
    lines = _lines(folder)
    assert len(lines) == 2
    assert lines[0]["objective/kl"] < 0.001 < lines[1]["objective/kl"]
    assert "ppo/policy_loss" in lines[0] and "ppo/policy_loss" not in lines[1]
    metrics = json.loads((folder / "alignpipe.json").read_text())["metrics"]
    assert (metrics["over_kl_budget"], metrics["kl"]) == (True, pytest.approx(lines[1]["objective/kl"]))
    told = [line for line in capfd.readouterr().err.splitlines() if "warning: ppo: KL" in line]
    assert len(told) == 1 and "kl_budget=0.001" in told[0] and "training ends here" in told[0]


def test_kl_budget_may_only_warn(copied: Project, capfd: pytest.CaptureFixture[str]) -> None:
    folder = copied.run(*PPO_ALONE, *FAST, "stage.kl_budget=0.001", "stage.on_kl_budget=warn") / "ppo"
    assert len(_lines(folder)) == 3
    told = [line for line in capfd.readouterr().err.splitlines() if "warning: ppo: KL" in line]
    assert len(told) == 1 and "training goes on" in told[0]


def test_rest_of_a_rollout_is_left_out_once_an_update_went_too_far(copied: Project) -> None:
    words = ("stage.ppo_epochs=2", "stage.num_rollouts=1")
    lines = _lines(copied.run(*PPO_ALONE, *FAST, *words, "stage.max_update_kl=1e-5") / "ppo")
    # The first minibatch meets the policy that sampled; the second is over the limit already.
    assert lines[0]["ppo/updates"] == 2
    assert _lines(copied.run(*PPO_ALONE, *FAST, *words) / "ppo")[0]["ppo/updates"] == 4


def test_value_model_learns_alone_at_first(copied: Project) -> None:
    lines = _lines(copied.run(*PPO_ALONE, *FAST, "stage.value_pretrain_rollouts=1") / "ppo")
    assert ["ppo/policy_loss" in line for line in lines] == [False, True, True]
    assert all("ppo/value_loss" in line for line in lines)
    assert lines[1]["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert abs(lines[2]["objective/kl"]) > 1e-3


def test_running_scale_makes_the_scores_of_the_first_rollout_standard(copied: Project) -> None:
    words = ("stage.reward_scaling=running", "stage.missing_eos_penalty=0", "stage.score_clip=50")
    lines = _lines(copied.run(*PPO_ALONE, *words) / "ppo")
    assert lines[0]["objective/score"] == pytest.approx(0.0, abs=1e-6)
    # Later ones are measured by all rollouts so far.
    assert abs(lines[1]["objective/score"]) > 1e-3


def test_average_that_forgets_at_once_is_the_last_weights_and_a_slow_one_the_first(copied: Project) -> None:
    last = copied.run(*PPO_ALONE, *FAST) / "ppo"
    same = copied.run(*PPO_ALONE, *FAST, "stage.ema_decay=0") / "ppo"
    assert _distance(last, same) == 0
    slow = copied.run(*PPO_ALONE, *FAST, "stage.ema_decay=0.999") / "ppo"
    start = next((copied.outputs / "stages").glob("sft-*"))
    assert 0 < _distance(slow, start) < 0.02 * _distance(last, start)


def test_weights_that_a_monitor_went_back_to_are_handed_on_without_an_average(copied: Project) -> None:
    # Alarmed at the first look whatever the policy does.
    watch = (
        "action=restore",
        "num_prompts=12",
        "max_kl=1e-6",
        "min_entropy_ratio=1",
        "max_length_ratio=1.0001",
    )
    words = (*PPO_ALONE, *FAST, *(f"stage.monitor.{word}" for word in watch))
    plain, averaged = (copied.run(*words, *more) / "ppo" for more in ((), ("stage.ema_decay=0.999",)))
    metrics = json.loads((averaged / "alignpipe.json").read_text())["metrics"]
    assert metrics["monitor"]["stopped_at"] == 1
    assert _distance(plain, averaged) == 0


@pytest.mark.parametrize(
    "words",
    [("advantage=rloo",), ("advantage=grpo", "kl_in=loss", "kl_estimator=k3"), ("advantage=reinforce_pp",)],
    ids=["rloo", "grpo", "reinforce_pp"],
)
def test_estimators_without_a_value_model_train_none(copied: Project, words: tuple[str, ...]) -> None:
    lines = _lines(copied.run(*PPO_ALONE, *GROUPS, *(f"stage.{word}" for word in words)) / "ppo")
    assert not any("value" in name or "variance" in name for line in lines for name in line)
    assert all(line["ppo/ratio_first"] == pytest.approx(1.0, abs=1e-5) for line in lines)
    assert abs(lines[1]["objective/kl"]) > 1e-3


def test_stop_and_resume_lose_nothing(copied: Project) -> None:
    words = (*PPO_ALONE, *FAST, *EVERYTHING, "stage.save_steps=100")
    whole = copied.run(*words) / "ppo"
    lines = _lines(whole)
    assert {"ppo/ptx_loss", "ppo/approx_kl"} <= lines[1].keys()
    assert len({line["objective/kl_coef"] for line in lines}) > 1
    expected = _weights(whole)
    task = copied.prepare("ppo", *words)
    stop = task.work / "stop"
    for _ in range(2):
        # Asked to stop before it starts: it does one rollout, saves and ends.
        stop.touch()
        with pytest.raises(Stopped):
            run_stage(task.work / TASK, stop)
    stop.unlink()
    run_stage(task.work / TASK, stop)
    found = _weights(task.target)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ours = _lines(task.target)
    for line in (*lines, *ours):
        line.pop("tokens_per_second")
    assert ours == lines


@pytest.fixture
def experience(make_llama: Callable[..., PreTrainedModel]) -> Experience:
    """Six responses of unequal length from another policy than the one that is trained."""
    torch.manual_seed(3)
    examples = [
        Example([7] * 3 + torch.randint(5, 60, (n,)).tolist(), [False] * 3 + [True] * n) for n in range(1, 7)
    ]
    batch = collate(examples, 0)
    mask = batch.loss_mask[:, 1:]
    old, reference, advantages = (torch.randn(mask.shape) * mask for _ in range(3))
    return Experience(batch, mask, old - 4 * mask, reference - 4 * mask, advantages)


SETTINGS = ("stage.kl_in=loss", "stage.kl_estimator=k3", "stage.entropy_coef=0.5", "stage.dual_clip=2")


def _losses(
    project: Project, model: PreTrainedModel, experience: Experience, cut: int
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of all responses, in micro-batches of a size, shortest first."""
    config = project.compose(*PPO_ALONE[:1], "stage.reward_model=rm", *SETTINGS).config.stage
    models = cast(Models, SimpleNamespace(policy=model))
    policy_fn = _policy_fn(cast(PPOConfig, config), models, experience, 0.3)
    rows = experience.rows()
    parts = [policy_fn(rows[start : start + cut]).losses.sum() for start in range(0, len(rows), cut)]
    total = torch.stack(parts).sum()
    model.zero_grad()
    total.backward()
    return total.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_policy_loss_is_the_sum_of_its_terms(
    project: Project, make_llama: Callable[..., PreTrainedModel], experience: Experience
) -> None:
    model = make_llama()
    found, _ = _losses(project, model, experience, cut=6)
    logits = model(input_ids=experience.batch.input_ids).logits[:, :-1].log_softmax(-1)
    chosen = logits.gather(-1, experience.batch.input_ids[:, 1:, None]).squeeze(-1) * experience.mask
    entropy = -(logits.exp() * logits).sum(-1) * experience.mask
    clipped, ratio = policy_loss(
        chosen, experience.logprobs, experience.advantages, experience.mask, clip_range=0.2, dual_clip=2
    )
    kl = ratio * kl_k3(chosen, experience.reference_logprobs) * experience.mask
    expected = clipped.sum() + 0.3 * kl.sum() - 0.5 * entropy.sum()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)


def test_policy_gradient_does_not_depend_on_the_cut_or_the_padding(
    project: Project, make_llama: Callable[..., PreTrainedModel], experience: Experience
) -> None:
    model = make_llama()
    whole, gradient = _losses(project, model, experience, cut=6)
    for cut in (1, 4):
        found, other = _losses(project, model, experience, cut)
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
        assert (other - gradient).abs().max() < 1e-5 * gradient.abs().max()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["advantage=rloo"], "num_samples: rloo compares the responses to one prompt"),
        (["advantage=grpo"], "num_samples: grpo compares the responses to one prompt"),
        (["kl_in=loss"], "kl_estimator: the gradient of k1 as a loss is zero on average; take k2"),
        (["advantage=reinforce_pp", "value_pretrain_rollouts=1"], "value_pretrain_rollouts: advantage="),
        (["value_pretrain_rollouts=2"], "value_pretrain_rollouts: 2 of num_rollouts 2 leave none"),
        (["dual_clip=1"], "dual_clip: must be more than 1"),
        (["ema_decay=1"], "ema_decay: must be at most"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(
    project: Project, words: list[str], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        project.compose("stage=ppo", "stage.reward_model=rm", *(f"stage.{word}" for word in words))
    assert f"stage.{told}" in str(caught.value)
    assert "\n" not in str(caught.value)
