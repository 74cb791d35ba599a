"""A task read back is the task that was written, whatever stands in its texts."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from alignpipe.compose.composition import compose
from alignpipe.config import KINDS, ArchitectureConfig, Config, StageConfig
from alignpipe.task import DataInput, ModelInput, Task, read_task, write_task

HARD = [
    "a folder/with spaces",
    "한국어/모델",
    "${seed} and ${oc.env:HOME}",
    "'single' and \"double\"",
    "yes",
    "1e-3",
    "null",
    "a: b # c",
    "{% for message in messages %}\n{{ message['content'] }}\n\n{% endfor %}\t\n",
    "back\\slash and \\${x}",
    " leading and trailing ",
    "",
]


@cache
def _config(kind: str) -> StageConfig:
    needs = ["stage.reward_model=latest/rm"] if kind in ("rs", "ppo") else []
    stage = compose([f"stage={kind}", *needs]).config.stage
    assert stage is not None
    return stage


@cache
def _elsewhere() -> Config:
    """Where nothing of the launch and of the adapter is as it usually is."""
    return compose(["launch=fsdp2", "launch.num_processes=2", "adapter=lora"]).config


def _task(kind: str, text: str = "base") -> Task:
    config = _config(kind)
    return Task(
        name=f"{kind}_2",
        kind=kind,
        key="0123456789abcdef",
        work=Path("/work folder") / "작업",
        target=Path("/stages") / f"{kind}-0123",
        config=config,
        models={"policy": ModelInput(text, text, None, "sft", "1" * 16)},
        data={"data": DataInput("file", text, "train", "2" * 64)},
        chat_template=text,
        architecture=ArchitectureConfig(64, 128, 2, 4, 7),
        attn_implementation="sdpa",
        launch=_elsewhere().launch,
        adapter=_elsewhere().adapter,
        trackers=["tensorboard"],
        run=text,
        inputs={"settings": {"learning_rate": 1e-5, "text": text, "nothing": None, "rate": 3e-3}},
    )


@pytest.mark.parametrize("kind", list(KINDS))
def test_task_of_every_kind_comes_back_equal(kind: str, tmp_path: Path) -> None:
    task = _task(kind)
    write_task(task, tmp_path / "task.yaml")
    back = read_task(tmp_path / "task.yaml")
    assert back == task
    assert type(back.config) is KINDS[kind]
    assert isinstance(back.work, Path)


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_come_back_equal(text: str, tmp_path: Path) -> None:
    task = _task("sft", text)
    data = replace(task.config.data, path=text)
    task = replace(task, config=replace(task.config, data=data))
    write_task(task, tmp_path / "task.yaml")
    assert read_task(tmp_path / "task.yaml") == task


@pytest.mark.parametrize("value", [1e-5, 2.0, 1e22, 3.0e-3, 0.1 + 0.2])
def test_floats_come_back_bit_for_bit(value: float, tmp_path: Path) -> None:
    task = _task("dpo")
    changed = replace(task, config=replace(task.config, beta=value))  # type: ignore[call-arg]
    write_task(changed, tmp_path / "task.yaml")
    back = read_task(tmp_path / "task.yaml").config
    assert vars(back)["beta"] == value
    assert isinstance(vars(back)["beta"], float)
