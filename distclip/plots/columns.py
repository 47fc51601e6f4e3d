"""A run as columns of numbers, and which points of a long column a picture needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from distclip.runs import Run

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Places = NDArray[np.intp]

# More points than a page is wide help nobody: from here on, only the smallest and the largest of each stretch is drawn.
_POINTS = 2000
_MARKS = 500
# Axes cannot span more than floats do.
LARGEST = 1e100
# The last integer up to which floats count exactly.
_LAST_STEP = 2**53


@dataclass(frozen=True)
class Columns:
    """What pictures show of a run."""

    run: Run

    @cached_property
    def steps(self) -> Floats:
        return np.array([min(step, _LAST_STEP) for step in self.run.steps], dtype=np.float64)

    @cached_property
    def norms(self) -> Floats:
        """Before clipping; NaN where the norm is not finite, 0, or unknown: what a logarithmic axis cannot show."""
        return positive(self.run.series("grad_norm"))

    @cached_property
    def clipped_norms(self) -> Floats:
        """After clipping, likewise."""
        return positive(self.run.series("grad_norm_clipped"))

    @cached_property
    def thresholds(self) -> Floats:
        """NaN where there was none (or inf)."""
        return positive(self.run.series("clip_threshold"))

    @cached_property
    def losses(self) -> Floats:
        losses = np.array(self.run.series("loss"))
        return np.clip(np.where(np.isfinite(losses), losses, np.nan), -LARGEST, LARGEST)

    @cached_property
    def clipped(self) -> Flags:
        return self._flags("clipped")

    @cached_property
    def skipped(self) -> Flags:
        return self._flags("skipped")

    @cached_property
    def nonfinite(self) -> Flags:
        """Gradients that held an inf or NaN, and norms that are none: a finite one may exceed float32."""
        return self._flags("nonfinite") | self._not_finite("grad_norm")

    @cached_property
    def nonfinite_losses(self) -> Flags:
        return self._not_finite("loss")

    @cached_property
    def holds_the_norm(self) -> bool:
        """Whether the threshold is one for the global norm, and not for single tensors or elements.

        A log does not say; but what is above such a threshold is scaled to it, and what is below stays.
        """
        known = ~np.isnan(self.norms) & ~np.isnan(self.thresholds) & ~self.skipped & ~self.nonfinite
        scaled = known & self.clipped
        ratios = self.thresholds[known] / self.norms[known]
        coefficients = np.array(self.run.series("clip_coef"))
        as_said = np.isclose(coefficients[scaled], (self.thresholds / self.norms)[scaled], rtol=1e-2, atol=1e-5)
        untouched = (ratios[~self.clipped[known]] > 0.99) if known.any() else np.array([], dtype=bool)
        told = np.concatenate([as_said, untouched])
        return bool(told.mean() > 0.9) if told.size else True

    def _flags(self, name: str) -> Flags:
        return np.array([record.is_set(name) for record in self.run.records], dtype=bool)

    def _not_finite(self, metric: str) -> Flags:
        return np.array(
            [metric in record.metrics and not np.isfinite(record.metrics[metric]) for record in self.run.records],
            dtype=bool,
        )


def thinned(values: Floats, points: int = _POINTS) -> Places:
    """The places of the smallest and the largest value of each stretch, so that every spike stays; all of a few."""
    if len(values) <= points:
        return np.arange(len(values))
    kept = [0, len(values) - 1]
    for part in _stretches(len(values), points // 2):
        finite = part[~np.isnan(values[part])]
        # A stretch without a value keeps one place: it is a gap.
        kept += [finite[values[finite].argmin()], finite[values[finite].argmax()]] if finite.size else [part[0]]
    return np.unique(kept)


def thinned_flags(flags: Flags, marks: int = _MARKS) -> Places:
    """The places that are set, not more than one a stretch."""
    (places,) = np.nonzero(flags)
    if len(flags) <= marks:
        return places
    _, first = np.unique(places * marks // len(flags), return_index=True)
    return np.asarray(places[first])


def medians(steps: Floats, values: Floats, points: int = 200) -> tuple[Floats, Floats]:
    """The middle of each stretch: its mean step and its median value."""
    parts = list(_stretches(len(values), points))
    finite = [values[part][~np.isnan(values[part])] for part in parts]
    middle = [float(np.median(each)) if each.size else np.nan for each in finite]
    return np.array([steps[part].mean() for part in parts]), np.array(middle)


def is_long(values: Floats) -> bool:
    """Whether ``thinned`` leaves anything out."""
    return len(values) > _POINTS


def _stretches(length: int, count: int) -> list[Places]:
    return np.array_split(np.arange(length), count)


def positive(values: Sequence[float] | Floats) -> Floats:
    """What a logarithmic axis can show; NaN for the rest."""
    column = np.array(values, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        shown = np.isfinite(column) & (column > 0)
    return np.where(shown, np.clip(column, 1 / LARGEST, LARGEST), np.nan)
