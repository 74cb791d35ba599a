"""What saves memory or time changes no result, or only as far as its number format does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignpipe.pipeline.store import TASK
from alignpipe.training.gradients import LossScale
from tests.launch.cases import run_stage
from tests.project import Project

WORDS = ["stage=sft", "model.training.sft.log_steps=1", "model.training.sft.micro_batch_size=8", "launch=cpu"]


def _losses(folder: Path, *words: str) -> tuple[list[float], Path]:
    task = Project(folder / "outputs").prepare("sft", *WORDS, *words)
    run_stage(task.work / TASK)
    lines = [json.loads(line) for line in (task.target / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], task.target


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return _losses(tmp_path_factory.mktemp("plain"))[0]


@pytest.mark.parametrize(
    ("word", "tolerance"),
    [
        ("launch.gradient_checkpointing=true", 1e-6),
        ("launch.activation_offload=true", 0.0),
        ("launch.optimizer_offload=true", 0.0),
        ("launch.precision=bf16", 0.05),
        ("launch.precision=fp16", 0.01),
    ],
)
def test_saving_memory_keeps_the_curve(
    tmp_path: Path, plain: list[float], word: str, tolerance: float
) -> None:
    losses, folder = _losses(tmp_path, word)
    assert losses == pytest.approx(plain, abs=tolerance, rel=0)
    # Half precision is really at work: it rounds.
    assert (losses != plain) or not word.startswith("launch.precision")
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {torch.float32}


def test_checkpointing_recomputes_every_block(tmp_path: Path) -> None:
    calls = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, *_: (
            calls.append(1) if type(module).__name__ == "LlamaMLP" and torch.is_grad_enabled() else None
        )
    )
    try:
        _losses(tmp_path / "kept", "model.training.sft.max_steps=1")
        kept = len(calls)
        _losses(tmp_path / "again", "model.training.sft.max_steps=1", "launch.gradient_checkpointing=true")
    finally:
        hook.remove()
    assert len(calls) - kept == 2 * kept > 0


def test_loss_scale_halves_on_overflow_and_grows_after_many_good_steps() -> None:
    scale = LossScale.of("fp16")
    assert scale.value == 2.0**16
    assert scale.overflowed(finite=False) and scale.value == 2.0**15
    for _ in range(LossScale.GROWTH_STEPS):
        assert not scale.overflowed(finite=True)
    assert scale.value == 2.0**16
    assert LossScale.of("bf16").value == 1.0
    assert not LossScale.of("bf16").overflowed(finite=False)
