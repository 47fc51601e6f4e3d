"""Rules that hold a norm to a fixed threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distclip.rules.base import Decision, Norms, Rule, full, held_to
from distclip.rules.thresholds import Threshold, checked, checked_threshold, threshold_at


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
        max_norm: the largest norm let through, at least 0; inf measures and changes nothing. Or a callable of the step.
        norm_type: p, any number above 0, or inf.

    Raises:
        ValueError: ``max_norm`` is negative or NaN, ``norm_type`` is not above 0.

    References:
        Pascanu et al., "On the difficulty of training recurrent neural networks" (arXiv 1211.5063);
        ``torch.nn.utils.clip_grad_norm_``.
    """

    max_norm: Threshold
    norm_type: float = 2.0

    def __post_init__(self) -> None:
        self.max_norm = checked_threshold("max_norm", self.max_norm)
        self.norm_type = checked("norm_type", self.norm_type, above_zero=True)

    def decide(self, norms: Norms) -> Decision:
        max_norm = threshold_at("max_norm", self.max_norm, norms.step)
        return Decision(clip_coefficient(max_norm, norms.total), full(norms, max_norm))


@dataclass
class NormalizeGradient(Rule):
    """Bring the global L2 norm to ``norm``, from above and from below: ``g <- g * norm / (N + 1e-6)``.

    Gradients that are all 0 stay 0. An inf measures and changes nothing.

    Args:
        norm: c, at least 0, or a callable of the step.

    Raises:
        ValueError: ``norm`` is negative or NaN.

    References:
        optax ``normalize_by_update_norm``.
    """

    norm: Threshold = 1.0

    def __post_init__(self) -> None:
        self.norm = checked_threshold("norm", self.norm)

    def decide(self, norms: Norms) -> Decision:
        norm = threshold_at("norm", self.norm, norms.step)
        return Decision(None if math.isinf(norm) else norm / (norms.total + 1e-6), full(norms, norm))


@dataclass
class ClipByNorm(Rule):
    """Scale each tensor by itself so that its L2 norm is at most ``max_norm``: ``g <- g * c / max(||g||, c)``.

    A non-finite tensor is scaled by 0 (inf) or left alone (NaN); the others are not touched by it.

    Args:
        max_norm: c, at least 0; inf measures and changes nothing. Or a callable of the step.

    Raises:
        ValueError: ``max_norm`` is negative or NaN.

    References:
        ``tf.clip_by_norm``, Keras ``clipnorm``.
    """

    max_norm: Threshold
    needs_per_tensor = True
    separable = True

    def __post_init__(self) -> None:
        self.max_norm = checked_threshold("max_norm", self.max_norm)

    def decide(self, norms: Norms) -> Decision:
        assert norms.per_tensor is not None
        max_norm = threshold_at("max_norm", self.max_norm, norms.step)
        return Decision(held_to(max_norm, norms.per_tensor), full(norms, max_norm))


@dataclass
class ClipByAverageNorm(Rule):
    """As ``ClipByNorm``, with the norm divided by the number of elements: ``g <- g * c / max(||g|| / numel, c)``.

    Args:
        max_norm: c, at least 0; inf measures and changes nothing. Or a callable of the step.

    Raises:
        ValueError: ``max_norm`` is negative or NaN.

    References:
        ``tf.clip_by_average_norm`` (of TensorFlow 1).
    """

    max_norm: Threshold
    needs_per_tensor = True
    needs_tensors = True
    separable = True

    def __post_init__(self) -> None:
        self.max_norm = checked_threshold("max_norm", self.max_norm)

    def decide(self, norms: Norms) -> Decision:
        assert norms.per_tensor is not None
        assert norms.tensors is not None
        max_norm = threshold_at("max_norm", self.max_norm, norms.step)
        average = norms.per_tensor / norms.tensors.numels.clamp(min=1)
        return Decision(held_to(max_norm, average), full(norms, max_norm))


@dataclass
class ClipByBlockRMS(Rule):
    """Hold the root mean square of each tensor's elements to ``max_rms``: ``g <- g / max(1, rms(g) / d)``.

    Args:
        max_rms: d, at least 0; inf measures and changes nothing. Or a callable of the step.

    Raises:
        ValueError: ``max_rms`` is negative or NaN.

    References:
        Shazeer & Stern, "Adafactor" (arXiv 1804.04235); optax ``clip_by_block_rms``.
    """

    max_rms: Threshold
    needs_per_tensor = True
    needs_tensors = True
    separable = True

    def __post_init__(self) -> None:
        self.max_rms = checked_threshold("max_rms", self.max_rms)

    def decide(self, norms: Norms) -> Decision:
        assert norms.per_tensor is not None
        assert norms.tensors is not None
        max_rms = threshold_at("max_rms", self.max_rms, norms.step)
        rms = norms.per_tensor / norms.tensors.numels.clamp(min=1).sqrt()
        return Decision(held_to(max_rms, rms), full(norms, max_rms))


def coefficient_within(threshold: Tensor, norms: Norms) -> Tensor:
    """``min(1, threshold / (N + 1e-6))`` for a threshold from history; 1 where there is none (NaN or inf) yet."""
    factor = (threshold / (norms.total + 1e-6)).clamp(max=1.0)
    return torch.where(threshold.isfinite(), factor, 1.0)
