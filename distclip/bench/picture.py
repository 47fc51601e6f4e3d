"""The ratios in a picture: a bar for each case, and where a plain read and the target lie."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from distclip.bench.machine import told
from distclip.bench.measure import Row
from distclip.bench.run import Results
from distclip.bench.table import label
from distclip.hints import optional

_SUFFIXES = (".png", ".svg")
# Inches: of a bar, and of what is above and below them.
_BAR, _REST = 0.24, 1.15


def checked_picture(out: str | os.PathLike[str]) -> Path:
    """Where a picture may go; asked before minutes of measuring.

    Raises:
        ValueError: another suffix.
        ImportError: matplotlib is not installed.
    """
    path = Path(out)
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"--plot must end in {' or '.join(_SUFFIXES)}, got {str(path)!r}")
    optional("matplotlib", "plot")
    return path


def draw(results: Results, out: str | os.PathLike[str]) -> Path:
    """Draw what came out into a file; its folder is made.

    Raises:
        ValueError: another suffix, or ``out`` cannot be written.
    """
    path = checked_picture(out)
    from distclip.plots.save import figure_bytes, written

    return written(path, figure_bytes(bench_figure(results), path.suffix.lower()))


def bench_figure(results: Results) -> Any:
    """A matplotlib figure as wide as a page: distclip's time over torch's, case by case.

    Cases that torch has no way for are left out: they have no ratio.
    """
    from matplotlib.figure import Figure

    from distclip.plots.style import BLUE, INK, VERMILION, WIDTH, paper, say

    rows = [row for row in results.rows if row.ratio is not None]
    with paper(**{"axes.grid.axis": "x"}):
        figure = Figure(figsize=(WIDTH, _REST + _BAR * max(len(rows), 2)))
        axes = figure.subplots()
        if not rows:
            say(axes, "torch has no way for any of these cases")
            return figure
        places = range(len(rows))
        found = [row.ratio or 0.0 for row in rows]
        bars = axes.barh(places, found, height=0.62, color=BLUE, alpha=0.75)
        entries: list[tuple[Any, str]] = [(bars, "distclip")]
        one = axes.axvline(1.0, color=INK, linewidth=0.8)
        entries.append((one, "torch's documented way"))
        reads = [_read(row) for row in rows]
        (mark,) = axes.plot(reads, places, linestyle="none", marker="|", markersize=11, markeredgewidth=1.6, color=INK)
        entries.append((mark, "a read of the gradients"))
        aims = [(aim, place) for place, row in enumerate(rows) if (aim := _aim(row)) is not None]
        if aims:
            (aim_mark,) = axes.plot(
                *zip(*aims, strict=True), linestyle="none", marker="D", markersize=4, color=VERMILION
            )
            entries.append((aim_mark, "target"))
        right = max(1.0, *found, *(aim for aim, _ in aims)) * 1.05
        for place, value in zip(places, found, strict=True):
            axes.text(1.01, place, f"{value:.2f}", transform=axes.get_yaxis_transform(), va="center")
        axes.set_xlim(0, right)
        axes.set_yticks(places, [label(row.case) for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlabel(f"time, as a multiple of torch's\n{told(results.machine)}", fontsize=7)
        figure.legend(
            [artist for artist, _ in entries],
            [text for _, text in entries],
            loc="outside upper center",
            ncols=len(entries),
            handlelength=1.4,
            columnspacing=1.4,
        )
    return figure


def _read(row: Row) -> float:
    """A plain read's time over torch's."""
    assert row.torch_seconds is not None
    return row.limit_seconds / max(row.torch_seconds - (row.step_seconds or 0.0), 1e-9)


def _aim(row: Row) -> float | None:
    target = row.case.target
    if target is None:
        return None
    return target.most if target.of == "torch" else target.most * _read(row)
