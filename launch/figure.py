"""The picture of a run: the loss, and the gradient norm before and after clipping."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from step import Step

# Okabe and Ito's colours, which colour-blind readers can tell apart too.
BEFORE, AFTER, THRESHOLD = "#D55E00", "#0072B2", "#000000"


def save_figure(steps: Sequence[Step], path: Path, *, title: str) -> None:
    """Draw `steps` into the PNG file `path`."""
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    loss, norm = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    figure.suptitle(title, fontsize=11)
    _draw_loss(loss, steps)
    _draw_norms(norm, steps)
    for axes in (loss, norm):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    figure.savefig(path, dpi=200)


def _draw_loss(axes: Axes, steps: Sequence[Step]) -> None:
    axes.plot([step.step for step in steps], [step.loss for step in steps], color="#444444", linewidth=1.4)
    axes.set_ylabel("loss")


def _draw_norms(axes: Axes, steps: Sequence[Step]) -> None:
    numbers = [step.step for step in steps]
    before, after = [step.total_norm for step in steps], [step.clipped_norm for step in steps]
    clipped = [step for step in steps if step.clipped]
    axes.fill_between(numbers, after, before, color=BEFORE, alpha=0.15, linewidth=0)
    axes.plot(numbers, before, color=BEFORE, linewidth=1.2, label="before clipping")
    axes.plot(numbers, after, color=AFTER, linewidth=1.2, label="after clipping")
    axes.plot(
        [step.step for step in clipped],
        [step.total_norm for step in clipped],
        "o",
        color=BEFORE,
        markersize=3,
        label=f"clipped ({len(clipped)} of {len(steps)} steps)",
    )
    axes.plot(numbers, [step.threshold for step in steps], "--", color=THRESHOLD, linewidth=0.9, label="threshold")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("gradient norm")
    axes.legend(frameon=False, fontsize=8, ncols=2)
