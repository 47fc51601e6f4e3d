"""launch/scale.py's timings as four constants, and as a picture."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from distclip.plots.save import png_bytes
from distclip.plots.style import BLUE, SKY, VERMILION, WIDTH, paper
from scale_ranks import Case, Timing

COLOURS = {"distclip": BLUE, "distclip, clipping": SKY, "torch": VERMILION}


@dataclass(frozen=True)
class Fit:
    """``seconds = start + tensor * tensors + byte * bytes + doubling * log2(ranks)``, tensors and bytes of one rank."""

    way: str
    constants: tuple[float, float, float, float]
    errors: tuple[float, float, float, float]
    """Standard errors of these."""
    off: float
    """By how much of a timing the fit is off; the median."""

    def seconds(self, case: Case) -> float:
        return sum(map(math.prod, zip(self.constants, terms(case), strict=True)))


def terms(case: Case) -> tuple[float, float, float, float]:
    """What the constants are multiplied by."""
    return 1.0, case.tensors, case.nbytes, math.log2(case.ranks)


def fitted(timings: Sequence[Timing], way: str) -> Fit:
    """Least squares of the relative errors: timings span four decades, and the long ones would drown the others."""
    mine = [timing for timing in timings if timing.way == way]
    seconds = np.array([timing.seconds for timing in mine])
    rows = np.array([terms(timing.case) for timing in mine]) / seconds[:, None]
    # Columns of one size, or those of bytes would be lost to rounding.
    size = np.linalg.norm(rows, axis=0)
    scaled = rows / size
    solution, *_ = np.linalg.lstsq(scaled, np.ones(len(mine)))
    residuals = scaled @ solution - 1.0
    variance = float(residuals @ residuals) / max(1, len(mine) - 4)
    errors = np.sqrt(variance * np.diag(np.linalg.inv(scaled.T @ scaled))) / size
    a, b, c, d = (solution / size).tolist()
    e, f, g, h = errors.tolist()
    return Fit(way, (a, b, c, d), (e, f, g, h), median(np.abs(residuals).tolist()))


def save_picture(timings: Sequence[Timing], fits: Sequence[Fit], sweeps: Sequence[Sequence[Case]], path: Path) -> None:
    """Draw timings (dots) and fits (lines) against ranks, tensors and bytes into a PNG."""
    across: list[tuple[str, Callable[[Case], float]]] = [
        ("ranks", lambda case: case.ranks),
        ("tensors", lambda case: case.tensors),
        ("MiB of a rank's gradients", lambda case: case.nbytes / 2**20),
    ]
    with paper():
        figure = Figure(figsize=(WIDTH, 2.5))
        panels = figure.subplots(1, 3)
        for axes, sweep, (label, size) in zip(panels, sweeps, across, strict=True):
            entries = _draw(axes, timings, fits, sweep, size)
            axes.set_xscale("log", base=2 if label == "ranks" else 10)
            axes.set_yscale("log")
            axes.set_xlabel(label)
            for axis in (axes.xaxis, axes.yaxis):
                # The style shows no powers as such: names of runs may hold dollar signs.
                axis.set_major_formatter("{x:,g}")
                axis.set_minor_formatter(NullFormatter())
        panels[0].set_xticks([case.ranks for case in sweeps[0]], [str(case.ranks) for case in sweeps[0]])
        panels[0].set_ylabel("ms a clip")
        figure.legend([dots for dots, _ in entries], [way for _, way in entries], loc="outside upper left", ncols=3)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_bytes(figure))


def _draw(
    axes: Axes, timings: Sequence[Timing], fits: Sequence[Fit], sweep: Sequence[Case], size: Callable[[Case], float]
) -> list[tuple[Artist, str]]:
    entries: list[tuple[Artist, str]] = []
    for fit in fits:
        mine = {timing.case: 1e3 * timing.seconds for timing in timings if timing.way == fit.way}
        cases = [case for case in sweep if case in mine]
        sizes = [size(case) for case in cases]
        axes.plot(sizes, [1e3 * fit.seconds(case) for case in cases], color=COLOURS[fit.way])
        (dots,) = axes.plot(sizes, [mine[case] for case in cases], "o", ms=3, color=COLOURS[fit.way])
        entries.append((dots, fit.way))
    return entries
