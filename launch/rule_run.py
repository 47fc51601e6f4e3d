"""One training run of launch/compare_rules.py in numbers, and many of them as a table."""

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from step import Step

#: Losses are averaged over this many steps before they are compared or drawn.
WINDOW = 20
COLUMNS = ("model", "rule", "final loss", "best loss", "median norm", "clipped", "skipped", "diverged")


@dataclass(frozen=True)
class RuleRun:
    """One model trained with one rule."""

    model: str
    rule: str
    steps: Sequence[Step]

    @property
    def losses(self) -> list[float]:
        """At every step the mean of the last `WINDOW`."""
        losses = [step.loss for step in self.steps]
        windows = (losses[max(0, end - WINDOW) : end] for end in range(1, len(losses) + 1))
        return [sum(window) / len(window) for window in windows]

    @property
    def final_loss(self) -> float:
        """NaN, or the mean of the last steps."""
        return self.losses[-1]

    @property
    def diverged(self) -> bool:
        """Whether it ended no better than it began."""
        return not self.final_loss < self.steps[0].loss

    def json_lines(self) -> Iterator[str]:
        """A JSON object for each step: those of launch/train.py, and whose they are."""
        for step in self.steps:
            yield json.dumps({"model": self.model, "rule": self.rule} | json.loads(step.to_json()))

    def row(self) -> list[str]:
        """The run under COLUMNS."""
        norms = [step.total_norm for step in self.steps if math.isfinite(step.total_norm)] or [math.nan]
        return [
            self.model,
            self.rule,
            f"{self.final_loss:.4g}",
            f"{min(self.losses):.4g}",
            f"{statistics.median(norms):.3g}",
            f"{statistics.fmean(step.clipped for step in self.steps):.0%}",
            f"{statistics.fmean(step.skipped for step in self.steps):.0%}",
            f"step {self.steps[-1].step}" if math.isnan(self.final_loss) else "yes" if self.diverged else "no",
        ]


def ranked(runs: Sequence[RuleRun]) -> list[RuleRun]:
    """Model by model, the lowest final loss first and NaN last."""
    models = list(dict.fromkeys(run.model for run in runs))
    return sorted(runs, key=lambda run: (models.index(run.model), math.isnan(run.final_loss), run.final_loss))


def markdown(runs: Sequence[RuleRun]) -> str:
    """The table for a file."""
    rows = [list(COLUMNS), ["---"] * 2 + ["---:"] * (len(COLUMNS) - 2), *(run.row() for run in ranked(runs))]
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def table(runs: Sequence[RuleRun]) -> Table:
    """The table for a screen, with a line between the models."""
    drawn = Table()
    for name in COLUMNS:
        # Where the screen is too narrow for a text, it goes on in the next line.
        drawn.add_column(name, justify="left" if name in ("model", "rule") else "right", overflow="fold")
    in_order = ranked(runs)
    for run, following in zip(in_order, [*in_order[1:], None], strict=True):
        drawn.add_row(*run.row(), end_section=following is not None and following.model != run.model)
    return drawn
