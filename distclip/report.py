"""What one clip did."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_METRICS = {
    "total_norm": "grad_norm",
    "clipped_norm": "grad_norm_clipped",
    "coefficient": "clip_coef",
    "threshold": "clip_threshold",
    "clipped": "clipped",
    "skipped": "skipped",
    "nonfinite": "nonfinite",
}


@dataclass(frozen=True)
class ClipReport:
    """One clip, the same on every rank. The fields are 0-d tensors: reading none of them waits for no device."""

    total_norm: Tensor
    """Global norm before clipping, whatever the rule (L2, or the rule's ``norm_type``). Float32, or float64 where all
    parameters are; inf where a finite norm exceeds float32, while ``nonfinite`` tells what the gradients hold."""
    coefficient: Tensor
    """The smallest factor applied to a gradient; float64, 1 where nothing was clipped."""
    threshold: Tensor
    """What the rule held the norm against; float64."""
    clipped: Tensor
    """Whether any gradient was scaled down or limited; bool."""
    nonfinite: Tensor
    """Whether any gradient holds an inf or NaN; bool."""
    skipped: Tensor
    """Whether this step's gradients were dropped, so that ``optimizer.step()`` changes nothing; bool."""
    clipped_norm: Tensor | None = None
    """Global norm after clipping, as ``total_norm``; None where elements were limited, after which only another read of
    the gradients could tell (``distclip.grad_norm``)."""
    applied: str = "in place"
    """What was done with the gradients: "in place", they were written; "folded", the optimizer's fused step scales
    them; "skipped", the step is left out; "nothing", where there was nothing to do and that could be seen for free."""
    per_tensor: dict[str, Tensor] | None = None
    """Norm of each tensor before clipping, by name; float64. Only where the rule needs them."""

    def metrics(self, prefix: str = "train/") -> dict[str, float]:
        """What trackers are to show, under the field's names. Waits for the device once.

        Returns:
            ``grad_norm`` (before clipping), ``grad_norm_clipped`` (where known), ``clip_coef``, ``clip_threshold``
            (where finite), and as 0 or 1 ``clipped``, ``skipped`` and ``nonfinite``, each behind ``prefix``.
        """
        told = self.to_dict()
        found = {name: float(told[key]) for key, name in _METRICS.items() if key in told}
        if not math.isfinite(found["clip_threshold"]):
            del found["clip_threshold"]
        return {prefix + name: value for name, value in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain Python numbers. Waits for the device once."""
        flags = ("clipped", "nonfinite", "skipped")
        numbers = ("total_norm", "clipped_norm", "coefficient", "threshold")
        fields = {name: getattr(self, name) for name in (*numbers, *flags) if getattr(self, name) is not None}
        tensors = [*fields.values(), *(self.per_tensor or {}).values()]
        values = torch.stack([tensor.double() for tensor in tensors]).tolist()
        result: dict[str, Any] = dict(zip(fields, values, strict=False))
        result |= {name: bool(result[name]) for name in flags}
        result["applied"] = self.applied
        if self.per_tensor is not None:
            result["per_tensor"] = dict(zip(self.per_tensor, values[len(fields) :], strict=True))
        return result
