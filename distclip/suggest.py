"""Thresholds for a run, from the norms that it had."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from distclip.rules import parse
from distclip.runs import Run, text_in
from distclip.summary import finite, quantile

PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9)
# Below so many norms the upper percentiles are little more than the largest one.
_FEW = 200


@dataclass(frozen=True)
class Suggestion:
    """One threshold for the global norm."""

    percentile: float
    threshold: float
    clips: float
    """Share of this run's steps (those with a finite norm) whose norm is above."""


@dataclass(frozen=True)
class Suggestions:
    """Thresholds at the usual percentiles of a run's norms before clipping."""

    norms: int
    """How many finite norms there were."""
    nonfinite: int
    thresholds: tuple[Suggestion, ...]
    advice: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def suggest(run: Run) -> Suggestions:
    """Thresholds for the global norm from a run with a similar model, batch size and loss.

    Norms are those before clipping, so a clipped run serves as well as one that only measured (``rule=inf``).

    Raises:
        ValueError: no record has a finite norm.
    """
    norms = finite(run.series("grad_norm"))
    if not norms:
        raise ValueError(f"{run.path}: no step has a finite grad_norm to learn from")
    found = tuple(
        Suggestion(percentile, limit, sum(norm > limit for norm in norms) / len(norms))
        for percentile in PERCENTILES
        for limit in [quantile(norms, percentile / 100)]
    )
    advice = _advice(found, len(norms), _norm_type(run))
    return Suggestions(len(norms), len(run.records) - len(norms), found, advice)


def _norm_type(run: Run) -> float:
    """Of the norms in a log: that of its rule. A rule that no text can say is taken to go by L2."""
    try:
        return parse(text_in(run.info, "rule")).norm_type
    except (ValueError, TypeError):
        return 2.0


def _advice(found: tuple[Suggestion, ...], count: int, norm_type: float) -> str:
    rule = "global_norm={:.3g}" + ("" if norm_type == 2.0 else f",norm_type={norm_type:g}")
    at = {suggestion.percentile: suggestion.threshold for suggestion in found}
    text = (
        f"To catch outliers and leave ordinary steps alone, take the 90th to 99th percentile ({at[90.0]:.3g} to "
        f"{at[99.0]:.3g}): rule {rule.format(at[95.0])} would have clipped one step in twenty. A threshold at the "
        "median or below clips most steps, and sets the step size more than the learning rate does. Norms fall as "
        "training goes on: if those of the end are much smaller, let the threshold follow them (zclip, autoclip=90)."
    )
    if norm_type != 2.0:
        text += f" These are norms of order {norm_type:g}, as the run's rule measured: no thresholds for an L2 norm."
    return text if count >= _FEW else f"These are only {count} norms: log some {_FEW} steps before you decide. {text}"
