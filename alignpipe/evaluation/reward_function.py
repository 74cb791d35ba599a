"""A reward that the user wrote: one function in a file of his own.

prompts, responses -> the user's function -> one finite number a response

This is the only place of the package that runs code from a file. The file is the one that the configuration of this
very run names, read when its stage's key was made, and its content must still be that of the key. It is loaded and
called on the first process alone, with all responses at once, so that the numbers depend on no number of processes; the
others get them from it.
"""

import hashlib
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignpipe import processes
from alignpipe.errors import AlignpipeError
from alignpipe.task import FunctionInput

SHOWN = 40


class RewardFunction:
    """A function of the user's, loaded.

    Args:
        source: where it lies.

    Raises:
        AlignpipeError: on every process, when the file has changed or cannot be loaded.
    """

    def __init__(self, source: FunctionInput) -> None:
        self._source = source
        self._file = source.label.rpartition(":")[0]
        self._function: Callable[..., Any] | None = None
        processes.from_main(self._load)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """One number a response, (N,).

        Raises:
            AlignpipeError: on every process, when the function raises, or returns anything but N finite numbers.
        """
        return processes.from_main(lambda: self._scores(list(prompts), list(responses)))

    def _load(self) -> None:
        path = Path(self._source.path)
        source = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(source).hexdigest() != self._source.key:
            raise AlignpipeError(
                f"{path}: has changed since this run was planned; run the same command again"
            )
        module = ModuleType(f"reward_function_{self._source.key[:8]}")
        module.__file__ = str(path)
        # As python itself does for a script, so that it finds the modules beside it; last, so that they hide none.
        sys.path.append(str(path.parent))
        sys.modules[module.__name__] = module
        try:
            # Not through an import: Python would take compiled code of an older file that has the same time and size.
            exec(compile(source, str(path), "exec"), vars(module))
        except (Exception, SystemExit) as error:
            raise self._failure(error, "while it was loaded") from error
        self._function = getattr(module, self._source.name, None)
        if not callable(self._function):
            raise AlignpipeError(f"{self._source.label}: is {self._function!r:.{SHOWN}}, not a function")

    def _scores(self, prompts: list[str], responses: list[str]) -> NDArray[np.float64]:
        try:
            found = self._call(prompts, responses)
        except (Exception, SystemExit) as error:
            raise self._failure(error, self._culprit(prompts, responses)) from error
        values = None if isinstance(found, str | bytes | dict | set) else _listed(found)
        if values is None:
            raise AlignpipeError(
                f"{self._defined()}: returned a {type(found).__name__}, not a sequence of numbers"
            )
        if len(values) != len(responses):
            raise AlignpipeError(
                f"{self._defined()}: returned {len(values)} numbers for {len(responses)} responses"
            )
        return np.array(
            [self._number(value, index, prompts) for index, value in enumerate(values)], np.float64
        )

    def _call(self, prompts: list[str], responses: list[str]) -> Any:
        assert self._function is not None
        # Lists of its own: what it does to them is nobody else's business.
        return self._function(list(prompts), list(responses))

    def _number(self, value: Any, index: int, prompts: Sequence[str]) -> float:
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, RuntimeError):
            number = math.nan
        if not math.isfinite(number):
            raise AlignpipeError(
                f"{self._defined()}: returned {value!r:.{SHOWN}} for {_named(prompts, index)}, not a finite number"
            )
        return number

    def _culprit(self, prompts: list[str], responses: list[str]) -> str:
        """The response at which it fails, found by halves; that costs about one call more."""
        low, high = 0, len(responses)
        while high - low > 1:
            middle = (low + high) // 2
            try:
                self._call(prompts[low:middle], responses[low:middle])
                low = middle
            except (Exception, SystemExit):
                high = middle
        try:
            self._call(prompts[low:high], responses[low:high])
        except (Exception, SystemExit):
            return f"at {_named(prompts, low)}"
        return f"in a call with {len(responses)} responses"

    def _failure(self, error: BaseException, where: str) -> AlignpipeError:
        """An error of the user's code in one line, with the place in his file at which it left it."""
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == self._source.path
        ]
        at = f"{self._file}:{lines[-1]}" if lines else self._defined()
        said = str(error).strip().partition("\n")[0]
        failure = AlignpipeError(f"{at}: {type(error).__name__}: {said}, {where}")
        failure.trace = "".join(traceback.format_exception(error))
        return failure

    def _defined(self) -> str:
        """`file:line` of the function."""
        code = getattr(self._function, "__code__", None)
        return self._source.label if code is None else f"{self._file}:{code.co_firstlineno}"


def _listed(found: Any) -> list[Any] | None:
    try:
        return list(found)
    except TypeError:
        return None


def _named(prompts: Sequence[str], index: int) -> str:
    text = prompts[index]
    return f"prompts[{index}] = {text if len(text) <= SHOWN else text[:SHOWN] + '...'!r}"
