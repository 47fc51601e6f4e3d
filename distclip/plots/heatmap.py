"""Norms of modules over time, as colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.patches import Patch

from distclip.plots.columns import LARGEST, Flags, Floats, positive
from distclip.plots.scales import log_axis, log_limits, step_axis
from distclip.plots.style import VERMILION, legend_above, plain, say
from distclip.runs import Run

ROWS = 32
_COLUMNS = 400
_LONGEST_NAME = 28


@dataclass(frozen=True)
class Modules:
    """Norms of modules, a row each, in the steps that measured them, a column each. NaN: not measured."""

    names: tuple[str, ...]
    steps: Floats
    norms: Floats


def has_details(run: Run) -> bool:
    """Whether any step measured single tensors."""
    return any(record.per_tensor for record in run.records)


def modules_of(run: Run, rows: int = ROWS) -> Modules:
    """L2 norms of modules, at the greatest depth at which these are not more than ``rows``.

    Where even the modules at the top are more, those with the largest norms stay, and all others make up one row.

    Raises:
        ValueError: no step measured single tensors, or ``rows`` is below 2.
    """
    if rows < 2:
        raise ValueError(f"rows must be at least 2, got {rows}")
    records = [record for record in run.records if record.per_tensor]
    if not records:
        raise ValueError(
            f"{run.path}: no step measured single tensors: log with GradClipper(..., details_every=1), or as often as "
            "they are wanted"
        )
    tensors = list(dict.fromkeys(name for record in records for name in record.per_tensor or ()))
    row_of = _rows_of(tensors, rows)
    names = tuple(dict.fromkeys(row_of.values()))
    norms = _norms([record.per_tensor or {} for record in records], row_of, names)
    if len(names) > rows:
        names, norms = _largest(names, norms, rows)
    return Modules(names, np.array([min(record.step, 2**53) for record in records], dtype=np.float64), norms)


def draw_modules(axes: Axes, run: Run, *, rows: int = ROWS) -> None:
    """Draw a map of norms: modules downwards, steps to the right, the logarithm of the norm as colour.

    Args:
        axes: where to; a bar of colours is put next to them.
        run: as ``distclip.runs.read_run`` gives it, with steps that measured single tensors
            (``GradClipper(details_every=...)``).
        rows: the most rows; modules are put together until they fit.

    Raises:
        ValueError: no step measured single tensors, or ``rows`` is below 2.
    """
    found = modules_of(run, rows)
    steps, norms, broken = _thinned(found)
    edges = _edges(steps)
    heights = np.arange(len(found.names) + 1)
    shown = positive(norms)
    # The extreme percent at both ends has the colours of its neighbours: one spike would take all contrast away.
    known = shown[~np.isnan(shown)]
    limits = log_limits([np.percentile(known, [0.5, 99.5]) if known.size else known], room=0.0)
    cells = np.ma.masked_invalid(shown)
    mesh = axes.pcolormesh(edges, heights, cells, cmap="viridis", norm=LogNorm(*limits), rasterized=True)
    if not known.size:
        say(axes, "no norm is finite and above 0")
    if broken.any():
        marked = np.ma.masked_where(~broken, np.ones_like(norms))
        axes.pcolormesh(edges, heights, marked, cmap=ListedColormap([VERMILION]), rasterized=True)
        legend_above(axes, [(Patch(color=VERMILION), "inf or NaN")])
    axes.set_yticks(heights[:-1] + 0.5, [plain(name, _LONGEST_NAME) for name in found.names])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.tick_params(axis="y", length=0, labelsize=7 if len(found.names) <= 16 else 6)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_ylim(len(found.names), 0)
    step_axis(axes, found.steps)
    figure = axes.get_figure(root=True)
    assert figure is not None
    below, above = bool((known < limits[0]).any()), bool((known > limits[1]).any())
    extend = {(True, True): "both", (True, False): "min", (False, True): "max", (False, False): "neither"}[below, above]
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, fraction=0.04, aspect=25, extend=extend, label="gradient norm")
    log_axis(bar.ax.yaxis, limits)
    bar.outline.set_visible(False)
    bar.solids.set_rasterized(True)  # type: ignore[union-attr]


def _rows_of(tensors: Sequence[str], rows: int) -> dict[str, str]:
    """The row of each tensor: its module, as deep as there is room for."""
    # The last part of a tensor's name is no module (weight, bias), unless there is nothing else.
    modules = {name: name.rpartition(".")[0] or name for name in tensors}
    deepest = max(name.count(".") + 1 for name in modules.values())

    def at(depth: int) -> dict[str, str]:
        return {name: ".".join(module.split(".")[:depth]) for name, module in modules.items()}

    fitting = (found for depth in range(deepest, 0, -1) if len(set((found := at(depth)).values())) <= rows)
    return next(fitting, at(1))


def _norms(measured: Sequence[Mapping[str, float]], row_of: dict[str, str], names: Sequence[str]) -> Floats:
    place = {name: row for row, name in enumerate(names)}
    norms = np.full((len(names), len(measured)), np.nan)
    for column, tensors in enumerate(measured):
        parts: dict[int, list[float]] = {}
        for name, norm in tensors.items():
            parts.setdefault(place[row_of[name]], []).append(norm)
        for row, values in parts.items():
            # A NaN next to an inf is an inf for hypot; both are shown alike. Not measured is what has no entry.
            norms[row, column] = min(math.hypot(*values), LARGEST) if all(map(math.isfinite, values)) else math.inf
    return norms


def _largest(names: tuple[str, ...], norms: Floats, rows: int) -> tuple[tuple[str, ...], Floats]:
    finite = np.where(np.isfinite(norms), norms, 0.0)
    kept = np.sort(np.argsort(-finite.max(axis=1), kind="stable")[: rows - 1])
    others = np.setdiff1d(np.arange(len(names)), kept)
    rest = norms[others]
    together = np.where(np.isnan(rest).all(axis=0), np.nan, np.hypot.reduce(np.nan_to_num(rest, posinf=np.inf), axis=0))
    told = (*(names[row] for row in kept), f"({len(others)} others)")
    return told, np.vstack([norms[kept], together])


def _thinned(found: Modules) -> tuple[Floats, Floats, Flags]:
    """Columns of a long run put together: the largest norm of each, and where an inf or NaN was."""
    broken = np.isinf(found.norms)
    parts = np.array_split(np.arange(len(found.steps)), min(_COLUMNS, len(found.steps)))
    finite = np.where(broken, np.nan, found.norms)
    norms = np.stack([np.fmax.reduce(finite[:, part], axis=1) for part in parts], axis=1)
    steps = np.array([found.steps[part].mean() for part in parts])
    return steps, norms, np.stack([broken[:, part].any(axis=1) for part in parts], axis=1)


def _edges(steps: Floats) -> Floats:
    """Between neighbours in the middle; the first and last column are as wide as the one next to them."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])
