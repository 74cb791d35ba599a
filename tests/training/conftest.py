"""A real context round a tiny model, without a pipeline."""

from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import Accelerator
from rich.console import Console

from alignpipe.compose.composition import compose
from alignpipe.config import ArchitectureConfig, Config, StageConfig
from alignpipe.signals import StopSignal
from alignpipe.task import Task
from alignpipe.training.context import Context
from alignpipe.training.metrics import MetricLog
from alignpipe.training.progress import StageProgress


@pytest.fixture(scope="session")
def on_cpu() -> Config:
    """The configuration that says how every context runs."""
    return compose(["launch=cpu"]).config


@pytest.fixture
def make_context(tmp_path: Path, architecture: ArchitectureConfig, on_cpu: Config) -> Callable[..., Context]:
    """Builds the context of a stage that works in a folder of its own."""

    def make(config: StageConfig, name: str = "stage", stop: StopSignal | None = None) -> Context:
        work = tmp_path / name
        work.mkdir(exist_ok=True)
        task = Task(
            name=name,
            kind=config.kind,
            key="0" * 16,
            work=work,
            target=tmp_path / "target",
            config=config,
            models={},
            data={},
            chat_template="",
            architecture=architecture,
            attn_implementation="sdpa",
            launch=on_cpu.launch,
            adapter=on_cpu.adapter,
        )
        accelerator = Accelerator(cpu=True)
        progress = StageProgress(name, Console(quiet=True))
        return Context(task, accelerator, MetricLog(work, accelerator), progress, stop or StopSignal())

    return make
