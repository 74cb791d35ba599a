"""An sft stage of a moment that is stopped, killed or broken half-way: what to type, what it leaves."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignpipe.artifact import sha256_file, verify
from alignpipe.training import context
from tests.project import SMALL

# Six steps, a state after every other.
SFT = (
    *SMALL,
    "stage=sft",
    "model.architecture.num_layers=1",
    "stage.epochs=1",
    "stage.max_steps=6",
    "stage.save_steps=2",
    "stage.log_steps=1",
    "stage.num_samples=0",
    "stage.eval_rows=8",
)


def before_save(number: int, do: Callable[..., None], *arguments: Any) -> None:
    """Do something in a command when it comes to save its nth state, from 1."""
    save, calls = context.save_state, iter(range(1, 1000))

    def hooked(*given: Any, **named: Any) -> None:
        if next(calls) == number:
            do(*arguments)
        save(*given, **named)

    context.save_state = hooked


def die() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def states(folder: Path) -> Path:
    """The folder of the states of the one stage under way."""
    (found,) = (folder / "outputs" / "work").glob("*/states")
    return found


def weights(folder: Path) -> str:
    """Hash of the weights of the newest run's one stage, its folder verified."""
    (stage,) = newest_run(folder).glob("*/alignpipe.json")
    verify(stage.parent)
    return sha256_file(stage.parent / "model.safetensors")


def newest_run(folder: Path) -> Path:
    """Folder of the newest run of a project."""
    return folder / "outputs" / "runs" / (folder / "outputs" / "latest").read_text().strip()


def content(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
