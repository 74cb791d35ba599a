"""How a run stands: each stage with its state, told from the store and the locks, without torch."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignpipe.errors import ConfigError, did_you_mean
from alignpipe.pipeline.store import Store, read_run, run_stages

STATES = ("waiting", "running", "stopped", "done", "reused", "failed")


def run_status(output_dir: Path, run: str | None = None) -> dict[str, Any]:
    """State of every stage of a run.

    Args:
        output_dir: of the project.
        run: name, unique beginning of one, or None for the newest.

    Returns:
        `run`, and `stages` in order with `name, kind, key, state, steps, path, metrics, error`.

    Raises:
        ConfigError: there is no such run.
    """
    store = Store(output_dir)
    folder = find_run(store, run)
    record = read_run(folder)
    stages = [_stage(store, stage) for stage in run_stages(folder)]
    return {"run": folder.name, "words": [] if record is None else record["words"], "stages": stages}


def list_runs(output_dir: Path) -> list[dict[str, Any]]:
    """All runs, newest first, with how many of their stages are done."""
    store = Store(output_dir)
    found = []
    for folder in store.runs():
        states = [_stage(store, stage)["state"] for stage in run_stages(folder)]
        done = sum(state in ("done", "reused") for state in states)
        found.append({"run": folder.name, "stages": len(states), "done": done, "path": str(folder)})
    return found


def find_run(store: Store, run: str | None) -> Path:
    """Folder of a run, by name, unique beginning of one, or None for the newest.

    Raises:
        ConfigError: there is no such run, or several begin so.
    """
    latest = store.root / "latest"
    if run in (None, "latest"):
        if not latest.is_file():
            raise ConfigError(f"no run in {store.root.resolve()} yet; start one with alignpipe run")
        run = latest.read_text(encoding="utf-8").strip()
    name = Path(str(run)).name
    names = [folder.name for folder in store.runs()]
    begin = [found for found in names if found.startswith(name)]
    if name in names:
        return store.run(name)
    if len(begin) == 1:
        return store.run(begin[0])
    if begin:
        raise ConfigError(f"{run}: {len(begin)} runs begin so: {', '.join(begin[:5])}")
    raise ConfigError(f"there is no run {run!r}. {did_you_mean(name, names)}".strip())


def _stage(store: Store, stage: dict[str, Any]) -> dict[str, Any]:
    kind, key = stage["kind"], stage["key"]
    manifest = store.find(kind, key)
    state = stage["state"]
    if manifest is None and state in ("running", "done", "reused", "waiting"):
        # Not locked: it was running when its process died, or its folder was taken away.
        abandoned = "stopped" if state == "running" else "waiting"
        state = "running" if store.is_locked(kind, key) else abandoned
    elif manifest is not None and state not in ("done", "reused"):
        state = "done"
    metrics = dict(manifest.metrics) if manifest is not None else _newest_metrics(store.work(kind, key))
    return {
        "name": stage["name"],
        "kind": kind,
        "key": key,
        "state": state,
        "steps": metrics.get("step") if manifest is None else _last_step(store.stage(kind, key)),
        "path": str(store.stage(kind, key)) if manifest is not None else None,
        "metrics": metrics,
        "error": stage["error"],
    }


def _newest_metrics(folder: Path) -> dict[str, Any]:
    """The last whole line of `metrics.jsonl`; empty where there is none."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return {}
    for line in reversed(path.read_bytes().splitlines()):
        try:
            figures: dict[str, Any] = json.loads(line)
            return figures
        except ValueError:
            continue
    return {}


def _last_step(folder: Path) -> int | None:
    step = _newest_metrics(folder).get("step")
    return None if step is None else int(step)


def print_status(status: dict[str, Any], console: Console) -> None:
    """Show a run's stages as a table."""
    console.print(Text(f"run {status['run']}"))
    table = Table(box=None, pad_edge=False)
    for title in ("stage", "state", "steps", "figures"):
        table.add_column(title, overflow="fold", justify="right" if title == "steps" else "left")
    for stage in status["stages"]:
        figures = "  ".join(
            f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
            for name, value in stage["metrics"].items()
            if isinstance(value, int | float) and name != "step"
        )
        steps = "" if stage["steps"] is None else str(stage["steps"])
        shown = stage["error"] if stage["state"] == "failed" else figures
        table.add_row(*(Text(cell) for cell in (stage["name"], stage["state"], steps, shown or "")))
    console.print(table)


def print_runs(runs: list[dict[str, Any]], console: Console) -> None:
    """Show all runs as a table."""
    if not runs:
        console.print("no run yet; start one with: alignpipe run")
        return
    table = Table(box=None, pad_edge=False)
    for title in ("run", "stages done", "path"):
        table.add_column(title, overflow="fold")
    for run in runs:
        table.add_row(*(Text(cell) for cell in (run["run"], f"{run['done']}/{run['stages']}", run["path"])))
    console.print(table)
