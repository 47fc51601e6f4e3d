"""Rules whose threshold comes from the global norms before: one number decides on all gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distclip.hints import shown
from distclip.rules.base import Decision, Norms
from distclip.rules.norm import coefficient_within
from distclip.rules.state import (
    EMPTY,
    StatefulRule,
    check_at_least_zero,
    check_window,
    pushed,
    quantile,
    rank_in,
    window_state,
)
from distclip.rules.thresholds import (
    Threshold,
    checked,
    checked_count,
    checked_decay,
    checked_threshold,
    checked_window,
    threshold_at,
)


class _Quantiles(StatefulRule):
    """What rules of a window of norms share. The window is as long as ``initial`` makes it."""

    def initial(self) -> dict[str, float | list[float]]:
        return {"norms": window_state(self._length()), "seen": 0.0}

    def check_state(self, state: Mapping[str, Any]) -> None:
        check_window(type(self).__name__, state, "norms", "seen", self._length())
        check_at_least_zero(type(self).__name__, state)

    def _length(self) -> int:
        raise NotImplementedError

    def _clip(self, norms: Norms, q: float, factor: float = 1.0) -> Decision:
        """Count the norm in, and clip to ``factor`` times the quantile of them all."""
        state = self.recall(norms)
        window, seen = pushed(state["norms"], state["seen"], norms.total, norms.finite)
        self.learn(norms=window, seen=seen)
        threshold = factor * quantile(window, q)
        return Decision(
            coefficient_within(threshold, norms),
            torch.where(threshold.isnan(), math.inf, threshold),
            quantities={"percentile": rank_in(window, norms.total)},
        )


@dataclass
class AutoClip(_Quantiles):
    """Clip the global L2 norm to a percentile of all norms so far, this one among them.

    Without ``history`` all norms are kept: on the device, in a buffer that doubles when it is full, and sorted in every
    step.

    Args:
        percentile: between 0 and 100, or a callable of the step.
        history: how many norms to look back on; None for all.

    Raises:
        ValueError: ``percentile`` is not between 0 and 100, ``history`` is below 1.

    References:
        Seetharaman et al., "AutoClip: Adaptive Gradient Clipping for Source Separation Networks" (arXiv 2007.14469).
    """

    percentile: Threshold = 10.0
    history: int | None = None

    def __post_init__(self) -> None:
        # Places of the buffer that are surely free.
        self._free = 0
        self.percentile = checked_threshold("percentile", self.percentile)
        if not callable(self.percentile) and self.percentile > 100:
            raise ValueError(f"percentile must be between 0 and 100, got {self.percentile!r}")
        if self.history is not None:
            self.history = checked_window("history", self.history)

    def decide(self, norms: Norms) -> Decision:
        percentile = threshold_at("percentile", self.percentile, norms.step)
        if self.history is None:
            self._make_room(norms)
        return self._clip(norms, min(percentile, 100.0) / 100.0)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.history is None:
            state["norms"] = [norm for norm in state["norms"] if norm != EMPTY]
        return state

    def _length(self) -> int:
        return self.history or 0

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._free = 0

    def _make_room(self, norms: Norms) -> None:
        """Let the buffer have a free place. The host counts, so that nobody waits for the device."""
        if self._free == 0:
            state = self.recall(norms)
            self._free = max(16, state["norms"].numel())
            state["norms"] = torch.cat((state["norms"], state["norms"].new_full((self._free,), EMPTY)))
        self._free -= 1


@dataclass
class QuantileClip(_Quantiles):
    """Clip the global L2 norm to ``factor`` times a quantile of the last ``window`` norms, this one among them.

    Args:
        q: between 0 and 1; 0.5 is the median. Or a callable of the step.
        window: how many norms to look back on.
        factor: at least 0, inf changes nothing; or a callable of the step.

    Raises:
        ValueError: ``q`` is not between 0 and 1, ``window`` is below 1, ``factor`` is negative or NaN.
    """

    q: Threshold
    window: int
    factor: Threshold = 1.0

    def __post_init__(self) -> None:
        self.q = checked_threshold("q", self.q)
        if not callable(self.q) and self.q > 1:
            raise ValueError(f"q must be between 0 and 1, got {self.q!r}")
        self.window = checked_window("window", self.window)
        self.factor = checked_threshold("factor", self.factor)

    def decide(self, norms: Norms) -> Decision:
        q, factor = threshold_at("q", self.q, norms.step), threshold_at("factor", self.factor, norms.step)
        return self._clip(norms, min(q, 1.0), factor)

    def _length(self) -> int:
        return self.window


@dataclass
class ZClip(StatefulRule):
    """Clip the global L2 norm where it stands out from a moving mean and variance of those before.

    Warm-up: ``warmup_steps`` norms are collected, and clipped to ``max_norm``; ``mu`` and ``var`` become their mean and
    population variance. Then ``z = (N - mu) / (sigma + eps)``, and for a spike

    - zscore (``z > z_thresh``): ``c = (mu + z_thresh * sigma / (z / z_thresh)) * clip_factor``; with
      ``clip_option="mean"``: ``c = mu``;
    - percentile (``N > mu + z_thresh * sigma``): ``c`` is that.

    Gradients are held to ``min(c, max_norm)``, and ``mu <- alpha * mu + (1 - alpha) * x``,
    ``var <- alpha * var + (1 - alpha) * (x - mu)**2`` with the new mu; x is c for a spike, else N.

    Args:
        alpha: how slowly mean and variance move, below 1.
        z_thresh: what a spike is; inf finds none. Or a callable of the step.
        max_norm: the largest norm let through in any case; None or inf for no limit. Or a callable of the step.
        eps: added to sigma.
        warmup_steps: at least 1.
        mode: "zscore" or "percentile".
        clip_option: "adaptive_scaling" or "mean"; of "zscore".
        clip_factor: of "adaptive_scaling"; finite.
        skip_update_on_spike: whether mean and variance pass over spikes. (The step itself is taken.)

    Raises:
        ValueError: a number out of its range, an unknown mode or option.

    References:
        Kumar et al., "ZClip: Adaptive Spike Mitigation for LLM Pre-Training" (arXiv 2504.02507); package ``zclip``, in
        which one NaN stays in mean and variance for good.
    """

    alpha: float = 0.97
    z_thresh: Threshold = 2.5
    max_norm: Threshold | None = 1.0
    eps: float = 1e-6
    warmup_steps: int = 25
    mode: str = "zscore"
    clip_option: str = "adaptive_scaling"
    clip_factor: float = 1.0
    skip_update_on_spike: bool = False

    def __post_init__(self) -> None:
        self.alpha = checked_decay("alpha", self.alpha)
        self.z_thresh = checked_threshold("z_thresh", self.z_thresh)
        self.max_norm = None if self.max_norm is None else checked_threshold("max_norm", self.max_norm)
        self.eps = checked("eps", self.eps)
        self.warmup_steps = checked_count("warmup_steps", self.warmup_steps)
        self.clip_factor = checked("clip_factor", self.clip_factor)
        if math.isinf(self.clip_factor):
            raise ValueError("clip_factor must be finite, got inf: one spike would make mean and variance infinite")
        for name, known in (("mode", ("zscore", "percentile")), ("clip_option", ("adaptive_scaling", "mean"))):
            chosen = getattr(self, name)
            # Asked for its type first: arrays answer == with arrays.
            if not isinstance(chosen, str) or chosen not in known:
                raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {shown(chosen)}")

    def initial(self) -> dict[str, float | list[float]]:
        # While warming up, mean and variance are those of the norms so far: no buffer is needed.
        return {"seen": 0.0, "mean": 0.0, "variance": 0.0}

    def check_state(self, state: Mapping[str, Any]) -> None:
        check_at_least_zero(type(self).__name__, state, finite=True)

    def decide(self, norms: Norms) -> Decision:
        state, total = self.recall(norms), norms.total
        seen, mean, variance = state["seen"], state["mean"], state["variance"]
        warm = seen >= self.warmup_steps
        sigma = variance.sqrt()
        z = (total - mean) / (sigma + self.eps)
        limit = self._limit(total, mean, sigma, z, threshold_at("z_thresh", self.z_thresh, norms.step))
        spike = warm & ~limit.isnan()
        taken = torch.where(spike, limit, total)
        # Both ways of counting x in; the first is the mean and variance of all norms so far.
        rate = torch.where(warm, 1.0 - self.alpha, 1.0 / (seen + 1.0))
        new_mean = mean + rate * (taken - mean)
        deviation = (taken - new_mean) * torch.where(warm, taken - new_mean, taken - mean)
        new_variance = variance + rate * (deviation - variance)
        counts = norms.finite & ~(spike if self.skip_update_on_spike else torch.zeros_like(spike))
        self.learn(
            seen=seen + counts.to(seen.dtype),
            mean=torch.where(counts, new_mean, mean),
            variance=torch.where(counts, new_variance, variance),
        )
        max_norm = math.inf if self.max_norm is None else threshold_at("max_norm", self.max_norm, norms.step)
        threshold = torch.where(spike, limit, math.inf).clamp(max=max_norm)
        # Only what is above is touched: in the package a norm of c itself is scaled by c / (c + 1e-6).
        coefficient = torch.where(total <= threshold, 1.0, coefficient_within(threshold, norms))
        quantities = {"zscore": torch.where(warm, z, 0.0), "mean": mean, "std": sigma}
        return Decision(coefficient, threshold, quantities=quantities)

    def _limit(self, total: Tensor, mean: Tensor, sigma: Tensor, z: Tensor, z_thresh: float) -> Tensor:
        """c for a spike; NaN for what is none."""
        if math.isinf(z_thresh):
            return torch.full_like(total, math.nan)
        if self.mode == "percentile":
            limit = mean + z_thresh * sigma
            return torch.where(total > limit, limit, math.nan)
        # z_thresh * sigma / (z / z_thresh), without a division by a threshold of 0.
        limit = mean if self.clip_option == "mean" else (mean + z_thresh**2 * sigma / z) * self.clip_factor
        return torch.where(z > z_thresh, limit, math.nan)
