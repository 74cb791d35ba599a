"""Runs a graph: reuse what is finished, make what is not, go on where a stage was stopped, sum up at the end.

Config -> plan (every check) -> run folder -> each stage in order -> scorecard and table
"""

import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from alignpipe.artifact import Manifest, write_json, write_text
from alignpipe.checks import check
from alignpipe.config import Config
from alignpipe.disk import refusals
from alignpipe.errors import AlignpipeError, ConfigError, MachineError, Stopped, as_line
from alignpipe.gates import find_gates
from alignpipe.objective import objective_value
from alignpipe.pipeline.graph import Node
from alignpipe.pipeline.keys import check_unchanged, why_not_reused
from alignpipe.pipeline.launch import RENDEZVOUS, begin, run_in_processes, runs_here
from alignpipe.pipeline.plan import make_plan, reusable
from alignpipe.pipeline.scorecard import print_scorecard, write_scorecard
from alignpipe.pipeline.store import TASK, Store, run_stages
from alignpipe.pipeline.tasks import stage_task
from alignpipe.secrets import hide_secrets
from alignpipe.signals import StopSignal
from alignpipe.task import write_task
from alignpipe.terminal import Terminal

ERROR_LOG = "error.log"
SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class Done:
    """A run that came to its end.

    Attributes:
        name: of its folder.
        value: of the objective; None where it has none.
    """

    name: str
    value: float | None


def run(config: Config, words: list[str], yaml: str, *, wait: bool = False) -> Done:
    """Run everything a configuration asks for.

    Args:
        config: composed and typed.
        words: what the user typed, recorded.
        yaml: the configuration as text, interpolations unresolved, recorded.
        wait: while another process has the same run under way, as jobs of a sweep may; else that is an error.

    Returns:
        The run's name, and what its objective came to.

    Raises:
        MachineError: another process has the same run under way.
        AlignpipeError: what went wrong, in one line; finished stages are kept.
    """
    check(config)
    with refusals(Path(config.output_dir)):
        return Runner(config, words, yaml, Terminal(stderr=True), wait=wait).run()


class Runner:
    """One run.

    Args:
        config: of the run.
        words: that the user typed.
        yaml: of the configuration.
        console: for progress.
        wait: while another process has the same run under way.
    """

    def __init__(
        self, config: Config, words: list[str], yaml: str, console: Console, *, wait: bool = False
    ) -> None:
        self._config = config
        self._words = words
        self._yaml = yaml
        self._console = console
        self._wait_for_run = wait
        self._store = Store(Path(config.output_dir).absolute())
        self._stop = StopSignal()
        self._gates = find_gates(config)

    def run(self) -> Done:
        """Plan, then run the stages."""
        with self._stop.listening():
            self._plan = make_plan(self._config)
            self._folder = self._store.run(self._plan.run)
            if self._config.launch.machine_rank > 0:
                for node in self._plan.graph.order:
                    self._stop.check()
                    self._join(node)
                return Done(self._plan.run, None)
            with self._store.lock_run(self._plan.run, self._wait_or_give_up):
                scorecard = self._bring_all()
        print_scorecard(scorecard, self._folder, Terminal())
        for name, figures in ({} if scorecard is None else scorecard["policies"]).items():
            self._pass(name, figures, of_policy=True)
        metrics = {node.name: self._metrics(node) for node in self._plan.graph.order}
        return Done(self._plan.run, objective_value(self._config.objective, scorecard, metrics))

    def _bring_all(self) -> dict[str, Any] | None:
        """Reuse or make every stage; the scorecard of them."""
        self._open_folder()
        for warning in self._plan.warnings:
            self._say(f"warning: {warning}")
        began = time.monotonic()
        for node in self._plan.graph.order:
            self._stop.check()
            self._bring(node)
            self._pass(node.name, self._metrics(node))
        self._say(f"run {self._plan.run} is done in {_clock(time.monotonic() - began)}: {self._folder}")
        return write_scorecard(self._plan.graph, self._store, self._folder)

    def _wait_or_give_up(self, holder: str) -> None:
        """What is done while another process has this run under way."""
        if not self._wait_for_run:
            raise MachineError(
                f"run {self._plan.run}: {holder} has it under way in {self._folder}; wait for its end, or give this "
                f"one a name of its own with run.name"
            )
        self._stop.check()

    def _pass(self, name: str, figures: Mapping[str, Any], *, of_policy: bool = False) -> None:
        """Go through the gates of a stage that has ended, or of a policy that was judged.

        Raises:
            AlignpipeError: one of them is shut, and the run is to stop there.
        """
        mine = [gate for gate in self._gates if gate.stage == name and gate.of_policy == of_policy]
        shut = [why for gate in mine if (why := gate.why_shut(figures)) is not None]
        if shut and self._config.gate_action == "stop":
            raise AlignpipeError(f"{'; '.join(shut)}; mend the stage, or go on with gate_action=warn")
        for why in shut:
            self._say(f"warning: {why}")

    def _open_folder(self) -> None:
        """Make or reopen the run's folder.

        Raises:
            ConfigError: a run of this name was made with other settings.
        """
        folder = self._folder
        keys = {node.name: node.key for node in self._plan.graph.order}
        known = {stage["name"]: stage["key"] for stage in run_stages(folder)}
        if known and known != keys:
            other = next(
                (node for node in self._plan.graph.order if known.get(node.name, node.key) != node.key), None
            )
            why = "other stages" if other is None else f"{other.name}: {why_not_reused(other, self._store)}"
            raise ConfigError(
                f"run.name: {self._plan.run} was run with other settings ({why}); choose another name, such as "
                f"{self._plan.run}-2, or take the change back"
            )
        # What writers left behind that were killed; nobody else writes here.
        for unfinished in folder.glob(".*.tmp"):
            unfinished.unlink()
        write_text(folder / "config.yaml", self._yaml)
        self._stages = [
            {
                "name": node.name,
                "kind": node.kind,
                "key": node.key,
                "state": "waiting",
                "seconds": None,
                "error": None,
            }
            for node in self._plan.graph.order
        ]
        self._write_run()
        self._store.set_latest(self._plan.run)

    def _bring(self, node: Node) -> None:
        """Reuse a stage or make it."""
        began = time.monotonic()
        with self._recorded(node):
            manifest = self._finished(node)
            # A folder of work beside a finished stage was left by a process that was killed while it cleared up.
            if manifest is None or self._store.work(node.kind, node.key).exists():
                with self._store.lock(node.kind, node.key, lambda holder: self._wait(node, holder)) as lock:
                    # Another run may have made it while this one waited.
                    manifest = self._finished(node)
                    if manifest is None:
                        self._make(node, lock)
                        self._note(node, state="done", seconds=round(time.monotonic() - began, 1))
                    # Whoever waited made the folder anew to say that it holds the lock.
                    self._store.finish(node.kind, node.key)
            if manifest is not None:
                self._note(node, state="reused")
        self._link(node)
        self._tell(node, time.monotonic() - began, reused=manifest is not None)

    def _finished(self, node: Node) -> Manifest | None:
        return reusable(self._plan.graph, self._store).get(node.name)

    def _make(self, node: Node, lock: int | None) -> None:
        check_unchanged(node, self._plan.graph, self._config, self._store, self._plan.chat_template)
        set_aside = self._store.clear(node.kind, node.key)
        if set_aside is not None:
            self._say(f"{node.name}: its finished folder no longer fits and was moved to {set_aside}")
        self._note(node, state="running")
        self._say(f"{node.name} ({node.kind}-{node.key}) {self._reason(node)}")
        task, path = (
            stage_task(node, self._config, self._plan, self._store),
            self._store.work(node.kind, node.key) / TASK,
        )
        write_task(task, path)
        if runs_here(task.launch):
            from alignpipe.worker import run_task  # noqa: PLC0415  (brings torch, which only a stage that runs needs)

            run_task(path, self._console, self._stop)
        else:
            run_in_processes(task, path, begin(task), self._stop, lock=lock)

    def _join(self, node: Node) -> None:
        """Lend this machine's processes to a stage that machine 0 makes, as often as it starts it."""
        rendezvous, joined = self._store.work(node.kind, node.key) / RENDEZVOUS, ""
        self._say(f"{node.name} ({node.kind}-{node.key}) waits for machine 0")
        while self._finished(node) is None:
            self._stop.check()
            begun = rendezvous.read_text() if rendezvous.is_file() else joined
            if begun == joined:
                time.sleep(SECONDS_BETWEEN_LOOKS)
                continue
            joined = begun
            task = stage_task(node, self._config, self._plan, self._store)
            path = task.work / f"machine{task.launch.machine_rank}.{TASK}"
            write_task(task, path)
            run_in_processes(
                task,
                path,
                joined,
                self._stop,
                abandoned=partial(_is_other, rendezvous, joined),
            )
        self._say(f"{node.name:<8} done")

    def _reason(self, node: Node) -> str:
        states = self._store.states(node.kind, node.key)
        return f"goes on from {states[-1]}" if states else f"runs: {why_not_reused(node, self._store)}"

    @contextmanager
    def _recorded(self, node: Node) -> Iterator[None]:
        """Write down how a stage ended, whichever way."""
        try:
            yield
        except Stopped:
            self._note(node, state="stopped")
            raise
        except AlignpipeError as error:
            # A disk that refused the stage may refuse this too; the first error is the one to tell.
            with suppress(MachineError):
                self._note(node, state="failed", error=as_line(hide_secrets(str(error))))
            if error.trace is None:
                raise
            raise AlignpipeError(f"{error}; see {self._keep(node, error.trace)}") from error
        except Exception as error:
            log = self._keep(node, traceback.format_exc())
            self._note(node, state="failed", error=as_line(hide_secrets(f"{type(error).__name__}: {error}")))
            first = str(error).strip().partition("\n")[0]
            raise AlignpipeError(
                f"stage {node.name} failed: {type(error).__name__}: {first}; see {log}"
            ) from error

    def _keep(self, node: Node, trace: str) -> Path:
        log = self._folder / f"{node.name}.{ERROR_LOG}"
        log.write_text(hide_secrets(trace), encoding="utf-8", errors="backslashreplace")
        return log

    def _wait(self, node: Node, holder: str) -> None:
        if self._stage(node)["state"] != "waiting for another run":
            self._say(f"{node.name}: {holder} makes it; waiting")
            self._stage(node)["state"] = "waiting for another run"
        self._stop.check()

    def _link(self, node: Node) -> None:
        temporary = self._folder / f".{node.name}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(Path("..", "..", "stages", f"{node.kind}-{node.key}"))
        temporary.replace(self._folder / node.name)

    def _tell(self, node: Node, seconds: float, *, reused: bool) -> None:
        figures = " ".join(
            f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
            for name, value in self._metrics(node).items()
            if isinstance(value, int | float)
        )
        what = "reused" if reused else f"done in {_clock(seconds)}"
        self._say(f"{node.name:<8} {what}  {figures}")

    def _metrics(self, node: Node) -> dict[str, Any]:
        manifest = self._store.find(node.kind, node.key)
        return dict(manifest.metrics) if manifest is not None else {}

    def _stage(self, node: Node) -> dict[str, Any]:
        return next(stage for stage in self._stages if stage["name"] == node.name)

    def _note(self, node: Node, **changes: Any) -> None:
        self._stage(node).update(changes)
        self._write_run()

    def _write_run(self) -> None:
        folder = self._store.run(self._plan.run)
        write_json(folder / "run.json", {"run": self._plan.run, "words": self._words, "stages": self._stages})

    def _say(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


def _is_other(rendezvous: Path, joined: str) -> bool:
    """Whether machine 0 has begun the stage anew."""
    return rendezvous.is_file() and rendezvous.read_text() != joined


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
