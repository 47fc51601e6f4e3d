"""Stable-SPAM's two steps on gradients: spikes of single elements, then the norm of each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distclip.rules.base import Decision, Norms, Rule, full
from distclip.rules.state import StatefulRule, check_at_least_zero, combined_state, load_combined
from distclip.rules.thresholds import checked, checked_decay


@dataclass
class StableSPAM(Rule):
    """Damp elements that stand out, then scale each tensor by moving averages of its norm.

    1. ``M <- gamma3 * M + (1 - gamma3) * max|g|``, bias-corrected ``M^``; elements above it become
       ``g / max|g| * M^``.
    2. ``n = ||g||`` then, ``a <- gamma1 * a + (1 - gamma1) * n``, ``b <- gamma2 * b + (1 - gamma2) * n**2``, both
       bias-corrected, and ``g <- g / n * a^ / (sqrt(b^) + eps)``.

    The second needs norms of what the first has made: two all-reduces a clip, and two reads. A tensor whose gradient is
    0 keeps its averages and its count of steps.

    Args:
        gamma1: of the mean norm, below 1.
        gamma2: of its square, below 1.
        gamma3: of the largest element, below 1.
        eps: in the divisor.

    Raises:
        ValueError: a number out of its range.

    References:
        Huang et al., "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam" (arXiv 2502.17055), of whose
        optimizer this is what it does to gradients.
    """

    gamma1: float = 0.7
    gamma2: float = 0.9
    gamma3: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("gamma1", "gamma2", "gamma3"):
            setattr(self, name, checked_decay(name, getattr(self, name)))
        self.eps = checked("eps", self.eps)
        self._parts = {"spikes": _DampSpikes(self.gamma3), "norms": _ScaleNorms(self.gamma1, self.gamma2, self.eps)}

    @property
    def stages(self) -> tuple[Rule, ...]:
        return tuple(self._parts.values())

    def state_dict(self) -> dict[str, Any]:
        return combined_state(self._parts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_combined(self, self._parts, state)


class _Averages(StatefulRule):
    """Bias-corrected moving averages of each tensor."""

    needs_tensors = True

    def check_state(self, state: Mapping[str, Any]) -> None:
        check_at_least_zero(type(self).__name__, state, finite=True)

    def _moved(self, name: str, decay: float, value: Tensor, norms: Norms, counts: Tensor) -> tuple[Tensor, Tensor]:
        """An average with ``value`` in it, where it counts; and without bias, for a tensor's ``steps + 1``."""
        state = self.recall(norms)
        moved = torch.where(counts, decay * state[name] + (1 - decay) * value, state[name])
        return moved, moved / (1 - decay ** (state["steps"] + 1))


@dataclass
class _DampSpikes(_Averages):
    gamma3: float
    needs_extremes = True
    reshapes = True

    def initial_per_tensor(self) -> dict[str, float]:
        return {"steps": 0.0, "largest": 0.0}

    def decide(self, norms: Norms) -> Decision:
        assert norms.per_tensor_extremes is not None
        largest = norms.per_tensor_extremes.amax(1).clamp(min=0.0)
        counts = norms.finite & (largest > 0)
        moved, limit = self._moved("largest", self.gamma3, largest, norms, counts)
        self.learn(largest=moved, steps=self.recall(norms)["steps"] + counts.double())
        # Where nothing counts nothing is damped; nor where rounding puts the only value a tensor has had above itself.
        spiked = counts & (largest > limit * (1 + 1e-12))
        factor = torch.where(spiked, limit / largest, 1.0)
        limit = torch.where(spiked, limit, torch.inf)
        bite = factor.amin() if factor.numel() else torch.ones_like(norms.total)
        return Decision(None, full(norms, torch.inf), outliers=(limit, factor), bite=bite)


@dataclass
class _ScaleNorms(_Averages):
    gamma1: float
    gamma2: float
    eps: float
    needs_per_tensor = True

    def initial_per_tensor(self) -> dict[str, float]:
        return {"steps": 0.0, "norm": 0.0, "square": 0.0}

    def decide(self, norms: Norms) -> Decision:
        assert norms.per_tensor is not None
        n = norms.per_tensor
        counts = norms.finite & (n > 0)
        norm, mean = self._moved("norm", self.gamma1, n, norms, counts)
        square, mean_square = self._moved("square", self.gamma2, n.square(), norms, counts)
        self.learn(norm=norm, square=square, steps=self.recall(norms)["steps"] + counts.double())
        coefficient = torch.where(counts, mean / (mean_square.sqrt() + self.eps) / n, 1.0)
        return Decision(coefficient, full(norms, torch.inf))
