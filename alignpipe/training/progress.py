"""What a person sees while a stage works: a live line on a terminal, one plain line every few seconds elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 5.0
SHOWN = {
    "loss": "loss",
    "objective/score": "reward",
    "objective/kl": "kl",
    "objective/gold": "gold",
    "rm/accuracy": "accuracy",
    "rewards/accuracies": "accuracy",
    "tokens_per_second": "tok/s",
}


class StageProgress:
    """Shows how far one stage is, and its newest figures.

    Args:
        stage: name of the stage.
        console: where to write; a console that is no terminal gets plain lines.
    """

    def __init__(self, stage: str, console: Console) -> None:
        self._stage = stage
        self._console = console
        self._live: Progress | None = None
        self._task = TaskID(0)
        self._what, self._total, self._done = "", 0, 0
        self._began = self._said = time.monotonic()

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Start a part of the stage: what is done, and how many units it has."""
        self.end()
        self._what, self._total, self._done = what, total, done
        self._began = self._said = time.monotonic()
        self._first = done
        if self._console.is_terminal:
            self._live = Progress(
                TextColumn("  {task.fields[stage]:<8} {task.description}", markup=False),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._live.start()
            self._task = self._live.add_task(what, total=total, completed=done, stage=self._stage, figures="")

    def update(self, done: int, figures: dict[str, float] | None = None) -> None:
        """Say how many units are done, with the figures that a person follows."""
        self._done = done
        shown = _figures(figures or {})
        if self._live is not None:
            if figures is None:
                self._live.update(self._task, completed=done)
            else:
                self._live.update(self._task, completed=done, figures=shown)
        elif time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            line = f"  {self._stage:<8} {self._what} {done}/{self._total}  {shown}  eta {self._remaining()}"
            self._console.print(Text(line), soft_wrap=True)

    def say(self, line: str) -> None:
        """Write a line that stays."""
        self._console.print(Text(line), soft_wrap=True)

    def end(self) -> None:
        """Take the live line off the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _remaining(self) -> str:
        done = self._done - self._first
        if done <= 0:
            return "?"
        seconds = (time.monotonic() - self._began) / done * (self._total - self._done)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

    def __enter__(self) -> "StageProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def _figures(values: dict[str, float]) -> str:
    parts = []
    for key, label in SHOWN.items():
        if key in values:
            value = values[key]
            parts.append(f"{label} {value:,.0f}" if key == "tokens_per_second" else f"{label} {value:.3f}")
    return "  ".join(parts)
