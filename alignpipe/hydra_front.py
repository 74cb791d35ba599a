"""`alignpipe run` where Hydra itself is wanted: its help and its looks at the configuration, and sweeps.

Hydra knows no subcommands, so its entry point is called with a command line of its own.
"""

import io
import json
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
from rich.table import Table

from alignpipe.artifact import write_json
from alignpipe.compose.command_line import CONFIG_NAME, Line
from alignpipe.compose.composition import (
    Composed,
    built_in_folder,
    checked,
    compose,
    compose_sweep,
    explained,
    prepared_words,
)
from alignpipe.errors import AlignpipeError, Stopped
from alignpipe.pipeline.runner import run

RESULT = "result.json"


def show(line: Line, argv: list[str]) -> str:
    """What Hydra prints for --help, --hydra-help, --info and --cfg.

    Raises:
        ConfigError: the words do not compose.
    """
    if "--cfg" in line.flags and not line.multirun:
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
    or sweeper of Hydra's is chosen.

    Returns:
        Exit code: 0 when every job is done, else 1.

    Raises:
        AlignpipeError: a job does not compose; nothing has run then.
        SystemExit: a signal ended the sweep.
    """
    found = compose_sweep(line)
    try:
        if found.by_hydra:
            with explained(found.words):
                _call_hydra(_job, line.flags, found.words)
        else:
            for number, composed in enumerate(found.jobs):
                with suppress(AlignpipeError):
                    _run_job(composed, number, found.folder / str(number))
    except AlignpipeError:
        # A job has said its error already, and the table says which; anything else has yet to be said.
        if not sweep_results(found.folder):
            raise
    finally:
        results = sweep_results(found.folder)
        _print_results(results, found.folder, console)
    return int(any(result["state"] != "done" for result in results))


def sweep_results(folder: Path) -> list[dict[str, Any]]:
    """What the jobs of a sweep left behind, in their order."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(f"*/{RESULT}")]
    return sorted(results, key=lambda result: int(result["job"]))


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
    settings = HydraConfig.get()
    words = [str(word) for word in settings.overrides.task]
    with explained(words):
        composed = checked(raw, words, {})
    return _run_job(composed, settings.job.num, Path(settings.runtime.output_dir))


def _run_job(composed: Composed, number: int, folder: Path) -> float | None:
    """Run one job and leave its result behind, however it ends."""
    words = [word for word in composed.overrides if not word.startswith(("~", "hydra"))]
    result: dict[str, Any] = {"job": number, "words": words, "state": "failed", "error": None, "value": None}
    try:
        value = run(composed.config, composed.overrides, composed.yaml)
        result |= {"state": "done", "value": value}
        return value
    except AlignpipeError as error:
        result["error"] = str(error)
        Console(stderr=True, highlight=False).print(f"error: {error}", markup=False, soft_wrap=True)
        if isinstance(error, Stopped):
            result["state"] = "stopped"
            # The jobs after it must not start; Hydra too goes on after an Exception, but not after this.
            raise SystemExit(error.exit_code) from error
        raise
    finally:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RESULT, result)


def _print_results(results: list[dict[str, Any]], folder: Path, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("job", "words", "state", "gold"):
        table.add_column(title, overflow="fold")
    for result in results:
        gold = "" if result["value"] is None else f"{result['value']:.3f}"
        table.add_row(str(result["job"]), " ".join(result["words"]), result["state"], gold)
    if results:
        console.print(table)
        console.print(f"sweep: {folder}", markup=False, soft_wrap=True)
