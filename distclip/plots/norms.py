"""The global gradient norm before and after clipping, and what was clipped."""

from __future__ import annotations

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from distclip.plots.columns import Columns, Floats, is_long, medians, thinned_flags
from distclip.plots.scales import log_axis, log_limits, step_axis
from distclip.plots.style import BLUE, INK, ORANGE, PURPLE, SKY, VERMILION, legend_above, say
from distclip.plots.trace import BOTTOM, TOP, draw_edge_marks, draw_trace
from distclip.runs import Run

Entry = tuple[Artist, str]


def draw_norms(axes: Axes, run: Run) -> None:
    """Draw the norm before and after clipping, the threshold, and marks at steps that were clipped or went wrong.

    Ticks at the lower edge are clipped steps; triangles, at their norms, steps that were skipped; crosses at the upper
    edge, steps whose gradients held an inf or NaN. A threshold is drawn where it is one for the global norm.

    Args:
        axes: where to.
        run: as ``distclip.runs.read_run`` gives it.
    """
    columns = Columns(run)
    if np.isnan(columns.norms).all():
        say(axes, "no norm is finite and above 0")
        entries, limits = [], log_limits([])
    else:
        entries, limits = _lines(axes, columns), log_limits(_shown(columns), room=0.1)
    axes.set_yscale("log")
    axes.set_ylim(limits)
    log_axis(axes.yaxis, limits)
    entries += _marks(axes, columns, limits)
    axes.set_ylabel("gradient norm")
    step_axis(axes, columns.steps)
    legend_above(axes, entries)


def _shown(columns: Columns) -> list[Floats]:
    return [columns.norms, columns.clipped_norms, *([columns.thresholds] if columns.holds_the_norm else [])]


def _lines(axes: Axes, columns: Columns) -> list[Entry]:
    steps, touched = columns.steps, columns.clipped.any() or columns.skipped.any()
    look = {"linewidth": 0.9, "label": "before clipping"}
    before = draw_trace(axes, steps, columns.norms, color=SKY if touched else BLUE, **look)
    entries: list[Entry] = [(before, "before clipping" if touched else "never clipped")]
    if touched and not np.isnan(columns.clipped_norms).all():
        after = draw_trace(axes, steps, columns.clipped_norms, color=BLUE, linewidth=0.9, label="after clipping")
        entries.append((after, "after clipping"))
    if is_long(columns.norms):
        (middle,) = axes.plot(*medians(steps, columns.norms), color=INK, linewidth=0.9, label="running median")
        entries.append((middle, "median before"))
    if np.isnan(columns.thresholds).all():
        return entries
    if not columns.holds_the_norm:
        return [*entries, (Line2D([], [], linestyle="none"), "threshold: not of this norm")]
    look = {"color": VERMILION, "linewidth": 1.0, "linestyle": (0, (4, 1.5)), "label": "threshold"}
    return [*entries, (draw_trace(axes, steps, columns.thresholds, **look), "threshold")]


def _marks(axes: Axes, columns: Columns, limits: tuple[float, float]) -> list[Entry]:
    steps, found = columns.steps, []
    zero = np.array([record.norm == 0 for record in columns.run.records])
    if columns.clipped.any():
        look = {"color": ORANGE, "marker": "|", "markersize": 5, "markeredgewidth": 0.8, "label": "clipped"}
        found.append((draw_edge_marks(axes, steps, columns.clipped, BOTTOM, **look), columns.clipped, "clipped"))
    if zero.any():
        look = {"color": INK, "marker": "_", "markersize": 4, "label": "norm 0"}
        found.append((draw_edge_marks(axes, steps, zero, BOTTOM, **look), zero, "norm 0"))
    if columns.skipped.any():
        places = thinned_flags(columns.skipped)
        # One whose norm is no number stands at the upper edge.
        top = limits[0] * (limits[1] / limits[0]) ** TOP
        heights = np.where(np.isnan(columns.norms[places]), top, columns.norms[places])
        (marks,) = axes.plot(
            steps[places], heights, linestyle="none", color=PURPLE, marker="v", markersize=5, label="skipped"
        )
        found.append((marks, columns.skipped, "skipped"))
    if columns.nonfinite.any():
        look = {"color": INK, "marker": "x", "markersize": 4, "label": "inf or NaN"}
        found.append((draw_edge_marks(axes, steps, columns.nonfinite, TOP, **look), columns.nonfinite, "inf or NaN"))
    return [(artist, f"{label} ({int(flags.sum()):,})") for artist, flags, label in found]
