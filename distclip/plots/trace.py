"""A column over steps: a line with gaps where it has no value, and marks at steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from distclip.plots.columns import Flags, Floats, thinned, thinned_flags

# Where marks at the upper and the lower edge are, as a share of the height.
TOP, BOTTOM = 0.96, 0.025


def draw_trace(axes: Axes, steps: Floats, values: Floats, **look: Any) -> Line2D:
    """A line through all values of a short column; of a long one, through the smallest and largest of each stretch.

    What stands alone between gaps is a dot.
    """
    shown = thinned(values)
    gaps = np.cumsum(np.isnan(values))
    broken = 1 + np.nonzero(np.diff(gaps[shown]) > 0)[0]
    x, y = np.insert(steps[shown], broken, np.nan), np.insert(values[shown], broken, np.nan)
    if len(shown) == len(values):
        # Every gap is there itself.
        x, y = steps, values
    (line,) = axes.plot(x, y, **look)
    alone = _alone(y)
    if alone:
        line.set_marker(".")
        line.set_markersize(3)
        line.set_markevery(alone)
    return line


def draw_edge_marks(axes: Axes, steps: Floats, flags: Flags, height: float, **look: Any) -> Line2D:
    """A mark at every flagged step, at a height between 0 and 1 whatever the y axis."""
    at = steps[thinned_flags(flags)]
    (marks,) = axes.plot(
        at, np.full(len(at), height), linestyle="none", transform=axes.get_xaxis_transform(), clip_on=False, **look
    )
    return marks


def _alone(values: Floats) -> list[int]:
    known = np.concatenate([[False], ~np.isnan(values), [False]])
    return np.nonzero(known[1:-1] & ~known[:-2] & ~known[2:])[0].tolist()
