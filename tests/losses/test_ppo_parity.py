"""PPO, RLOO and GRPO against TRL's own lines on the same tensors, and the numbers where TRL 1.9.0's PPO is wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignpipe.losses.advantages import gae, grpo, rloo
from alignpipe.losses.logprobs import masked_mean, masked_whiten
from alignpipe.losses.ppo import KL_ESTIMATORS, policy_loss, shape_rewards, value_loss

SCRIPT = Path(__file__).parent / "peer_ppo.py"
LAST_WITH_PPO = Path(sys.prefix) / "peers" / "trl-1.9.0"
ROWS, WIDTH = 6, 7
# A row of TRL's that fills the width has no slot after its last token; the others have.
FULL = [WIDTH - 1] * ROWS
SHORT = [6, 4, 2, 5, 0, 3]
KL_COEF, GAMMA, LAMBDA = 0.1, 0.97, 0.95

Job = dict[str, Any]


def _ask(folder: Path, jobs: dict[str, Job], tensors: dict[str, Tensor], *path: Path) -> dict[str, Tensor]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    save_file(tensors, folder / "in.safetensors")
    repository = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (*path, repository))),
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    files = [str(folder / name) for name in ("jobs.json", "in.safetensors", "out.safetensors")]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *files], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return load_file(folder / "out.safetensors")


def _rollout(last: list[int]) -> dict[str, Tensor]:
    """What TRL knows after scoring: `sequence_lengths` is the place of the last real token."""
    torch.manual_seed(0)
    lengths = torch.tensor(last)
    return {
        "responses": torch.randint(1, 5, (ROWS, WIDTH)),
        "logprobs": -torch.rand(ROWS, WIDTH) * 3,
        "ref_logprobs": -torch.rand(ROWS, WIDTH) * 3,
        "values": torch.randn(ROWS, WIDTH),
        "scores": torch.randn(ROWS) * 2,
        "sequence_lengths": lengths,
    }


def _mask(last: list[int]) -> Tensor:
    return torch.arange(WIDTH) <= torch.tensor(last)[:, None]


ARGS = {"kl_coef": KL_COEF, "gamma": GAMMA, "lam": LAMBDA, "whiten_rewards": False, "kl_estimator": "k1"}
FOUND = ["rewards", "advantages", "returns"]
CASES: dict[str, tuple[list[int], dict[str, Any]]] = {
    "full": (FULL, {}),
    "k3": (FULL, {"kl_estimator": "k3"}),
    "whitened": (FULL, {"whiten_rewards": True}),
    "undiscounted": (SHORT, {"gamma": 1.0, "lam": 1.0}),
    "short": (SHORT, {}),
}
CLIP = {"cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1}
EPOCHS = {
    "num_ppo_epochs": 2,
    "gradient_accumulation_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.1,
    "temperature": 1.0,
    "max_grad_norm": 1.0,
    **CLIP,
}
# All eight rows are the same, so that it does not matter how TRL shuffles them: two real tokens of five.
REAL, SLOTS, TOKEN = 2, 5, 3


def _update() -> dict[str, Tensor]:
    """A micro-batch in an update, by TRL's names."""
    torch.manual_seed(1)
    mask = _mask(SHORT)
    return {
        "vpred": torch.randn(ROWS, WIDTH),
        "mb_values": torch.randn(ROWS, WIDTH),
        "mb_return": torch.randn(ROWS, WIDTH),
        "mb_advantage": torch.randn(ROWS, WIDTH),
        "new_logprobs": torch.where(mask, -torch.rand(ROWS, WIDTH) * 2, 1.0),
        "mb_logprobs": torch.where(mask, -torch.rand(ROWS, WIDTH) * 2, 1.0),
        "padding_mask": ~mask,
        "padding_mask_p1": ~mask,
        "micro_batch_inds": torch.arange(ROWS),
    }


def _epochs() -> dict[str, Tensor]:
    shape = (8, SLOTS)
    padding = (torch.arange(SLOTS) >= REAL).expand(shape).clone()
    policy = torch.zeros(6)
    old = policy.log_softmax(0)[TOKEN].expand(shape)
    return {
        "policy": policy,
        "responses": torch.full(shape, TOKEN),
        "padding_mask": padding,
        "padding_mask_p1": padding.clone(),
        "logprobs": old.masked_fill(padding, 1.0),
        "advantages": torch.full(shape, 50.0),
        "returns": torch.zeros(shape),
        "values": torch.zeros(shape),
    }


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What TRL 1.9.0 makes of every case, asked in one process."""
    if not LAST_WITH_PPO.is_dir():
        pytest.skip(f"no TRL 1.9.0, the last with PPO, at {LAST_WITH_PPO}; `make test` puts it there")
    jobs: dict[str, Job] = {}
    tensors: dict[str, Tensor] = {}

    def add(name: str, piece: str, args: dict[str, Any], given: dict[str, Tensor], wanted: list[str]) -> None:
        jobs[name] = {"piece": piece, "args": args, "wanted": wanted}
        tensors.update({f"{name}.{key}": value.contiguous() for key, value in given.items()})

    for name, (last, changes) in CASES.items():
        add(name, "advantages+figures", ARGS | changes, _rollout(last), [*FOUND, "mean_entropy"])
    for rank, part in enumerate((slice(0, 3), slice(3, 6))):
        rows = {key: value[part] for key, value in _rollout(FULL).items()}
        add(f"rank_{rank}", "advantages", ARGS, rows, FOUND)
    add("losses", "losses", CLIP, _update(), ["pg_loss", "pg_loss_max", "vf_loss", "vf_loss_max"])
    for minibatches in (1, 4):
        settings = EPOCHS | {"num_mini_batches": minibatches}
        add(
            f"epochs_{minibatches}", "epochs", settings, _epochs(), ["steps", "approxkl_stats", "ratio_stats"]
        )
    return _ask(tmp_path_factory.mktemp("peer"), jobs, tensors, LAST_WITH_PPO)


def _ours(
    last: list[int], *, kl: str = "k1", gamma: float = GAMMA, gae_lambda: float = LAMBDA, whiten: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, advantages before whitening, and returns."""
    given, mask = _rollout(last), _mask(last)
    estimate = KL_ESTIMATORS[kl](given["logprobs"], given["ref_logprobs"])
    rewards = shape_rewards(estimate, given["scores"], mask, KL_COEF)
    if whiten:
        rewards = masked_whiten(rewards, mask, keep_mean=True)
    advantages = gae(rewards, given["values"], mask, gamma, gae_lambda)
    return rewards, advantages, (advantages + given["values"]) * mask


def _as_sample_deviation(whitened: Tensor, mask: Tensor) -> Tensor:
    """TRL divides by the deviation of a sample, n - 1, we by that of the rollout, n."""
    count = mask.sum()
    return whitened * ((count - 1) / count).sqrt()


@pytest.mark.parametrize("name", ["full", "k3"])
def test_rewards_advantages_and_returns_are_trls_where_no_row_is_padded(
    peer: dict[str, Tensor], name: str
) -> None:
    rewards, advantages, returns = _ours(FULL, kl=CASES[name][1].get("kl_estimator", "k1"))
    torch.testing.assert_close(rewards, peer[f"{name}.rewards"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(returns, peer[f"{name}.returns"], rtol=1e-6, atol=1e-6)
    white = _as_sample_deviation(masked_whiten(advantages, _mask(FULL)), _mask(FULL))
    torch.testing.assert_close(white, peer[f"{name}.advantages"], rtol=1e-6, atol=1e-6)


def test_whitened_rewards_are_trls(peer: dict[str, Tensor]) -> None:
    mask = _mask(FULL)
    plain, _, _ = _ours(FULL)
    mean = masked_mean(plain, mask)
    # The mean stays, and the rest differs by the two deviations alone.
    ours = _as_sample_deviation(_ours(FULL, whiten=True)[0] - mean, mask) + mean
    torch.testing.assert_close(ours, peer["whitened.rewards"], rtol=1e-6, atol=1e-6)


def test_padded_rows_agree_with_trl_where_nothing_is_discounted(peer: dict[str, Tensor]) -> None:
    # With gamma = lambda = 1 it does not matter that TRL puts the score a slot late: it comes back whole.
    mask = _mask(SHORT)
    _, advantages, returns = _ours(SHORT, gamma=1.0, gae_lambda=1.0)
    torch.testing.assert_close(returns, peer["undiscounted.returns"] * mask, rtol=1e-6, atol=1e-6)
    white = _as_sample_deviation(masked_whiten(advantages, mask), mask)
    torch.testing.assert_close(white, peer["undiscounted.advantages"], rtol=1e-6, atol=2e-6)


def test_trl_gives_the_last_token_part_of_a_value_after_the_end(peer: dict[str, Tensor]) -> None:
    given = _rollout(SHORT)
    _, _, ours = _ours(SHORT)
    theirs = peer["short.returns"]
    for row, last in enumerate(SHORT):
        score, kl = given["scores"][row], given["logprobs"][row, last] - given["ref_logprobs"][row, last]
        assert ours[row, last].item() == pytest.approx((score - KL_COEF * kl).item(), abs=1e-6)
        if last == WIDTH - 1:
            assert theirs[row, last].item() == pytest.approx(ours[row, last].item(), abs=1e-6)
            continue
        after = given["values"][row, last + 1]
        mixed = GAMMA * (LAMBDA * score + (1 - LAMBDA) * after) - KL_COEF * kl
        assert theirs[row, last].item() == pytest.approx(mixed.item(), abs=1e-6)
    assert (theirs - ours).abs()[torch.arange(ROWS), torch.tensor(SHORT)].max() > 0.05


def test_trl_whitens_each_process_by_itself(peer: dict[str, Tensor]) -> None:
    parts = torch.cat([peer["rank_0.advantages"], peer["rank_1.advantages"]])
    # The returns do not know of the other process, the advantages should.
    torch.testing.assert_close(
        torch.cat([peer["rank_0.returns"], peer["rank_1.returns"]]), peer["full.returns"]
    )
    assert (parts - peer["full.advantages"]).abs().max() > 0.1
    assert parts[:3].mean().abs() < 1e-5 < peer["full.advantages"][:3].mean().abs()


def test_trl_takes_a_nat_off_the_entropy_for_each_pad(peer: dict[str, Tensor]) -> None:
    given, mask = _rollout(SHORT), _mask(SHORT)
    right = -(given["logprobs"] * mask).sum(1).mean()
    pads = (~mask).sum(1).float().mean()
    assert pads > 0
    assert peer["short.mean_entropy"].item() == pytest.approx((right - pads).item(), abs=1e-5)


def test_policy_and_value_losses_are_trls(peer: dict[str, Tensor]) -> None:
    given, mask = _update(), _mask(SHORT)
    losses, _ = policy_loss(given["new_logprobs"], given["mb_logprobs"], given["mb_advantage"], mask, 0.2)
    torch.testing.assert_close(losses, peer["losses.pg_loss_max"] * mask, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(losses.sum() / mask.sum(), peer["losses.pg_loss"], rtol=1e-6, atol=1e-6)
    errors = value_loss(given["vpred"], given["mb_values"], given["mb_return"], mask, 0.2)
    torch.testing.assert_close(errors, 0.5 * peer["losses.vf_loss_max"] * mask, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(errors.sum() / mask.sum(), peer["losses.vf_loss"], rtol=1e-6, atol=1e-6)


def test_trl_takes_as_many_steps_whatever_num_mini_batches_says(peer: dict[str, Tensor]) -> None:
    # Two epochs of four minibatches are eight steps; gradients are accumulated over all of them instead.
    assert len(peer["epochs_4.steps"]) == len(peer["epochs_1.steps"]) == 2
    torch.testing.assert_close(peer["epochs_4.steps"], peer["epochs_1.steps"])


def test_trl_does_not_clip_gradients(peer: dict[str, Tensor]) -> None:
    moved = (peer["epochs_1.steps"][0] - _epochs()["policy"]).norm() / EPOCHS["learning_rate"]
    # Plain SGD, so that is the norm of the gradient; max_grad_norm is 1.
    assert moved > 10


def test_trl_averages_approx_kl_and_ratio_over_padding(peer: dict[str, Tensor]) -> None:
    start, after = _epochs()["policy"], peer["epochs_1.steps"][0]
    change = (after.log_softmax(0) - start.log_softmax(0))[TOKEN]
    share = REAL / SLOTS
    found = {name: peer[f"epochs_1.{name}_stats"][1] for name in ("approxkl", "ratio")}
    right, ratio = 0.5 * change.square(), change.exp()
    assert right > 0.1
    torch.testing.assert_close(found["approxkl"], (right * share).expand(1, 4))
    torch.testing.assert_close(found["ratio"], (ratio * share + 1 - share).expand(1, 4))


def test_rloo_and_grpo_advantages_are_trls(tmp_path: Path) -> None:
    if not version("trl").startswith("1.16."):
        pytest.skip("written against TRL 1.16")
    samples, mask, given = 3, _mask(SHORT), _rollout(SHORT)
    kl = (given["logprobs"] - given["ref_logprobs"]).masked_fill(~mask, 0.0)
    scores = shape_rewards(kl, given["scores"], mask, 0.0)
    both = {"rewards": given["scores"]}
    with_kl = {
        **both,
        "old_per_token_logps": given["logprobs"],
        "ref_per_token_logps": given["ref_logprobs"],
        "completion_mask": mask.float(),
    }
    cases: dict[str, tuple[str, dict[str, Any], dict[str, Tensor], Callable[[], Tensor]]] = {
        "rloo": ("rloo", {}, both, lambda: rloo(scores, mask, samples)),
        "rloo_kl": (
            "rloo",
            {"beta": KL_COEF},
            with_kl,
            lambda: rloo(shape_rewards(kl, given["scores"], mask, KL_COEF), mask, samples),
        ),
        "grpo": ("grpo", {"scale_rewards": "group"}, both, lambda: grpo(scores, mask, samples)),
        "dr_grpo": (
            "grpo",
            {"scale_rewards": "none"},
            both,
            lambda: grpo(scores, mask, samples, divide_by_std=False),
        ),
    }
    jobs = {
        name: {"piece": piece, "args": args | {"num_samples": samples}, "wanted": ["advantages"]}
        for name, (piece, args, _, _) in cases.items()
    }
    tensors = {
        f"{name}.{key}": value.clone() for name, case in cases.items() for key, value in case[2].items()
    }
    found = _ask(tmp_path, jobs, tensors)
    for name, (_, _, _, ours) in cases.items():
        expected = found[f"{name}.advantages"][:, None] * mask
        torch.testing.assert_close(ours(), expected, rtol=1e-6, atol=1e-6)
