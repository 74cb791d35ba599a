"""What a sweep leaves behind: a result of each job, a table of them, the best configuration.

outputs/sweeps/<name>/sweep.json         what was asked for
outputs/sweeps/<name>/<job>/result.json  how a job stands
outputs/sweeps/<name>/<job>/job.yaml     its configuration, as `best.yaml` below
outputs/sweeps/<name>/results.csv        a line for each job, the best first
outputs/sweeps/<name>/best.yaml          alignpipe run --config-dir outputs/sweeps/<name> --config-name best
"""

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignpipe.artifact import make_folder, refuse_link, write_json, write_text
from alignpipe.errors import ConfigError

RESULT = "result.json"
JOB = "job"
BEST = "best"
CSV = "results.csv"
# Beside the jobs while they are asked to end; whoever runs one looks for it.
STOP = "stop"


@dataclass(frozen=True)
class JobResult:
    """How one job of a sweep stands.

    Attributes:
        job: its number.
        words: that make it, as Hydra takes them.
        state: waiting, running, done, failed or stopped.
        value: of the objective; None where it has none.
        run: folder name of its run; None before the run is done.
        error: one line.
    """

    job: int
    words: list[str]
    state: str = "waiting"
    value: float | None = None
    run: str | None = None
    error: str | None = None


def begin_sweep(folder: Path, words: list[str], *, named: bool) -> None:
    """Make or reopen the folder of a sweep; what an earlier go left in it is written anew.

    Args:
        folder: of the sweep.
        words: that decide its jobs.
        named: the user chose the name.

    Raises:
        ConfigError: a sweep of this name had other words.
        MachineError: the folder cannot be written.
    """
    record = folder / "sweep.json"
    if named and record.is_file() and json.loads(record.read_text(encoding="utf-8"))["words"] != words:
        raise ConfigError(
            f"sweep.name: {folder.name} was a sweep of other words; choose another name, such as {folder.name}-2"
        )
    refuse_link(folder)
    make_folder(folder)
    for old in (*folder.glob(f"*/{RESULT}"), folder / CSV, folder / f"{BEST}.yaml", folder / STOP):
        old.unlink(missing_ok=True)
    write_json(record, {"words": words})


def write_result(folder: Path, result: JobResult) -> None:
    """Put a job's result into the job's folder, in one step.

    Raises:
        MachineError: the disk refuses it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULT, asdict(result))


def read_result(folder: Path) -> JobResult:
    """The result in a job's folder."""
    return JobResult(**json.loads((folder / RESULT).read_text(encoding="utf-8")))


def sweep_results(folder: Path) -> list[JobResult]:
    """Results of all jobs, by number; a job whose process is gone without a word counts as failed."""
    results = [read_result(path.parent) for path in folder.glob(f"*/{RESULT}")]
    return sorted(results, key=lambda result: result.job)


def close_sweep(folder: Path, title: str, *, low_is_best: bool, console: Console) -> list[JobResult]:
    """Rank the jobs, write `results.csv` and `best.yaml`, and show the table.

    Args:
        folder: of the sweep, no job of which runs any more.
        title: of the objective.
        low_is_best: the smallest value is the best one.
        console: for the table.

    Returns:
        The results, by number.

    Raises:
        MachineError: the disk refuses a file.
    """
    results = [_ended(folder, result) for result in sweep_results(folder)]
    ranked = sorted(results, key=lambda result: _rank(result, low_is_best))
    varied = _varied(results)
    write_text(folder / CSV, _as_csv(ranked, varied, title))
    _show(ranked, varied, title, console)
    best = ranked[0] if ranked and ranked[0].value is not None else None
    (folder / STOP).unlink(missing_ok=True)
    if best is not None:
        text = (folder / str(best.job) / f"{JOB}.yaml").read_text(encoding="utf-8")
        again = f"alignpipe run --config-dir {_quoted(folder)} --config-name {BEST}"
        write_text(
            folder / f"{BEST}.yaml", f"# Job {best.job}, {title} {best.value:.4f}; again: {again}\n{text}"
        )
        console.print(Text(f"best: job {best.job}; again: {again}"), soft_wrap=True)
    elif any(result.state == "done" for result in results):
        console.print(Text(f"no job has a value of {title}; choose another objective to rank them"))
    if results:
        console.print(Text(f"sweep: {folder}"), soft_wrap=True)
    return results


def _ended(folder: Path, result: JobResult) -> JobResult:
    """A job that still says it runs, after all have ended, was lost together with its launcher's process."""
    if result.state != "running":
        return result
    lost = replace(result, state="failed", error="its process was lost; run the same command to go on")
    write_result(folder / str(result.job), lost)
    return lost


def _rank(result: JobResult, low_is_best: bool) -> tuple[bool, float, int]:
    value = result.value if result.value is not None and math.isfinite(result.value) else None
    return (value is None, 0.0 if value is None else value if low_is_best else -value, result.job)


def _pairs(result: JobResult) -> dict[str, str]:
    found = {}
    for word in result.words:
        key, _, value = word.partition("=")
        if not key.startswith(("~", "hydra")):
            found[key.lstrip("+")] = value
    return found


def _varied(results: list[JobResult]) -> list[str]:
    """Keys whose value differs between jobs, in the order they were typed; all of them for a single job."""
    rows = [_pairs(result) for result in results]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [key for key in keys if len(rows) == 1 or len({row.get(key) for row in rows}) > 1]


def _as_csv(ranked: Iterable[JobResult], varied: list[str], title: str) -> str:
    written = io.StringIO()
    table = csv.writer(written, lineterminator="\n")
    table.writerow(["job", "state", title, *varied, "run", "error"])
    for result in ranked:
        words = _pairs(result)
        values = [words.get(key, "") for key in varied]
        table.writerow([result.job, result.state, result.value, *values, result.run, result.error])
    return written.getvalue()


def _show(ranked: list[JobResult], varied: list[str], title: str, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("job", "words", "state", title):
        table.add_column(name, overflow="fold", justify="right" if name == title else "left")
    for result in ranked:
        words = _pairs(result)
        shown = " ".join(f"{key}={words[key]}" for key in varied if key in words)
        value = "" if result.value is None else f"{result.value:.3f}"
        table.add_row(*(Text(cell) for cell in (str(result.job), shown, result.state, value)))
    if ranked:
        console.print(table)


def _quoted(path: Path) -> str:
    text = str(path)
    return f"'{text}'" if any(letter in text for letter in " ()&;$") else text
