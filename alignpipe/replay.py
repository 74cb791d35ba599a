"""Does the beginning of finished stages again, and says which promise held: the same bits, or the same numbers to 1e-5.

run -> its configuration -> each stage in a folder of its own, up to a step -> its figures beside those recorded
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignpipe.artifact import MANIFEST, Manifest, changed_versions, installed_versions, verify
from alignpipe.compose.composition import compose
from alignpipe.compose.rerun import rerun_yaml
from alignpipe.config import Config
from alignpipe.errors import CheckpointError, ConfigError, Stopped, did_you_mean
from alignpipe.pipeline.launch import begin, run_in_processes, runs_here
from alignpipe.pipeline.plan import Plan, make_plan
from alignpipe.pipeline.status import find_run
from alignpipe.pipeline.store import TASK, Store, run_stages
from alignpipe.pipeline.tasks import stage_task
from alignpipe.signals import StopSignal
from alignpipe.task import Task, write_task
from alignpipe.training.checkpoint import made_with
from alignpipe.training.metrics import METRICS
from alignpipe.worker import run_task

# What another machine, thread count or release may change a figure by.
CLOSE = 1e-5
# Of the clock, not of the training.
TIMED = {"tokens_per_second"}


@dataclass(frozen=True)
class Replay:
    """How a stage came out the second time.

    Attributes:
        stage: its name.
        steps: that were done again; None where the stage has none and was done whole.
        difference: the largest between figures of the two, relative to those above 1; 0 where all bits are the same,
            None where files of a stage without steps differ.
        where: of that difference.
        changed: what is not as it was when the stage was made, such as `torch 2.11.0 -> 2.13.0`.
    """

    stage: str
    steps: int | None
    difference: float | None
    where: str
    changed: list[str]

    @property
    def promise(self) -> str:
        """What held."""
        if self.difference == 0:
            return "bit-identical"
        if self.difference is not None and self.difference <= CLOSE:
            return f"within {CLOSE:g}"
        return "differs"


class _UntilStep(StopSignal):
    """Asks for the end once a stage has written the figures of a step.

    Args:
        metrics: the file they are written to.
        step: the last one that is wanted.
    """

    def __init__(self, metrics: Path, step: int) -> None:
        super().__init__()
        self._metrics, self._step = metrics, step

    @property
    def requested(self) -> bool:
        """True from that step on, and from a signal on."""
        return self.received is not None or any(
            row["step"] >= self._step for row in _figures(self._metrics)[-1:]
        )


def replay(
    output_dir: Path, run: str | None, stage: str | None, steps: int, console: Console
) -> list[Replay]:
    """Verify the files of a run's finished stages, and do the beginning of some of them again.

    Args:
        output_dir: of the project.
        run: name, unique beginning of one, or None for the newest.
        stage: the one to do again; None does all that have steps.
        steps: optimizer updates to do again, up to the next that was written down.
        console: for progress.

    Raises:
        AlignpipeError: there is no such run or stage, a file is damaged, or the run's settings no longer make the
            same keys.
    """
    store = Store(output_dir.absolute())
    folder = find_run(store, run)
    finished = {
        item["name"]: verify(store.stage(item["kind"], item["key"]))
        for item in run_stages(folder)
        if store.find(item["kind"], item["key"]) is not None
    }
    if stage is not None and stage not in finished:
        raise ConfigError(
            f"{folder.name} has no finished stage {stage!r}. {did_you_mean(stage, finished)}".strip()
        )
    config = _config(folder, output_dir)
    plan = make_plan(config)
    found = []
    for name, manifest in finished.items():
        key = plan.graph.nodes[name].key
        if key != manifest.key:
            raise CheckpointError(
                f"{folder / 'config.yaml'}: makes another {name} now ({key}, was {manifest.key}); put back the data or "
                f"file that has changed since"
            )
        if name == stage or (stage is None and _has_steps(store.stage(manifest.kind, key))):
            console.print(Text(f"{name}: {len(manifest.files)} files as they were written; does it again"))
            found.append(_replayed(name, manifest, config, plan, store, steps, console))
    return found


def print_replays(found: Sequence[Replay], console: Console) -> None:
    """Show what held of each stage."""
    table = Table(box=None, pad_edge=False)
    for title in ("stage", "done again", "held", "not as it was"):
        table.add_column(title, overflow="fold")
    for one in found:
        stretch = "all of it" if one.steps is None else f"steps 1 to {one.steps}"
        table.add_row(*(Text(cell) for cell in (one.stage, stretch, one.promise, "; ".join(one.changed))))
    console.print(table)


def check_promise(found: Sequence[Replay]) -> None:
    """Make sure that each stage keeps the promise that holds for it.

    Raises:
        CheckpointError: figures differ by more than another machine may change them by, or differ at all though
            nothing that decides them has changed.
    """
    for one in found:
        if one.promise == "differs" or (one.difference and not one.changed):
            by = "" if one.difference is None else f" by {one.difference:.2g}"
            raise CheckpointError(
                f"{one.stage}: {one.where} differs{by} from what was recorded; was it made on another kind of machine, "
                f"or have its inputs changed?"
            )


def _config(folder: Path, output_dir: Path) -> Config:
    """The configuration of a run, composed once more from what was recorded."""
    recorded = (folder / "config.yaml").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary, "recorded.yaml").write_text(rerun_yaml(recorded), encoding="utf-8")
        words = ["--config-dir", temporary, "--config-name", "recorded", f"output_dir={output_dir}"]
        return compose(words).config


def _replayed(
    name: str, manifest: Manifest, config: Config, plan: Plan, store: Store, steps: int, console: Console
) -> Replay:
    with _apart(stage_task(plan.graph.nodes[name], config, plan, store), store) as task:
        recorded = store.stage(task.kind, task.key)
        trains = _has_steps(recorded)
        _run_until(task, steps if trains else None, console)
        finished = (task.target / MANIFEST).is_file()
        again = _figures((task.target if finished else task.work) / METRICS)
        difference: float | None
        difference, where = _largest_difference(_figures(recorded / METRICS), again)
        other = _other_file(manifest, verify(task.target)) if finished else None
    if other is not None and difference == 0:
        difference, where = None, other
    # What other processes count is theirs to say.
    now = made_with() if runs_here(task.launch) else installed_versions()
    changed = changed_versions(manifest.versions, now)
    return Replay(name, int(again[-1]["step"]) if trains else None, difference, where, changed)


@contextmanager
def _apart(task: Task, store: Store) -> Iterator[Task]:
    """The task in a folder of its own, which goes away; rows that were read are used from where they are kept."""
    (store.root / "work").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store.root / "work", prefix="replay-") as temporary:
        root = Path(temporary)
        store.rows.mkdir(exist_ok=True)
        (root / "rows").symlink_to(store.rows)
        (root / "work").mkdir()
        yield replace(task, work=root / "work", target=root / "stages" / task.name, trackers=[])


def _run_until(task: Task, step: int | None, console: Console) -> None:
    stop = StopSignal() if step is None else _UntilStep(task.work / METRICS, step)
    path = task.work / TASK
    write_task(task, path)
    with stop.listening(), suppress(*([Stopped] if step is not None else [])):
        if runs_here(task.launch):
            run_task(path, console, stop)
        else:
            run_in_processes(task, path, begin(task), stop)
    if stop.received is not None:
        raise Stopped(f"stopped by {stop.received.name}; nothing was changed")


def _has_steps(stage: Path) -> bool:
    return any(row["step"] > 0 for row in _figures(stage / METRICS))


def _figures(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def _largest_difference(
    recorded: Sequence[Mapping[str, Any]], again: Sequence[Mapping[str, Any]]
) -> tuple[float, str]:
    largest, where = 0.0, ""
    for row, (old, new) in enumerate(zip(recorded, again, strict=False)):
        for name in sorted((old.keys() | new.keys()) - TIMED):
            difference = _difference(old.get(name), new.get(name))
            if difference > largest:
                largest, where = difference, f"{name} of step {again[row]['step']}"
    return largest, where


def _difference(old: float | None, new: float | None) -> float:
    if old is None or new is None:
        return 0.0 if old is new else float("inf")
    return abs(old - new) / max(1.0, abs(old))


def _other_file(recorded: Manifest, again: Manifest) -> str | None:
    """The first file whose content is another; figures were compared by themselves."""
    names = sorted((recorded.files.keys() | again.files.keys()) - {METRICS})
    return next((name for name in names if recorded.files.get(name) != again.files.get(name)), None)
