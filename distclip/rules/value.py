"""Rules of single elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from distclip.rules.base import Bounds, Decision, Limits, Norms, Rule, full
from distclip.rules.thresholds import as_number, checked


@dataclass
class ClipByValue(Rule):
    """Limit every element: ``g <- max(min(g, hi), lo)``; NaN stays NaN.

    The report's ``coefficient`` is the smallest factor that an element met (0 where a bound has turned its sign); its
    ``threshold``  is the larger bound by size. No element is written where all lie inside the bounds. DTensor gradients
    that are Partial are reduced first, which costs one more collective for each.

    Args:
        clip_value: c, at least 0, for the bounds -c and c; or a pair (lo, hi); or a callable of the step that gives
            either.

    Raises:
        ValueError: ``clip_value`` is negative or NaN, or lo > hi.

    References:
        ``torch.nn.utils.clip_grad_value_``, ``tf.clip_by_value``, Keras ``clipvalue``, ``optax.clip``.
    """

    clip_value: float | Bounds | Callable[[int], float | Bounds]
    reshapes = True

    def __post_init__(self) -> None:
        if not callable(self.clip_value):
            value_bounds(self.clip_value)

    @property
    def bounds(self) -> Bounds:  # type: ignore[override]  # a rule without bounds has None there
        return self._bounds_at(0)

    def _bounds_at(self, step: int) -> Bounds:
        return value_bounds(self.clip_value(step) if callable(self.clip_value) else self.clip_value)

    def limits(self, names: Sequence[str], step: int) -> Limits:
        return self._bounds_at(step)

    def decide(self, norms: Norms) -> Decision:
        assert norms.extremes is not None
        low, high = self._bounds_at(norms.step)
        smallest, largest = -norms.extremes[0], norms.extremes[1]
        # No factor turns an element that lies beyond a bound of the other sign into that bound: 0 stands for it.
        above = high / largest if high >= 0 else torch.zeros_like(largest)
        below = low / smallest if low <= 0 else torch.zeros_like(smallest)
        # Asked this way round, a NaN is outside, and does not hide what else lies there.
        above = torch.where(largest <= high, 1.0, above)
        below = torch.where(smallest >= low, 1.0, below)
        return Decision(None, full(norms, max(abs(low), abs(high))), bite=torch.minimum(above, below))


def value_bounds(clip_value: float | Bounds) -> Bounds:
    """The pair (lo, hi) that ``clip_value`` means."""
    if isinstance(clip_value, tuple | list):
        if len(clip_value) != 2:
            raise ValueError(f"clip_value must be a number or a pair (lo, hi), got {clip_value!r}")
        low, high = (as_number("clip_value", bound) for bound in clip_value)
        if not low <= high:
            raise ValueError(f"clip_value must be a pair (lo, hi) with lo <= hi, got {clip_value!r}")
        return low, high
    bound = checked("clip_value", clip_value)
    return -bound, bound
