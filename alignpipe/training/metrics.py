"""Figures of a stage: `metrics.jsonl` always, trackers where asked for.

step figures -> one JSON line, trackers through accelerate
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from alignpipe import processes
from alignpipe.artifact import sync_folder

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"


class MetricLog:
    """Writes the figures of one stage; of several processes the first one writes.

    Args:
        folder: where the two files grow.
        accelerator: whose trackers get them too.
    """

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self._folder = folder
        self._accelerator = accelerator
        self._last = time.perf_counter()

    def written(self) -> dict[str, int]:
        """Bytes of each file, on the disk by then; a state keeps them, to go on from."""
        sizes = {}
        for path in self._files():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sizes[path.name] = path.stat().st_size
        sync_folder(self._folder)
        return sizes

    def rewind(self, written: Mapping[str, int]) -> None:
        """Cut off what was written after a state; `written` is what it kept, nothing where there is none."""
        for path in self._files() if processes.is_main() else ():
            os.truncate(path, min(written.get(path.name, 0), path.stat().st_size))

    def log(self, step: int, values: Mapping[str, float], *, tokens: int = 0) -> dict[str, float]:
        """Write the figures of a step.

        Args:
            step: optimizer updates done.
            values: figures by name.
            tokens: worked through since the last call, for the rate.

        Returns:
            The figures with the rate among them.
        """
        figures = {name: float(value) for name, value in values.items()}
        now = time.perf_counter()
        if tokens:
            figures["tokens_per_second"] = tokens / max(now - self._last, 1e-9)
        self._last = now
        self._append(
            METRICS, {"step": step, **{k: v if math.isfinite(v) else None for k, v in figures.items()}}
        )
        self._accelerator.log(figures, step=step)
        return figures

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write generated responses for a person to read."""
        for row in rows:
            self._append(SAMPLES, {"step": step, **row})

    def _files(self) -> list[Path]:
        """Those of the two files that are there."""
        return [path for name in (METRICS, SAMPLES) if (path := self._folder / name).is_file()]

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if not processes.is_main():
            return
        with (self._folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


class Averages:
    """Means over the items of many micro-batches: sums and counts, divided once."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def add(self, name: str, total: float, count: float) -> None:
        """Add a sum over `count` items."""
        self._sums[name] = self._sums.get(name, 0.0) + total
        self._counts[name] = self._counts.get(name, 0.0) + count

    def summed(self) -> "Averages":
        """The same over all processes."""
        total = Averages()
        pairs = {name: (value, self._counts[name]) for name, value in self._sums.items()}
        for name, (value, count) in processes.sum_figures(pairs).items():
            total.add(name, value, count)
        return total

    def means(self) -> dict[str, float]:
        """The mean of every figure so far."""
        return {name: total / self._counts[name] for name, total in self._sums.items() if self._counts[name]}
