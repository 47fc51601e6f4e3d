"""Whole figures: all there is to see of a run, and runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distclip.plots.columns import Columns
from distclip.plots.comparison import draw_losses, draw_norms_of_runs, draw_shares
from distclip.plots.heatmap import draw_modules, has_details, modules_of
from distclip.plots.histogram import draw_histogram
from distclip.plots.loss import draw_loss
from distclip.plots.norms import draw_norms
from distclip.plots.share import draw_clipped_share
from distclip.plots.style import WIDTH, paper, plain
from distclip.runs import Run

# What draws, and how many inches high.
Panel = tuple[Callable[[Axes], None], float]


def run_figure(run: Run, *, title: str | None = None) -> Figure:
    """Everything about one run, as wide as a page: norms, loss, share of clipped steps, modules, histogram.

    Pictures for which the log has nothing (no loss, no single tensors) are left out.

    Args:
        run: as ``distclip.runs.read_run`` gives it.
        title: None for the run's name and rule, "" for none.

    Example:
        >>> from pathlib import Path
        >>> from distclip.record import Record
        >>> run = Run(Path("a.jsonl"), {}, (Record(1, 0.0, {"grad_norm": 2.0}),), ())
        >>> [axes.get_ylabel().split("\\n")[0] for axes in run_figure(run).axes]
        ['gradient norm', 'share clipped', 'steps']
    """
    panels: list[Panel] = [(partial(draw_norms, run=run), 2.3)]
    if not np.isnan(Columns(run).losses).all():
        panels.append((partial(draw_loss, run=run), 1.5))
    panels.append((partial(draw_clipped_share, run=run), 1.1))
    if has_details(run):
        panels.append((partial(draw_modules, run=run), heatmap_height(run)))
    return _stack(panels, (partial(draw_histogram, run=run), 1.7), title_of(run) if title is None else title)


def comparison_figure(runs: Sequence[Run], *, title: str | None = None) -> Figure:
    """Losses, norms before clipping and shares of clipped steps of several runs, as wide as a page.

    Args:
        runs: as ``distclip.runs.read_run`` gives them; at least one.
        title: None or "" for none.

    Raises:
        ValueError: there are no runs.
    """
    if not runs:
        raise ValueError("a comparison needs at least one run, got none")
    pictures: list[tuple[Callable[..., None], float]] = [(draw_norms_of_runs, 2.3), (draw_shares, 1.3)]
    if any(not np.isnan(Columns(run).losses).all() for run in runs):
        pictures.insert(0, (draw_losses, 1.9))
    # One legend is enough: the upper picture's.
    panels = [(partial(draw, runs=runs, legend=not place), height) for place, (draw, height) in enumerate(pictures)]
    return _stack(panels, None, title or "")


def title_of(run: Run) -> str:
    """A run's name, and its rule where the log tells."""
    rule = str(run.info.get("rule", ""))
    return f"{run.name}, rule {rule}" if rule else run.name


def heatmap_height(run: Run) -> float:
    """Inches that its rows take."""
    rows = len(modules_of(run).names)
    return 0.6 + (0.14 if rows <= 16 else 0.115) * rows


def single(draw: Callable[[Axes], None], width: float, height: float) -> Figure:
    """One picture as a figure."""
    with paper():
        figure = Figure(figsize=(width, height))
        draw(figure.subplots())
    return figure


def _stack(over_steps: Sequence[Panel], last: Panel | None, title: str) -> Figure:
    """Pictures over one another: those over steps share their axis."""
    panels = [*over_steps, last] if last else list(over_steps)
    heights = [height for _, height in panels]
    with paper():
        figure = Figure(figsize=(WIDTH, sum(heights) + (0.35 if title else 0.1)))
        every = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axes, (draw, _) in zip(every, panels, strict=True):
            draw(axes)
        steps = every[: len(over_steps)]
        for axes in steps[1:]:
            axes.sharex(steps[0])
        for axes in steps[:-1]:
            axes.set_xlabel("")
            axes.tick_params(axis="x", labelbottom=False)
        figure.align_ylabels([axes for axes in every if axes.get_ylabel()])
        if title:
            figure.suptitle(plain(title, 100), parse_math=False)
    return figure
