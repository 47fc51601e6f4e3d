"""A run on the screen: progress while it trains, a table at the end."""

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import progress
from rich.console import Console
from rich.table import Table

from step import Step

#: What progress shows of the last step.
FIELDS = ("loss", "grad norm", "coefficient", "clipped")


class Progress:
    """A bar on a terminal; in a file or a pipe, where a moving bar is noise, a plain line every tenth of the way."""

    def __init__(self, console: Console, *, total: int) -> None:
        self.console = console
        self.total = total
        self.bar = progress.Progress(
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            *(progress.TextColumn(f"{name} [bold]{{task.fields[{name}]}}") for name in FIELDS),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=total, **_fields("-" for _ in FIELDS))

    def show(self, steps: Sequence[Step]) -> None:
        """The run so far."""
        last = steps[-1]
        share = f"{clipped_share(steps):.0%}"
        fields = _fields((f"{last.loss:.3f}", f"{last.total_norm:.3g}", f"{last.coefficient:.3f}", share))
        self.bar.update(self.task, completed=last.step, **fields)
        due = last.step == self.total or last.step % max(1, self.total // 10) == 0
        if due and not self.console.is_terminal:
            print(f"step {last.step}/{self.total}", *map(" ".join, fields.items()), sep="  ", flush=True)


def _fields(values: Iterable[str]) -> dict[str, Any]:
    return dict(zip(FIELDS, values, strict=True))


def clipped_share(steps: Sequence[Step]) -> float:
    """The part of the steps in which something was clipped, from 0 to 1."""
    return sum(step.clipped for step in steps) / len(steps)


def closing_table(steps: Sequence[Step], *, title: str, files: Sequence[Path]) -> Table:
    """The run in a few lines."""
    last = steps[-1]
    finite = [step.total_norm for step in steps if math.isfinite(step.total_norm)] or [math.nan]
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_row("steps", str(last.step))
    table.add_row("final loss", f"{last.loss:.4f}")
    table.add_row("grad norm", f"median {statistics.median(finite):.3g}, largest {max(finite):.3g}")
    table.add_row("clipped steps", f"{clipped_share(steps):.0%} at threshold {last.threshold:g}")
    if any(step.nonfinite for step in steps):
        table.add_row("not finite", f"the gradients of {sum(step.nonfinite for step in steps)} steps")
    # The median, because the first step also pays for what is set up once.
    table.add_row("time per step", f"{1000 * statistics.median(step.seconds for step in steps):.1f} ms")
    table.add_row("files", "\n".join(map(str, files)))
    return table
