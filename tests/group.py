"""Two resident processes in one gloo group, so that a test on two processes costs no start of torch.

`Group.call("tests.launch.cases", "function", **arguments)` runs a function on both and returns what each returned.
"""

import importlib
import os
import pickle
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

COUNT = 2


class Group:
    """The two processes, seen from the test.

    Args:
        folder: where they find each other.
    """

    def __init__(self, folder: Path) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "WORLD_SIZE": str(COUNT),
            "LOCAL_WORLD_SIZE": str(COUNT),
            "MASTER_ADDR": "127.0.0.1",
        }
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.group", str(folder / "store")],
                cwd=Path(__file__).parents[1],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank in range(COUNT)
        ]

    def call(self, module: str, function: str, **arguments: Any) -> list[Any]:
        """What the function returned on each process.

        Raises:
            AssertionError: it failed on one of them; with its traceback.
        """
        for process in self._processes:
            assert process.stdin is not None
            pickle.dump((module, function, arguments), process.stdin)
            process.stdin.flush()
        outcomes = []
        for process in self._processes:
            assert process.stdout is not None
            outcomes.append(pickle.load(process.stdout))
        for _, error in outcomes:
            if isinstance(error, Exception):
                raise error
            assert error is None, error
        return [result for result, _ in outcomes]

    def close(self) -> None:
        """End both."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            process.wait(timeout=30)


def _serve(store: str) -> None:
    rank = int(os.environ["RANK"])
    # Well above what any call takes, so that one that hangs fails with the place where it does.
    patience = timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=COUNT, timeout=patience
    )
    # What a stage prints must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    while True:
        try:
            module, function, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        outcome: tuple[Any, Any]
        try:
            outcome = (getattr(importlib.import_module(module), function)(**arguments), None)
        except Exception as error:
            from alignpipe.errors import AlignpipeError  # noqa: PLC0415

            known = isinstance(error, AlignpipeError)
            outcome = (None, error if known else f"process {rank}: {traceback.format_exc()}")
        pickle.dump(outcome, answers)
        answers.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    _serve(sys.argv[1])
