"""Marks in time and memory, which both sides of a case set at the same places."""

import resource
import sys
import time
from itertools import pairwise

import torch

# Linux counts in kilobytes, macOS in bytes.
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class Clock:
    """Begun once, marked after every step.

    Args:
        device: cpu, or cuda, whose work is waited for before every mark.

    Attributes:
        marks: seconds, the begin first.
        peak: bytes at the most up to the last mark: resident, or what torch holds of the GPU.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.on_gpu = device == "cuda"
        self.marks: list[float] = []
        self.peak = 0

    def mark(self) -> None:
        """A step is over, or the first one begins."""
        if self.on_gpu:
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())
        if self.on_gpu:
            self.peak = torch.cuda.max_memory_reserved()
        else:
            self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT

    def repetitions(self, timed: int) -> list[float]:
        """Seconds of each timed repetition: the steps are cut into one part more, and the first is warm-up.

        Raises:
            ValueError: so many steps cannot be cut into so many parts.
        """
        steps, left = divmod(len(self.marks) - 1, timed + 1)
        if left or not steps:
            raise ValueError(f"{len(self.marks) - 1} steps are not {timed + 1} equal repetitions")
        bounds = self.marks[::steps]
        return [after - before for before, after in pairwise(bounds[1:])]
