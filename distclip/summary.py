"""A logged run in numbers: what its norms were, and what clipping did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from distclip.runs import Run, text_in


@dataclass(frozen=True)
class Summary:
    """One run. Norms are those before clipping, of the steps where they are finite."""

    name: str
    rule: str
    steps: int
    first_step: int
    last_step: int
    median_norm: float
    p90_norm: float
    p99_norm: float
    largest_norm: float
    largest_norm_step: int
    clipped: float
    """Share of the steps that were clipped."""
    skipped: int
    nonfinite: int
    smallest_coefficient: float
    first_loss: float
    """NaN where no loss was logged; as ``last_loss``, the mean over 5 % of the steps."""
    last_loss: float
    alarms: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def summary_of(run: Run) -> Summary:
    """Put a run into numbers."""
    norms = finite(run.series("grad_norm"))
    largest = max(norms, default=math.nan)
    losses = finite(run.series("loss"))
    part = max(1, len(losses) // 20)
    return Summary(
        name=run.name,
        rule=text_in(run.info, "rule"),
        steps=len(run.records),
        first_step=run.records[0].step,
        last_step=run.records[-1].step,
        median_norm=quantile(norms, 0.5),
        p90_norm=quantile(norms, 0.9),
        p99_norm=quantile(norms, 0.99),
        largest_norm=largest,
        largest_norm_step=next((record.step for record in run.records if record.norm == largest), -1),
        clipped=sum(record.is_set("clipped") for record in run.records) / len(run.records),
        skipped=sum(record.is_set("skipped") for record in run.records),
        nonfinite=sum(record.is_set("nonfinite") for record in run.records),
        smallest_coefficient=min(finite(run.series("clip_coef")), default=math.nan),
        first_loss=_mean(losses[:part]),
        last_loss=_mean(losses[-part:]),
        alarms=tuple(f"step {event.step}: {event.message}" for event in run.events),
    )


def finite(values: Sequence[float]) -> list[float]:
    """Those that are neither inf nor NaN."""
    return [value for value in values if math.isfinite(value)]


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, interpolated linearly as NumPy does; NaN of none."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _mean(values: Sequence[float]) -> float:
    # Divided first: a sum of the largest floats is none.
    return math.fsum(value / len(values) for value in values) if values else math.nan
