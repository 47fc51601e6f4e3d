"""Pictures of logged runs: single ones into your own Axes, whole figures, and a report in one HTML file.

Example:
    >>> from distclip.plots import plot, run_figure
    >>> from distclip.runs import read_run
    >>> run = read_run("run.jsonl")  # doctest: +SKIP
    >>> plot([run], "run.html")  # doctest: +SKIP
    >>> run_figure(run, title="").savefig("figure2.pdf")  # doctest: +SKIP
"""
# ruff: noqa: E402 - the check comes before anything here imports matplotlib, so that the error names the extra.

from distclip.hints import optional

optional("matplotlib", "plot")

from distclip.plots.comparison import draw_losses, draw_norms_of_runs, draw_shares
from distclip.plots.figures import comparison_figure, run_figure
from distclip.plots.heatmap import draw_modules
from distclip.plots.histogram import draw_histogram
from distclip.plots.loss import draw_loss
from distclip.plots.norms import draw_norms
from distclip.plots.save import plot
from distclip.plots.share import draw_clipped_share

__all__ = [
    "comparison_figure",
    "draw_clipped_share",
    "draw_histogram",
    "draw_loss",
    "draw_losses",
    "draw_modules",
    "draw_norms",
    "draw_norms_of_runs",
    "draw_shares",
    "plot",
    "run_figure",
]
