"""What the two processes of `tests.group` are asked to do."""

from pathlib import Path

import torch
from rich.console import Console

from alignpipe import processes
from alignpipe.errors import DataError
from alignpipe.signals import StopSignal
from alignpipe.worker import run_task


def run_stage(path: Path, stop_file: Path | None = None) -> None:
    """Run a stage, as the worker does."""
    run_task(path, Console(quiet=True), StopSignal(stop_file))


def dealt(lengths: list[int]) -> list[int]:
    return processes.deal(lengths)


def spread_squares(numbers: list[int]) -> list[int]:
    return processes.spread(numbers, lambda places: [numbers[place] ** 2 for place in places])


def summed(figures: list[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    return processes.sum_figures(figures[processes.rank()])


def any_of(flags: list[bool]) -> bool:
    return processes.any_of(flags[processes.rank()])


def main_rank() -> int:
    return processes.from_main(processes.rank)


def failing_main() -> None:
    def fail() -> None:
        raise DataError("rows.jsonl:3: broken")

    processes.from_main(fail)


def added(rows: list[int]) -> list[float]:
    tensor = torch.zeros(4)
    mine = processes.deal(rows)
    tensor[mine] = torch.tensor([float(rows[index]) for index in mine])
    return processes.sum_tensor(tensor).tolist()
