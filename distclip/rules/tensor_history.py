"""Rules whose thresholds come from the norms before, of each tensor by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distclip.rules.base import Decision, Norms, full, held_to
from distclip.rules.state import EMPTY, StatefulRule, check_at_least_zero
from distclip.rules.thresholds import Threshold, checked_count, checked_decay, checked_threshold, threshold_at


class _PerTensor(StatefulRule):
    """What rules with memory of each tensor share. A tensor whose gradient is 0 (it got none) teaches nothing."""

    needs_per_tensor = True
    needs_tensors = True

    def check_state(self, state: Mapping[str, Any]) -> None:
        check_at_least_zero(type(self).__name__, state)

    def _counts(self, norms: Norms) -> Tensor:
        """Which tensors have something to teach in this step."""
        assert norms.per_tensor is not None
        return norms.finite & (norms.per_tensor > 0)


@dataclass
class AdaGC(_PerTensor):
    """Hold each tensor's norm to a moving average of its own clipped norms.

    While t, which counts from 1, is below ``warmup_steps``, all gradients are scaled by ``h = min(1, lambda_abs / N)``,
    and gamma is the smallest clipped norm so far. Then, for each tensor, ``h = min(1, lambda_rel * gamma / n)`` and
    ``gamma <- beta * gamma + (1 - beta) * h * n``.

    A tensor whose gradient is 0 keeps its gamma, and one that never had a gradient has none, so that its first is not
    clipped (in the paper's formula a gamma of 0 would freeze it for good).

    Args:
        lambda_abs: at least 0; inf does not clip in the warm-up. Or a callable of the step.
        lambda_rel: at least 0; inf does not clip after it. Or a callable of the step.
        beta: how slowly gamma moves, below 1.
        warmup_steps: at least 0. Steps with a non-finite norm, and those skipped, are not counted.

    Raises:
        ValueError: a number out of its range.

    References:
        Wang et al., "AdaGC: Improving Training Stability for Large Language Model Pretraining" (arXiv 2502.11034).
    """

    lambda_abs: Threshold = 1.0
    lambda_rel: Threshold = 1.05
    beta: float = 0.98
    warmup_steps: int = 100

    def __post_init__(self) -> None:
        self.lambda_abs = checked_threshold("lambda_abs", self.lambda_abs)
        self.lambda_rel = checked_threshold("lambda_rel", self.lambda_rel)
        self.beta = checked_decay("beta", self.beta)
        self.warmup_steps = checked_count("warmup_steps", self.warmup_steps, 0)

    def initial(self) -> dict[str, float | list[float]]:
        return {"seen": 0.0}

    def initial_per_tensor(self) -> dict[str, float]:
        return {"gamma": EMPTY}

    def decide(self, norms: Norms) -> Decision:
        assert norms.per_tensor is not None
        state, n = self.recall(norms), norms.per_tensor
        # The paper's t is the number of this step, counted from 1.
        warm, gamma = state["seen"] + 1 >= self.warmup_steps, state["gamma"]
        absolute = threshold_at("lambda_abs", self.lambda_abs, norms.step)
        relative = threshold_at("lambda_rel", self.lambda_rel, norms.step)
        # 0 * inf: a tensor without history under a factor of 0 is held to 0.
        limit = torch.where(gamma.isinf() & (relative > 0), torch.inf, relative * gamma.nan_to_num(posinf=0.0))
        coefficient = torch.where(warm, held_to(limit, n), held_to(absolute, norms.total))
        clipped = coefficient * n
        average = torch.where(gamma.isinf(), clipped, self.beta * gamma + (1 - self.beta) * clipped)
        new = torch.where(warm, average, torch.minimum(gamma, clipped))
        self.learn(
            gamma=torch.where(self._counts(norms), new, gamma), seen=state["seen"] + norms.finite.to(gamma.dtype)
        )
        return Decision(coefficient, torch.where(warm, full(norms, relative), full(norms, absolute)))


@dataclass
class EMARatioClip(_PerTensor):
    """Hold each tensor's norm to ``ratio`` times a moving average of its own clipped norms.

    ``s = min(1, ratio * ema / (n + 1e-6))``; ``ema`` is the first n, then ``beta * ema + (1 - beta) * s * n``. A tensor
    whose gradient is 0 keeps its average.

    Args:
        ratio: at least 0; inf changes nothing. Or a callable of the step.
        beta: how slowly the average moves, below 1.

    Raises:
        ValueError: ``ratio`` is negative or NaN, ``beta`` not between 0 and 1.
    """

    ratio: Threshold
    beta: float

    def __post_init__(self) -> None:
        self.ratio = checked_threshold("ratio", self.ratio)
        self.beta = checked_decay("beta", self.beta)

    def initial_per_tensor(self) -> dict[str, float]:
        return {"ema": EMPTY}

    def decide(self, norms: Norms) -> Decision:
        assert norms.per_tensor is not None
        n, known = norms.per_tensor, self.recall(norms)["ema"]
        ratio = threshold_at("ratio", self.ratio, norms.step)
        ema = torch.where(known == EMPTY, n, known)
        coefficient = (ratio * ema / (n + 1e-6)).clamp(max=1.0)
        # inf * 0, where there is no gradient: nothing to scale.
        coefficient = torch.where(n > 0, coefficient, 1.0)
        new = torch.where(known == EMPTY, n, self.beta * ema + (1 - self.beta) * coefficient * n)
        self.learn(ema=torch.where(self._counts(norms), new, known))
        return Decision(coefficient, full(norms, ratio))
