"""What one clip did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    "nonfinite_steps": "nonfinite_steps",
}
_FLAGS = ("clipped", "nonfinite", "skipped")
_COUNTS = ("nonfinite_steps",)
_SCALARS = ("total_norm", "clipped_norm", "coefficient", "threshold", *_COUNTS, *_FLAGS)


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
    """Global norm after clipping, as ``total_norm``; None where elements were limited, or a later rule went by another
    ``norm_type``, after which only another read of the gradients could tell (``distclip.grad_norm``)."""
    nonfinite_steps: Tensor | None = None
    """In how many clips of this GradClipper so far, this one included, a gradient held an inf or NaN; int64."""
    quantities: Mapping[str, Tensor] = field(default_factory=dict)
    """What else the rule went by: ``zscore``, ``percentile`` ...; float64."""
    applied: str = "in place"
    """What was done with the gradients: "in place", they were written; "folded", the optimizer's fused step scales
    them; "skipped", the step is left out; "nothing", where there was nothing to do and that could be seen for free."""
    per_tensor: dict[str, Tensor] | None = None
    """Norm of each tensor before clipping, by name; float64. Only where the rule needs them, and in clips that
    ``GradClipper(details_every=...)`` names, where they are those of all ranks."""

    def metrics(self, prefix: str = "train/") -> dict[str, float]:
        """What trackers are to show, under the field's names. Waits for the device once.

        Returns:
            ``grad_norm`` (before clipping), ``grad_norm_clipped`` (where known), ``clip_coef``, ``clip_threshold``
            (where finite), ``nonfinite_steps``, as 0 or 1 ``clipped``, ``skipped`` and ``nonfinite``, and the rule's
            own quantities as ``clip_zscore`` and the like; each behind ``prefix``.
        """
        return {prefix + name: value for name, value in metrics_of(self.to_dict()).items()}

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain Python numbers. Waits for the device once."""
        (told,) = read([self])
        return told

    def dominant(self, count: int = 5) -> list[tuple[str, float]]:
        """The tensors with the largest norms, and each one's share of the squared global norm; waits for the device.

        Raises:
            ValueError: this clip has no norms per tensor.
        """
        norms = self._norms()
        return dominant(norms, count)

    def first_nonfinite(self) -> str | None:
        """The first tensor, in the order of the model, that holds an inf or NaN; None where there is none.

        Raises:
            ValueError: this clip has no norms per tensor.
        """
        return next((name for name, norm in self._norms().items() if not math.isfinite(norm)), None)

    def per_module(self, depth: int = 1) -> dict[str, float]:
        """L2 norms of modules: of all tensors whose names agree in the first ``depth`` components.

        Raises:
            ValueError: this clip has no norms per tensor, or ``depth`` is below 1.
        """
        return per_module(self._norms(), depth)

    def _norms(self) -> dict[str, float]:
        if self.per_tensor is None:
            raise ValueError(
                "this clip did not measure single tensors: make the clipper with GradClipper(..., details_every=1), or "
                "as often as they are wanted"
            )
        norms: dict[str, float] = self.to_dict()["per_tensor"]
        return norms


def read(reports: Sequence[ClipReport]) -> list[dict[str, Any]]:
    """Many reports as plain Python numbers, with one wait for the device."""
    if not reports:
        return []
    device = reports[-1].total_norm.device
    flat = [tensor for report in reports for tensor in _tensors(report).values()]
    values = iter(torch.stack([tensor.to(device, torch.float64) for tensor in flat]).tolist())
    return [_told(report, {name: next(values) for name in _tensors(report)}) for report in reports]


def metrics_of(told: Mapping[str, Any]) -> dict[str, float]:
    """``ClipReport.metrics`` of what ``to_dict`` returned, without a prefix."""
    found = {name: float(told[key]) for key, name in _METRICS.items() if key in told}
    if not math.isfinite(found["clip_threshold"]):
        del found["clip_threshold"]
    return found | {f"clip_{name}": value for name, value in told.get("quantities", {}).items()}


def dominant(norms: Mapping[str, float], count: int = 5) -> list[tuple[str, float]]:
    """The names with the largest of these L2 norms, and each one's share of the sum of squares."""
    largest = max(norms.values(), default=0.0)
    if not 0 < largest < math.inf:
        return []
    squares = {name: (norm / largest) ** 2 for name, norm in norms.items() if math.isfinite(norm)}
    ordered = sorted(squares, key=lambda name: -squares[name])[:count]
    total = math.fsum(squares.values())
    return [(name, squares[name] / total) for name in ordered]


def per_module(norms: Mapping[str, float], depth: int = 1) -> dict[str, float]:
    """L2 norms of the tensors whose names agree in the first ``depth`` components."""
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    parts: dict[str, list[float]] = {}
    for name, norm in norms.items():
        parts.setdefault(".".join(name.split(".")[:depth]), []).append(norm)
    return {name: math.hypot(*values) for name, values in parts.items()}


def _tensors(report: ClipReport) -> dict[tuple[str, ...], Tensor]:
    """All tensors of a report, each under where it stands in ``to_dict``."""
    found: dict[tuple[str, ...], Tensor] = {
        (name,): tensor for name in _SCALARS if (tensor := getattr(report, name)) is not None
    }
    found |= {("quantities", name): tensor for name, tensor in report.quantities.items()}
    return found | {("per_tensor", name): tensor for name, tensor in (report.per_tensor or {}).items()}


def _told(report: ClipReport, values: Mapping[tuple[str, ...], float]) -> dict[str, Any]:
    told: dict[str, Any] = {"applied": report.applied}
    told |= {name: {} for name in ("quantities", "per_tensor") if getattr(report, name)}
    for place, value in values.items():
        owner = told if len(place) == 1 else told[place[0]]
        owner[place[-1]] = value
    told |= {name: bool(told[name]) for name in _FLAGS} | {name: int(told[name]) for name in _COUNTS if name in told}
    return told
