"""`alignpipe run` where Hydra itself is wanted: its help and its looks at the configuration, and sweeps.

Hydra knows no subcommands, so its entry point is called with a command line of its own.
"""

import io
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from alignpipe.compose.command_line import CONFIG_DIR_VARIABLE, CONFIG_NAME, Line, read_line
from alignpipe.compose.composition import (
    built_in_folder,
    checked,
    compose,
    explained,
    prepared_words,
    setup,
)
from alignpipe.compose.sweeps import Sweep, compose_sweep
from alignpipe.errors import AlignpipeError, Stopped
from alignpipe.job import SWEEP_PROCESS, prepare_job, run_apart, run_here
from alignpipe.objective import is_low_best, objective_title
from alignpipe.signals import StopSignal
from alignpipe.sweep import STOP, begin_sweep, close_sweep, sweep_results
from alignpipe.terminal import Terminal


def show(line: Line, argv: list[str]) -> str:
    """What Hydra prints for --help, --hydra-help, --info and --cfg.

    Raises:
        ConfigError: the words do not compose.
    """
    # Hydra's own front calls what a configuration names; so it gets none that was not looked at.
    if line.multirun:
        compose_sweep(line)
    else:
        compose(argv)
    words = prepared_words(line)
    printed = io.StringIO()
    # Hydra leaves by sys.exit after its help.
    with explained(words), redirect_stdout(printed), suppress(SystemExit):
        _call_hydra(_nothing, line.flags, words)
    # The group of schemas is for YAML files, not for words.
    return re.sub(r"^schema: .*\n", "", printed.getvalue(), flags=re.MULTILINE)


def sweep(line: Line, console: Console) -> int:
    """Run one job for each combination, all of them checked before the first.

    A job that fails does not stop the others. Jobs run here one after the other, unless a launcher
    or sweeper of Hydra's is chosen; its workers give each job a process of its own.

    Returns:
        Exit code: 0 when every job is done, 75 when a signal ended the sweep, else 1.

    Raises:
        AlignpipeError: a job does not compose, and nothing has run; or the launcher itself failed.
    """
    found = compose_sweep(line)
    begin_sweep(found.folder, found.jobs_words, named=found.config.sweep.name is not None)
    for number, composed in enumerate(found.jobs):
        prepare_job(composed, number, found.folder / str(number))
    many = f"{len(found.jobs)} jobs" if found.jobs else "jobs"
    Terminal(stderr=True).print(Text(f"sweep: {many} in {found.folder}"), soft_wrap=True)
    with StopSignal(tell=lambda: (found.folder / STOP).touch()).listening() as stop:
        try:
            if found.by_hydra:
                _launch(line, found)
            else:
                for number, composed in enumerate(found.jobs):
                    if stop.requested or run_here(composed, found.folder / str(number)).state == "stopped":
                        break
        finally:
            results = close_sweep(
                found.folder,
                objective_title(found.config),
                low_is_best=is_low_best(found.config),
                console=console,
            )
    states = {result.state for result in results}
    return Stopped.exit_code if stop.requested or "stopped" in states else int(states != {"done"})


def _launch(line: Line, found: Sweep) -> None:
    """Hand the jobs to a launcher or sweeper of Hydra's.

    Raises:
        AlignpipeError: it cannot start them, or lost the processes that run them.
    """
    os.environ[SWEEP_PROCESS] = str(os.getpid())
    if line.folder is not None:
        # The workers compose too.
        os.environ[CONFIG_DIR_VARIABLE] = str(line.folder)
    try:
        with explained(found.words):
            _call_hydra(_job, line.flags, found.words)
    except Stopped:
        pass
    except Exception as error:
        # Where jobs have failed, the table says so; a sweeper may only repeat that none is left to choose from.
        if any(result.state == "failed" for result in sweep_results(found.folder)):
            return
        if isinstance(error, AlignpipeError):
            raise
        first = str(error).strip().partition("\n")[0]
        raise AlignpipeError(f"the launcher failed: {type(error).__name__}: {first}") from error


def _call_hydra(task: Callable[[DictConfig], Any], flags: list[str], words: list[str]) -> None:
    # Without it Hydra prints its own account of an error and ends the process.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    argv = sys.argv
    sys.argv = ["alignpipe", *flags, *words]
    try:
        hydra.main(version_base="1.3", config_path=str(built_in_folder()), config_name=CONFIG_NAME)(task)()
    finally:
        sys.argv = argv


def _nothing(_config: DictConfig) -> None:
    """Hydra wants a task even where it runs none."""


def _job(raw: DictConfig) -> float | None:
    """What a launcher's worker calls for each job; None tells a sweeper that it has no value."""
    settings = HydraConfig.get()
    words = [str(word) for word in settings.overrides.task]
    folder = Path(settings.runtime.output_dir)
    setup(read_line([]).folder)
    with explained(words):
        composed = checked(raw, words, {})
    prepare_job(composed, settings.job.num, folder)
    result = run_apart(folder)
    if result.state in ("waiting", "stopped"):
        # A sweeper must not try another value in its place.
        raise Stopped("stopped; run the same command to go on")
    return result.value
