"""Rules that hold a norm to a fixed threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distclip.rules.base import Decision, Norms, Rule, checked


def clip_coefficient(max_norm: float, total_norm: Tensor) -> Tensor | None:
    """``min(1, max_norm / (total_norm + 1e-6))``, as torch has it; None, for no change, where ``max_norm`` is inf."""
    if math.isinf(max_norm):
        return None
    return (max_norm / (total_norm + 1e-6)).clamp(max=1.0)


@dataclass
class ClipByGlobalNorm(Rule):
    """Scale all gradients alike so that their common norm is at most ``max_norm``.

    ``g <- g * min(1, max_norm / (N + 1e-6))`` with ``N = || (||g_i||_p)_i ||_p`` over all tensors of the model.

    Args:
        max_norm: the largest norm let through, at least 0; inf measures and changes nothing.
        norm_type: p, any number above 0, or inf.

    Raises:
        ValueError: ``max_norm`` is negative or NaN, ``norm_type`` is not above 0.

    References:
        Pascanu et al., "On the difficulty of training recurrent neural networks" (arXiv 1211.5063);
        ``torch.nn.utils.clip_grad_norm_``.
    """

    max_norm: float
    norm_type: float = 2.0

    def __post_init__(self) -> None:
        self.max_norm = checked("max_norm", self.max_norm)
        self.norm_type = checked("norm_type", self.norm_type, above_zero=True)

    def decide(self, norms: Norms) -> Decision:
        threshold = torch.full_like(norms.total, self.max_norm)
        return Decision(clip_coefficient(self.max_norm, norms.total), threshold)


@dataclass
class ClipByNorm(Rule):
    """Scale each tensor by itself so that its L2 norm is at most ``max_norm``: ``g <- g * c / max(||g||, c)``.

    A non-finite tensor is scaled by 0 (inf) or left alone (NaN); the others are not touched by it.

    Args:
        max_norm: c, at least 0; inf measures and changes nothing.

    Raises:
        ValueError: ``max_norm`` is negative or NaN.

    References:
        ``tf.clip_by_norm``, Keras ``clipnorm``.
    """

    max_norm: float
    needs_per_tensor = True
    separable = True

    def __post_init__(self) -> None:
        self.max_norm = checked("max_norm", self.max_norm)

    def decide(self, norms: Norms) -> Decision:
        assert norms.per_tensor is not None
        above = norms.per_tensor > self.max_norm
        coefficient = torch.where(above, self.max_norm / norms.per_tensor, 1.0)
        return Decision(coefficient, torch.full_like(norms.total, self.max_norm))


@dataclass
class ClipByValue(Rule):
    """Limit every element: ``g <- max(min(g, hi), lo)``; NaN stays NaN.

    The report's ``coefficient`` is the smallest factor that an element met (0 where a bound has turned its sign); its
    ``threshold``  is the larger bound by
    size. No element is written where all lie inside the bounds. DTensor gradients that are Partial are reduced first,
    which costs one more collective for each.

    Args:
        clip_value: c, at least 0, for the bounds -c and c; or a pair (lo, hi).

    Raises:
        ValueError: ``clip_value`` is negative or NaN, or lo > hi.

    References:
        ``torch.nn.utils.clip_grad_value_``, ``tf.clip_by_value``, Keras ``clipvalue``, ``optax.clip``.
    """

    clip_value: float | tuple[float, float]

    def __post_init__(self) -> None:
        value_bounds(self.clip_value)

    @property
    def bounds(self) -> tuple[float, float]:  # type: ignore[override]  # a rule without bounds has None there
        return value_bounds(self.clip_value)

    def decide(self, norms: Norms) -> Decision:
        assert norms.extremes is not None
        low, high = self.bounds
        smallest, largest = -norms.extremes[0], norms.extremes[1]
        # No factor turns an element that lies beyond a bound of the other sign into that bound: 0 stands for it.
        above = high / largest if high >= 0 else torch.zeros_like(largest)
        below = low / smallest if low <= 0 else torch.zeros_like(smallest)
        # Asked this way round, a NaN is outside, and does not hide what else lies there.
        above = torch.where(largest <= high, 1.0, above)
        below = torch.where(smallest >= low, 1.0, below)
        threshold = torch.full_like(norms.total, max(abs(low), abs(high)))
        return Decision(torch.minimum(above, below), threshold)


def value_bounds(clip_value: float | tuple[float, float]) -> tuple[float, float]:
    """The pair (lo, hi) that ``clip_value`` means."""
    if isinstance(clip_value, tuple | list):
        if len(clip_value) != 2:
            raise ValueError(f"clip_value must be a number or a pair (lo, hi), got {clip_value!r}")
        low, high = (float(bound) for bound in clip_value)
        if not low <= high:
            raise ValueError(f"clip_value must be a pair (lo, hi) with lo <= hi, got {clip_value!r}")
        return low, high
    bound = checked("clip_value", clip_value)
    return -bound, bound
