"""The loss over steps."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from distclip.plots.columns import LARGEST, Columns, Floats, is_long, medians
from distclip.plots.scales import log_axis, log_limits, step_axis
from distclip.plots.style import GREEN, INK, legend_above, say
from distclip.plots.trace import TOP, draw_edge_marks, draw_trace
from distclip.runs import Run

# A loss that falls by more than this is shown on a logarithmic axis.
_WIDE = 30.0


def draw_loss(axes: Axes, run: Run) -> None:
    """Draw the loss where it was logged; a long run's with its running median.

    Args:
        axes: where to.
        run: as ``distclip.runs.read_run`` gives it.
    """
    columns = Columns(run)
    steps, losses = columns.steps, columns.losses
    entries = []
    if np.isnan(losses).all():
        say(axes, "no loss was logged")
    elif is_long(losses):
        draw_trace(axes, steps, losses, color=GREEN, alpha=0.35, linewidth=0.6, label="loss")
        (middle,) = axes.plot(*medians(steps, losses), color=GREEN, label="running median")
        entries.append((middle, "running median"))
    else:
        draw_trace(axes, steps, losses, color=GREEN, label="loss")
    if columns.nonfinite_losses.any():
        count = int(columns.nonfinite_losses.sum())
        marks = draw_edge_marks(axes, steps, columns.nonfinite_losses, TOP, color=INK, marker="x", markersize=4)
        entries.append((marks, f"inf or NaN ({count:,})"))
    loss_axis(axes, [losses])
    step_axis(axes, steps)
    legend_above(axes, entries)


def loss_axis(axes: Axes, columns: list[Floats]) -> None:
    """y for these losses: logarithmic where they span decades."""
    axes.set_ylabel("loss")
    known = np.concatenate(columns)
    known = known[~np.isnan(known)]
    if known.size and known.min() > 1 / LARGEST and known.max() > _WIDE * known.min():
        limits = log_limits([known])
        axes.set_yscale("log")
        axes.set_ylim(limits)
        log_axis(axes.yaxis, limits)
