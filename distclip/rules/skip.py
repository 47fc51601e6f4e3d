"""Rules that leave steps out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distclip.rules.base import Decision, Norms, Rule, full
from distclip.rules.state import EMPTY, State, StatefulRule, check_at_least_zero, check_window, pushed, window_state
from distclip.rules.thresholds import Threshold, checked_threshold, checked_window, threshold_at

Moments = tuple[Tensor, Tensor, Tensor]
"""Number, mean and standard deviation (unbiased)."""


@dataclass
class SkipAbove(Rule):
    """Leave a step out, on all ranks, where the global L2 norm is above ``max_norm``; change nothing else.

    A NaN is above every finite threshold.

    Args:
        max_norm: the largest norm that is stepped with, at least 0; inf never skips. Or a callable of the step.

    Raises:
        ValueError: ``max_norm`` is negative or NaN.
    """

    max_norm: Threshold
    may_skip = True

    def __post_init__(self) -> None:
        self.max_norm = checked_threshold("max_norm", self.max_norm)

    def decide(self, norms: Norms) -> Decision:
        max_norm = threshold_at("max_norm", self.max_norm, norms.step)
        skip = torch.zeros_like(norms.finite) if math.isinf(max_norm) else ~(norms.total <= max_norm)
        return Decision(None, full(norms, max_norm), skip)


@dataclass
class SkipOnSpike(StatefulRule):
    """Leave a step out, on all ranks, where its global L2 norm stands out from those before; change nothing else.

    A spike is ``N - mean > sigma * std`` (unbiased) over the last ``window`` norms, the current one not among them. A
    loss passed to ``clip(loss=...)`` is held to the same test against its own window. A spike enters the window, so
    that a new level is accepted in time; non-finite values never do, and are spikes as soon as there is a history.

    Args:
        window: how many norms to look back on.
        sigma: how far out a spike is, at least 0; inf never skips. Or a callable of the step.
        min_history: nothing is skipped before there are so many.

    Raises:
        ValueError: ``sigma`` is negative or NaN, ``min_history`` below 2 or above ``window``.

    References:
        OLMo-core ``SkipStepOptimizer``, in whose window one NaN skips all steps until it has left.
    """

    window: int = 128
    sigma: Threshold = 6.0
    min_history: int = 64
    may_skip = True
    needs_loss = True
    counts_skipped = True

    def __post_init__(self) -> None:
        self.window = checked_window("window", self.window, 2)
        self.sigma = checked_threshold("sigma", self.sigma)
        self.min_history = checked_window("min_history", self.min_history, 2)
        if self.min_history > self.window:
            raise ValueError(f"min_history must be at most window={self.window}, got {self.min_history}")

    def initial(self) -> dict[str, float | list[float]]:
        empty = window_state(self.window)
        return {"norms": empty, "norms_seen": 0.0, "losses": empty, "losses_seen": 0.0}

    def check_state(self, state: Mapping[str, Any]) -> None:
        for what in ("norms", "losses"):
            check_window(type(self).__name__, state, what, f"{what}_seen", self.window)
        # Losses may be negative.
        check_at_least_zero(type(self).__name__, {key: value for key, value in state.items() if key != "losses"})

    def decide(self, norms: Norms) -> Decision:
        state, sigma = self.recall(norms), threshold_at("sigma", self.sigma, norms.step)
        moments = self._moments(state["norms"])
        limit = self._limit(moments, sigma)
        skip = self._beyond(norms.total, limit)
        new = self._with(state, "norms", norms.total)
        if norms.loss is not None:
            given = ~norms.loss.isnan()
            skip = skip | (given & self._beyond(norms.loss, self._limit(self._moments(state["losses"]), sigma)))
            new |= self._with(state, "losses", norms.loss)
        self.learn(**new)
        return Decision(None, limit, skip, quantities={"zscore": self._zscore(moments, norms.total)})

    def _limit(self, moments: Moments, sigma: float) -> Tensor:
        """What is a spike: above this. inf as long as the history is too short."""
        count, mean, deviation = moments
        spread = deviation * sigma if math.isfinite(sigma) else torch.full_like(mean, math.inf)
        return torch.where(count >= self.min_history, mean + spread, math.inf)

    def _zscore(self, moments: Moments, value: Tensor) -> Tensor:
        """How many standard deviations the norm is from the mean; 0 as long as the history is too short."""
        count, mean, deviation = moments
        return torch.where((count >= self.min_history) & (deviation > 0), (value - mean) / deviation, 0.0)

    def _moments(self, window: Tensor) -> Moments:
        """Of what a window holds."""
        known = window != EMPTY
        count = known.sum()
        mean = torch.where(known, window, 0.0).sum() / count
        variance = torch.where(known, window - mean, 0.0).square().sum() / (count - 1)
        return count, mean, variance.sqrt()

    def _beyond(self, value: Tensor, limit: Tensor) -> Tensor:
        return limit.isfinite() & ~(value <= limit)

    def _with(self, state: State, what: str, value: Tensor) -> State:
        window, seen = pushed(state[what], state[f"{what}_seen"], value, value.isfinite())
        return {what: window, f"{what}_seen": seen}
