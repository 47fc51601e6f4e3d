"""The picture of an experiment: its runs' losses on the left, their gradient norms on the right."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from experiment import Outcome

#: Black for no clipping, then of Okabe and Ito's palette, which colour-blind readers can tell apart too.
COLOURS = ("black", "#0072B2", "#D55E00", "#009E73")
DOTS = (0, (1, 1))


def save_curves(
    outcomes: Sequence[Outcome], path: Path, *, loss: str, window: int = 1, log_steps: bool = False
) -> None:
    """Draw `outcomes` into the PNG file `path`.

    Args:
        loss: what the loss is.
        window: over how many steps losses are averaged.
        log_steps: whether the first steps get more room than the last.
    """
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    losses, norms = figure.subplots(1, 2)
    for outcome, colour in zip(outcomes, COLOURS, strict=False):
        steps = outcome.run.steps
        losses.plot(steps, smooth(outcome.run.series("loss"), window), color=colour, linewidth=1.2)
        norms.plot(steps, outcome.run.series("grad_norm"), color=colour, linewidth=0.7)
        if any(record.is_set("clipped") for record in outcome.run.records):
            after = outcome.run.series("grad_norm_clipped")
            norms.plot(steps, after, color=colour, linewidth=1.2, linestyle=DOTS, zorder=3)
        for axes, metric in ((losses, "loss"), (norms, "grad_norm")):
            _mark_end(axes, outcome, metric, colour)
    losses.set_ylabel(loss)
    norms.set_ylabel("gradient norm")
    for axes in (losses, norms):
        _style(axes, outcomes)
        if log_steps:
            axes.set_xscale("log")
            axes.set_xlim(left=1)
            axes.xaxis.set_major_formatter("{x:g}")
    lines = [Line2D([], [], color=colour, label=_label(each)) for each, colour in zip(outcomes, COLOURS, strict=False)]
    _legend(figure, [*lines, Line2D([], [], color="grey", linestyle=DOTS, label="after clipping")])
    figure.savefig(path, dpi=150)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """At every step the mean of the last `window`."""
    windows = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [math.fsum(each) / len(each) for each in windows]


def _style(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 100 * low:
        # 20, 50, 100: matplotlib by itself would label the powers of ten, of which there may be one.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(0, 1.02 * max(outcome.run.steps[-1] for outcome in outcomes))
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)


def _legend(figure: Figure, lines: Sequence[Line2D]) -> None:
    figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), frameon=False, fontsize=8)


def _label(outcome: Outcome) -> str:
    rule = str(outcome.run.info["rule"])
    return "no clipping" if rule == "global_norm=inf" else rule


def _mark_end(axes: Axes, outcome: Outcome, metric: str, colour: str) -> None:
    """A cross where a run died."""
    if outcome.died is None:
        return
    pairs = zip(outcome.run.steps, outcome.run.series(metric), strict=True)
    last = [(step, value) for step, value in pairs if math.isfinite(value)][-1]
    axes.plot(*last, "x", color=colour, markersize=6)
    text = f"NaN at step {outcome.run.steps[-1]}"
    axes.annotate(text, last, xytext=(6, -3), textcoords="offset points", fontsize=8)


def save_comparison(
    outcomes: Sequence[Outcome],
    theirs: Mapping[str, Sequence[float]],
    apart: Mapping[str, Sequence[float]],
    path: Path,
) -> None:
    """Draw, by the names of the runs, what Keras had and how far it is from distclip's `outcomes`, into a PNG file."""
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    losses, distances = figure.subplots(1, 2)
    for outcome, colour in zip(outcomes, COLOURS[1:], strict=True):
        name, steps = outcome.run.name, outcome.run.steps
        losses.plot(steps, outcome.run.series("loss"), color=colour, linewidth=1.2)
        losses.plot(steps[::4], theirs[name][::4], "o", color=colour, markersize=3.5, markerfacecolor="none")
        distances.plot(steps, apart[name], ".", color=colour, markersize=4)
    losses.set_ylabel("mean squared error")
    distances.set_ylabel("relative difference")
    distances.set_ylim(1e-8, 1e-4)
    for axes in (losses, distances):
        _style(axes, outcomes)
    labels = [f"{name} / {outcome.run.info['rule']}" for name, outcome in zip(theirs, outcomes, strict=True)]
    lines = [Line2D([], [], color=colour, label=label) for label, colour in zip(labels, COLOURS[1:], strict=True)]
    dot = Line2D([], [], color="grey", marker="o", linestyle="", markersize=3.5, markerfacecolor="none", label="Keras")
    _legend(figure, [*lines, dot])
    figure.savefig(path, dpi=150)
