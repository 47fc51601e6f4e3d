"""Axes for steps, and for norms, which span decades."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from distclip.plots.columns import Floats

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Within this factor a run is flat.
_FLAT = 1.5
# Up to so many powers of ten, ticks are at 1, 2 and 5.
_DECADES = 2.7


def step_axis(axes: Axes, steps: Floats) -> None:
    """x from the first step to the last."""
    first, last = float(steps[0]), float(steps[-1])
    room = max(0.5, 0.01 * (last - first), 1e-9 * last)
    axes.set_xlim(first - room, last + room)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def log_limits(columns: Sequence[Floats], room: float = 0.08) -> tuple[float, float]:
    """Limits for all finite values of columns on a logarithmic axis, a share of ``room`` more at both ends."""
    known = np.concatenate([*columns, np.array([])])
    known = known[~np.isnan(known)]
    low, high = (math.log10(known.min()), math.log10(known.max())) if known.size else (0.0, 0.0)
    missing = max(0.0, math.log10(_FLAT) - (high - low)) / 2
    low, high = low - missing, high + missing
    more = room * (high - low)
    return 10 ** (low - more), 10 ** (high + more)


def log_axis(axis: Axis, limits: tuple[float, float]) -> None:
    """Ticks of a logarithmic axis with these limits. matplotlib's own may be one, or none, below two decades."""
    decades = math.log10(limits[1] / limits[0])
    if decades < 0.6:
        axis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < _DECADES else (1,), numticks=7))
    if decades < _DECADES or decades > 8:
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_minor_locator(LogLocator(subs="auto", numticks=12))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def percent_axis(axes: Axes, largest: float) -> None:
    """y from 0 to a bit above the largest share."""
    top = min(1.0, max(0.05, 1.15 * largest))
    axes.set_ylim(-0.03 * top, 1.04 * top)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))


def number(value: float) -> str:
    """0.002, 50, 10⁻⁵, or 2 times 10⁶: without TeX, so that it is text in every file."""
    if not 0 < abs(value) < math.inf:
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(value)) + 1e-12)
    if -4 < exponent < 4:
        return f"{float(f'{value:.4g}'):g}"
    head = f"{value / 10**exponent:.3g}"
    power = f"10{str(exponent).translate(_SUPERSCRIPTS)}"
    return power if head == "1" else f"{head}\N{MULTIPLICATION SIGN}{power}"
