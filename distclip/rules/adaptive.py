"""Rules of units: the rows of matrices and kernels, which are what one output sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from distclip.hints import several, shown
from distclip.rules.base import Decision, Norms, Rule, full
from distclip.rules.tensors import Patterns
from distclip.rules.thresholds import Threshold, checked, checked_threshold, threshold_at


@dataclass
class AdaptiveGradientClipping(Rule):
    """AGC: hold each unit's gradient to a share of its own weights.

    ``s = min(1, clip_factor * max(||W_u||, eps) / max(||G_u||, 1e-6))``. A unit is one output row: tensors of two or
    more dimensions are normed over all axes but the first, others whole. Transposed weights (``ConvTranspose``,
    embeddings) are taken as they lie: along dim 0.

    Where rows are cut over ranks (FSDP1, ZeRO, rowwise tensor parallel) their parts are added up: one all-reduce, that
    carries two float64 for each row of the model.

    Args:
        clip_factor: lambda, at least 0; inf changes nothing. Or a callable of the step.
        eps: the least norm that weights are taken to have, so that rows that start at zero can leave it.
        exclude: a pattern (``fnmatch``) of parameter names to leave alone, or several. The paper leaves out the
            last linear layer.

    Raises:
        ValueError: ``clip_factor`` or ``eps`` is negative or NaN.

    References:
        Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization" (arXiv 2102.06171);
        ``timm.utils.adaptive_clip_grad``.
    """

    clip_factor: Threshold = 0.01
    eps: float = 1e-3
    exclude: Patterns | str = ()
    needs_per_tensor = True
    needs_units = True

    def __post_init__(self) -> None:
        self.clip_factor = checked_threshold("clip_factor", self.clip_factor)
        self.eps = checked("eps", self.eps)
        self.exclude = as_patterns("exclude", self.exclude)

    def decide(self, norms: Norms) -> Decision:
        assert norms.unit_norms is not None
        assert norms.weight_norms is not None
        assert norms.tensors is not None
        factor = threshold_at("clip_factor", self.clip_factor, norms.step)
        largest = factor * norms.weight_norms.clamp(min=self.eps)
        # Written so that a factor of inf gives 1 where a gradient is inf, and 0 gives 0 where it is 0.
        coefficient = torch.where(norms.unit_norms > largest, largest / norms.unit_norms.clamp(min=1e-6), 1.0)
        coefficient = coefficient.clamp(max=1.0)
        (left_alone,) = norms.tensors.matched((as_patterns("exclude", self.exclude),))
        if left_alone:
            coefficient[norms.tensors.part(left_alone).units] = 1.0
        return Decision(coefficient, full(norms, factor))


@dataclass
class CentralizeGradient(Rule):
    """Take the mean of each row off it: ``g <- g - mean(g over all axes but 0)``, of tensors of 2 or more dimensions.

    Means of rows that are cut over ranks ride in the norm's all-reduce, one float64 for each row of the model.

    References:
        Yong et al., "Gradient Centralization" (arXiv 2004.01461); ``optax.centralize``.
    """

    needs_means = True
    reshapes = True

    def decide(self, norms: Norms) -> Decision:
        assert norms.unit_means is not None
        assert norms.tensors is not None
        matrices = [len(shape) > 1 for shape in norms.tensors.shapes]
        chosen = norms.tensors.part(tuple(place for place, many in enumerate(matrices) if many)).units
        shift = torch.zeros_like(norms.unit_means).index_copy_(0, chosen, norms.unit_means[chosen])
        return Decision(None, full(norms, torch.inf), shift=shift)


def as_patterns(name: str, patterns: object) -> Patterns:
    """One pattern, or several, as a tuple.

    Raises:
        TypeError: something in it is no text.
    """
    if isinstance(patterns, str):
        return (patterns,)
    given: tuple[Any, ...] = tuple(patterns) if several(patterns) else (patterns,)
    if not all(isinstance(pattern, str) for pattern in given):
        raise TypeError(
            f"{name} must be a pattern of parameter names such as 'head.*', or several, got {shown(patterns)}"
        )
    return given
