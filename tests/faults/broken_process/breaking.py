"""What goes wrong in one of two processes, and when."""

import importlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Phase of a stage -> a function that each process calls in it, and the call at which it breaks.
PHASES = {
    "load": ("alignpipe.training.context.load_policy", 1),
    "step": ("alignpipe.training.loop.sum_gradients", 3),
    "save": ("alignpipe.training.context.save_state", 2),
    "evaluate": ("alignpipe.stages.sft.mean_losses", 2),
    "result": ("alignpipe.training.context.save_model", 1),
    "sample": ("alignpipe.evaluation.responses.sample", 1),
}
# Made by the process that breaks, as it does.
BROKEN = Path("broken")


def kill() -> None:
    """Die as of `kill -9`."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    """Fail as a fault of the program's own does."""
    raise RuntimeError("broken on purpose")


def hang() -> None:
    """Wait for what never comes."""
    time.sleep(3600)


WAYS: dict[str, Callable[[], None]] = {"killed": kill, "raising": fail, "stuck": hang}


def break_phase(phase: str, way: str) -> None:
    """Let this process break when it comes to a phase."""
    (path, last), calls = PHASES[phase], 0
    module, _, name = path.rpartition(".")
    function = getattr(importlib.import_module(module), name)

    def broken(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last:
            BROKEN.write_text(str(time.time()))
            WAYS[way]()
        return function(*given, **named)

    setattr(importlib.import_module(module), name, broken)
