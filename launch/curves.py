"""The picture of launch/compare_rules.py: the loss under every rule, one panel a model."""

import math
from collections.abc import Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from rule_run import WINDOW, RuleRun, ranked

#: Okabe and Ito's palette without its black (which is for no clipping) and its yellow (too pale for a line), ...
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
#: ... for solid lines, then for dashed ones and so on.
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
#: A loss of so many times the first leaves the panel, which would else be empty but for one curve.
FAR_UP = 1.5


def save_curves(runs: Sequence[RuleRun], path: Path) -> None:
    """Draw the losses of `runs` into the PNG file `path`."""
    models = list(dict.fromkeys(run.model for run in runs))
    styles = _styles(list(dict.fromkeys(run.rule for run in runs)))
    height = max(2.4, 0.6 + 0.15 * len(styles))
    figure = Figure(figsize=(9.0, height * len(models)), layout="constrained")
    for model, axes in zip(models, figure.subplots(len(models), 1, squeeze=False)[:, 0], strict=True):
        _draw(axes, ranked([run for run in runs if run.model == model]), styles)
    figure.savefig(path, dpi=200)


def _styles(rules: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A line for each rule, the same in every panel."""
    lines = ({"color": colour, "linestyle": dash} for dash, colour in cycle(product(DASHES, COLOURS)))
    clipping = [rule for rule in rules if rule != "none"]
    return {"none": {"color": "black", "linestyle": "-", "zorder": 3}} | dict(zip(clipping, lines, strict=False))


def _draw(axes: Axes, runs: Sequence[RuleRun], styles: dict[str, dict[str, Any]]) -> None:
    """One panel; its legend is in the order of the final losses."""
    for run in runs:
        numbers = [step.step for step in run.steps]
        axes.plot(numbers, run.losses, linewidth=1.1, label=f"{run.rule}  ({_end(run)})", **styles[run.rule])
    axes.set_yscale("log")
    losses = [loss for run in runs for loss in run.losses if math.isfinite(loss)]
    top = min(1.05 * max(losses), FAR_UP * losses[0])
    axes.set_ylim(0.95 * min(losses), top)
    for run in runs:
        if math.isnan(run.final_loss):
            # On the upper edge: the curve left the panel before.
            axes.plot(len(run.steps), top, "x", color=styles[run.rule]["color"], markersize=5, clip_on=False)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss (mean of {WINDOW} steps)")
    axes.set_title(f"{runs[0].model}, learning rate {runs[0].steps[0].lr:g}", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=2.6)


def _end(run: RuleRun) -> str:
    """How it ended."""
    if math.isnan(run.final_loss):
        return f"NaN at step {len(run.steps)}"
    return f"{run.final_loss:.3g}, diverged" if run.diverged else f"{run.final_loss:.3g}"
