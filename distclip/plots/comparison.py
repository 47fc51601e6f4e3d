"""Several runs in the same axes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from distclip.plots.columns import Columns, Flags, Floats, medians
from distclip.plots.loss import loss_axis
from distclip.plots.scales import log_axis, log_limits, percent_axis, step_axis
from distclip.plots.share import moving_share, share_label
from distclip.plots.style import CYCLE, DASHES, legend_above, plain, say
from distclip.plots.trace import TOP, draw_edge_marks, draw_trace
from distclip.runs import Run

# From so many steps on, a line is drawn faintly and its running median strongly.
_NOISY = 400
_WINDOW = 100


def names_of(runs: Sequence[Run]) -> list[str]:
    """What to call the runs: the path of those whose names are the same."""
    count = Counter(run.name for run in runs)
    return [run.name if count[run.name] == 1 else str(run.path) for run in runs]


def draw_losses(axes: Axes, runs: Sequence[Run], *, legend: bool = True) -> None:
    """Draw the losses of several runs, with crosses at the upper edge where one is inf or NaN.

    Args:
        axes: where to.
        runs: as ``distclip.runs.read_run`` gives them.
        legend: whether to name the runs.
    """
    every = [Columns(run) for run in runs]
    entries = _draw(axes, runs, lambda columns: columns.losses, lambda columns: columns.nonfinite_losses)
    if not any((~np.isnan(columns.losses)).any() for columns in every):
        say(axes, "no loss was logged")
    loss_axis(axes, [columns.losses for columns in every])
    _finish(axes, every, entries if legend else [])


def draw_norms_of_runs(axes: Axes, runs: Sequence[Run], *, legend: bool = True) -> None:
    """Draw the norms before clipping of several runs, with crosses at the upper edge where one is inf or NaN.

    Args:
        axes: where to.
        runs: as ``distclip.runs.read_run`` gives them.
        legend: whether to name the runs.
    """
    every = [Columns(run) for run in runs]
    limits = log_limits([columns.norms for columns in every])
    axes.set_yscale("log")
    entries = _draw(axes, runs, lambda columns: columns.norms, lambda columns: columns.nonfinite)
    axes.set_ylim(limits)
    log_axis(axes.yaxis, limits)
    axes.set_ylabel("gradient norm\nbefore clipping")
    _finish(axes, every, entries if legend else [])


def draw_shares(axes: Axes, runs: Sequence[Run], *, window: int = _WINDOW, legend: bool = True) -> None:
    """Draw what share of the last ``window`` steps was clipped in several runs.

    Args:
        axes: where to.
        runs: as ``distclip.runs.read_run`` gives them.
        window: how many steps to look back on; fewer at the beginning, but a fifth at least.
        legend: whether to name the runs.

    Raises:
        ValueError: ``window`` is below 1.
    """
    every = [Columns(run) for run in runs]
    shares = [moving_share(columns.clipped, window) for columns in every]
    entries: list[tuple[Artist, str]] = []
    for place, (columns, share, name) in enumerate(zip(every, shares, names_of(runs), strict=True)):
        entries.append((draw_trace(axes, columns.steps, share, label=name, **_look(place)), plain(name)))
    percent_axis(axes, max(float(np.nanmax(share)) for share in shares))
    axes.set_ylabel(share_label(window))
    _finish(axes, every, entries if legend else [])


def _draw(
    axes: Axes, runs: Sequence[Run], values: Callable[[Columns], Floats], broken: Callable[[Columns], Flags]
) -> list[tuple[Artist, str]]:
    entries: list[tuple[Artist, str]] = []
    for place, (run, name) in enumerate(zip(runs, names_of(runs), strict=True)):
        columns, look = Columns(run), _look(place)
        column = values(columns)
        if len(column) > _NOISY:
            draw_trace(axes, columns.steps, column, color=look["color"], alpha=0.25, linewidth=0.6)
            (line,) = axes.plot(*medians(columns.steps, column, min(200, len(column) // 10)), label=name, **look)
        else:
            line = draw_trace(axes, columns.steps, column, label=name, **look)
        if broken(columns).any():
            draw_edge_marks(axes, columns.steps, broken(columns), TOP, color=look["color"], marker="x", markersize=4)
        entries.append((line, plain(name)))
    return entries


def _finish(axes: Axes, every: Sequence[Columns], entries: list[tuple[Artist, str]]) -> None:
    ends = np.concatenate([columns.steps[[0, -1]] for columns in every])
    step_axis(axes, np.sort(ends))
    legend_above(axes, entries)


def _look(place: int) -> dict[str, Any]:
    return {"color": CYCLE[place % len(CYCLE)], "linestyle": DASHES[place // len(CYCLE) % len(DASHES)]}
