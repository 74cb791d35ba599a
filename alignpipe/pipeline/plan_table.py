"""A plan as a user reads it, in 100 columns.

Plan -> stages, memory of one process by part, what feeds each stage, warnings
"""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from alignpipe.disk import format_bytes
from alignpipe.pipeline.accelerators import UTILISATION
from alignpipe.pipeline.memory import PARTS
from alignpipe.pipeline.plan import Plan

# Column titles that keep a plan within 100 columns.
SHORT = {"gradients": "grads", "optimizer": "AdamW", "activations": "acts"}
BATCH = "batch = micro x accum"
LEFT = ("stage", "state", BATCH, f"{BATCH} x procs", "key", "at")


def print_plan(plan: Plan, console: Console) -> None:
    """Show a plan: its stages, their memory, what feeds each, and warnings."""
    needs = f"needs {format_bytes(plan.disk_needed)}, {format_bytes(plan.disk_free)} free"
    lines = [f"run {plan.run}   {needs}", *_stages(plan), *_memory(plan)]
    lines += [f"{row.name}: {row.reads}  ({row.why})" for row in plan.rows]
    lines += [f"warning: {warning}" for warning in plan.warnings]
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _stages(plan: Plan) -> list[str]:
    """A row a stage; the column of times only where some are known."""
    batch = BATCH if plan.setting.launch.num_processes == 1 else f"{BATCH} x procs"
    cells = [["stage", "state", "rows", "tokens", "steps", batch, "disk", "time", "key"]]
    for row in plan.rows:
        tokens, seconds = (
            (None, None) if row.estimate is None else (row.estimate.tokens, row.estimate.seconds)
        )
        cells.append(
            [
                row.name,
                row.state,
                "" if row.rows is None else f"{row.rows:,}",
                "" if tokens is None else format_count(tokens),
                "" if row.steps is None else f"{row.steps:,}",
                row.batch,
                format_bytes(row.disk),
                "" if seconds is None else _duration(seconds),
                row.key[:8],
            ]
        )
    return _aligned(cells)


def _memory(plan: Plan) -> list[str]:
    """Memory of one process at its peak, a part a column; parts that no stage has are left out."""
    known = [(row.name, row.estimate) for row in plan.rows if row.estimate is not None]
    if not known:
        return []
    launch, machine = plan.setting.launch, plan.machine
    unit, size = ("GB", 1e9) if max(found.memory.total for _, found in known) >= 1e9 else ("MB", 1e6)
    head = (
        f"memory of one process in {unit}, estimated: {launch.strategy} x {launch.num_processes}, "
        f"{launch.precision}; {machine.name} has {machine.memory / size:,.1f}"
    )
    parts = [part for part in PARTS if any(getattr(found.memory, part) for _, found in known)]
    cells = [["stage", "params", "at", *(SHORT.get(part, part) for part in parts), "total"]]
    for name, found in known:
        sizes = [getattr(found.memory, part) for part in parts]
        numbers = [f"{value / size:,.1f}" if value else "" for value in (*sizes, found.memory.total)]
        cells.append([name, format_count(found.parameters), found.memory.moment, *numbers])
    lines = [head, *_aligned(cells)]
    peak = machine.peak_flops(launch.precision)
    if any(found.seconds is not None for _, found in known) and peak is not None:
        lines.append(
            f"time is at {UTILISATION:.0%} of {machine.name}'s {peak / 1e12:,.0f} TFLOP/s and of its bandwidth"
        )
    return lines


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, columns that are empty below their title left out."""
    columns = [column for column in zip(*cells, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in zip(*columns, strict=True):
        fitted = [
            cell.ljust(width) if column[0] in LEFT else cell.rjust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        lines.append("  ".join(fitted).rstrip())
    return lines


def format_count(number: float) -> str:
    """Such as 6.74B: three digits that matter."""
    for unit in ("", "k", "M", "B"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def _duration(seconds: float) -> str:
    """Such as 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
