"""How large a share of the steps was clipped, and how that changed."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from distclip.plots.columns import Columns, Flags, Floats
from distclip.plots.scales import percent_axis, step_axis
from distclip.plots.style import ORANGE, PURPLE, legend_above
from distclip.plots.trace import draw_trace
from distclip.runs import Run

_WINDOW = 100


def draw_clipped_share(axes: Axes, run: Run, *, window: int | None = None) -> None:
    """Draw the share of the last ``window`` steps that were clipped, and of those that were skipped if any were.

    Args:
        axes: where to.
        run: as ``distclip.runs.read_run`` gives it.
        window: how many steps to look back on; fewer at the beginning, but a fifth at least. None: 100, or 1 % of a
            longer run.

    Raises:
        ValueError: ``window`` is below 1.
    """
    columns = Columns(run)
    window = _window(len(run.records)) if window is None else window
    clipped, skipped = moving_share(columns.clipped, window), moving_share(columns.skipped, window)
    line = draw_trace(axes, columns.steps, clipped, color=ORANGE, label="clipped")
    axes.fill_between(*line.get_data(), color=ORANGE, alpha=0.2, linewidth=0)
    entries = [(line, "clipped")]
    if columns.skipped.any():
        look = {"color": PURPLE, "linestyle": (0, (4, 1.5)), "label": "skipped"}
        entries.append((draw_trace(axes, columns.steps, skipped, **look), "skipped"))
    percent_axis(axes, float(np.nanmax([clipped, skipped])))
    axes.set_ylabel(share_label(window))
    step_axis(axes, columns.steps)
    legend_above(axes, entries if len(entries) > 1 else [])


def moving_share(flags: Flags, window: int) -> Floats:
    """At each step, the share of the last ``window`` that are set; of all so far where these are fewer.

    NaN as long as these are not a fifth of ``window``, or of all: the share of one step is 0 or 1.

    Raises:
        ValueError: ``window`` is below 1.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    sums = np.concatenate([[0], np.cumsum(flags)])
    ends = np.arange(1, len(flags) + 1)
    starts = np.maximum(ends - window, 0)
    share = (sums[ends] - sums[starts]) / (ends - starts)
    share[: min(window, len(flags)) // 5] = np.nan
    return np.asarray(share)


def share_label(window: int) -> str:
    """What the y axis shows."""
    return f"share clipped\n(last {window:,} step{'s' * (window > 1)})"


def _window(steps: int) -> int:
    return max(1, min(steps, max(_WINDOW, steps // 100)))
