"""How often which norms came."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from distclip.plots.columns import Columns, Floats
from distclip.plots.scales import log_axis, log_limits, number
from distclip.plots.style import INK, SKY, VERMILION, legend_above, say
from distclip.runs import Run

PERCENTILES = (50, 90, 99)
_DOTS = ((0, (1, 1)), (0, (3, 1.5)), "-")
_MOST_BINS = 60
# Bins that hold so many times more than others make these vanish on a linear axis.
_UNEVEN = 40


def draw_histogram(axes: Axes, run: Run) -> None:
    """Draw how norms before clipping are distributed, in logarithmic bins, with percentiles and the threshold.

    A threshold that moved is a band from its smallest to its largest value. Counts that differ fortyfold have a
    logarithmic axis, so that single outliers stay visible.

    Args:
        axes: where to.
        run: as ``distclip.runs.read_run`` gives it.
    """
    columns = Columns(run)
    norms = columns.norms[~np.isnan(columns.norms)]
    thresholds = columns.thresholds[~np.isnan(columns.thresholds)] if columns.holds_the_norm else np.array([])
    bins = _bins(norms)
    limits = log_limits([bins, thresholds], room=0.04)
    axes.set_xscale("log")
    axes.set_xlim(limits)
    log_axis(axes.xaxis, limits)
    axes.set_xlabel("gradient norm before clipping")
    axes.set_ylabel("steps")
    if not norms.size:
        say(axes, "no norm is finite and above 0")
        axes.set_yticks([])
        return
    counts, _, _ = axes.hist(norms, bins=bins.tolist(), color=SKY, histtype="stepfilled")
    counts = np.asarray(counts)
    if counts.max() > _UNEVEN * counts[counts > 0].min():
        limits = (0.7, 1.5 * float(counts.max()))
        axes.set_yscale("log")
        axes.set_ylim(limits)
        log_axis(axes.yaxis, limits)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.yaxis.set_major_formatter("{x:,.0f}")
    entries: list[tuple[Artist, str]] = []
    for percentile, dots in zip(PERCENTILES, _DOTS, strict=True):
        at = float(np.percentile(norms, percentile))
        line = axes.axvline(at, color=INK, linewidth=0.9, linestyle=dots, label=f"{percentile} %")
        entries.append((line, f"{percentile} % below {number(float(f'{at:.3g}'))}"))
    entries += _threshold(axes, thresholds)
    legend_above(axes, entries)


def _threshold(axes: Axes, thresholds: Floats) -> list[tuple[Artist, str]]:
    if not thresholds.size:
        return []
    low, high = float(thresholds.min()), float(thresholds.max())
    told = [number(float(f"{value:.3g}")) for value in (low, high)]
    if told[0] == told[1]:
        line = axes.axvline(low, color=VERMILION, linewidth=1.2, linestyle=(0, (4, 1.5)), label="threshold")
        return [(line, f"threshold {told[0]}")]
    band = axes.axvspan(low, high, color=VERMILION, alpha=0.15, linewidth=0, zorder=0.5, label="threshold")
    return [(band, f"threshold {told[0]} to {told[1]}")]


def _bins(norms: Floats) -> Floats:
    """Edges, from the smallest norm to the largest; some around a norm that never changes."""
    low, high = log_limits([norms], room=0.0)
    # An odd number: a norm that never changes is in the middle of one.
    count = min(_MOST_BINS, max(10, math.ceil(2 * math.sqrt(norms.size)))) | 1
    edges = np.geomspace(low, high, count + 1)
    # What rounding leaves outside.
    edges[0], edges[-1] = norms.min(initial=edges[0]), norms.max(initial=edges[-1])
    return np.asarray(edges)
