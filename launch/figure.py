"""The picture of a run: the loss, and the gradient norm before and after clipping."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from step import Step

# From Okabe and Ito's palette, which colour-blind readers can tell apart too.
BEFORE, AFTER = "#D55E00", "#0072B2"
#: A range of more decades than this one is wide.
WIDE = 2.0


def save_figure(steps: Sequence[Step], path: Path, *, title: str, draw_threshold: bool) -> None:
    """Draw `steps` into the PNG file `path`; the threshold too, where it is one that the whole norm is held to."""
    figure = Figure(figsize=(6.4, 5.0), layout="constrained")
    loss_axes, norm_axes = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    loss_axes.set_title(title, loc="left", fontsize=10)
    _draw_loss(loss_axes, steps)
    _draw_norms(norm_axes, steps, draw_threshold=draw_threshold)
    for axes in (loss_axes, norm_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    norm_axes.set_xlim(steps[0].step - 1, steps[-1].step + 1)  # also where the last steps are not finite
    norm_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels()
    figure.savefig(path, dpi=200)


def _draw_loss(axes: Axes, steps: Sequence[Step]) -> None:
    losses = [step.loss for step in steps]
    axes.plot([step.step for step in steps], losses, color="#444444", linewidth=1.4)
    axes.set_ylabel("loss")
    if _decades(losses) > WIDE:
        axes.set_yscale("log")


def _draw_norms(axes: Axes, steps: Sequence[Step], *, draw_threshold: bool) -> None:
    numbers = [step.step for step in steps]
    before, after = [step.total_norm for step in steps], [step.clipped_norm for step in steps]
    axes.fill_between(numbers, after, before, color=BEFORE, alpha=0.15, linewidth=0)
    axes.plot(numbers, before, color=BEFORE, linewidth=1.2, label="before clipping")
    axes.plot(numbers, after, color=AFTER, linewidth=1.2, label="after clipping")
    clipped = [step for step in steps if step.clipped]
    if clipped:
        label = f"clipped ({len(clipped)} of {len(steps)} steps)"
        axes.plot([s.step for s in clipped], [s.total_norm for s in clipped], "o", color=BEFORE, ms=3, label=label)
    if draw_threshold and any(math.isfinite(step.threshold) for step in steps):
        axes.plot(numbers, [step.threshold for step in steps], "--", color="black", linewidth=0.9, label="threshold")
    axes.set_yscale("log")
    if _decades(before + after) <= WIDE:
        # 0.2, 0.5, 1, 2, 5: matplotlib by itself would label the powers of ten, of which there may be one or none.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("step")
    axes.set_ylabel("gradient norm")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)


def _decades(values: Sequence[float]) -> float:
    """How many powers of ten the finite values above 0 span."""
    logs = [math.log10(value) for value in values if 0 < value < math.inf]
    return max(logs) - min(logs) if logs else 0.0
