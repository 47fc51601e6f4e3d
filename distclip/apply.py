"""What a rule decided, done to the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distclip import rows
from distclip.gradients import LocalGrads
from distclip.kernels import kernels_for, use_foreach
from distclip.kernels.common import taken
from distclip.plan import Plan
from distclip.rules.base import Bounds, Decision, Limits, Norms
from distclip.statistics import rows_in


@dataclass(frozen=True)
class Effect:
    """What one pass of rules does to gradients: first a factor, then, element by element, the rest."""

    coefficient: Tensor | None = None
    """As in ``Decision``."""
    limits: Limits | None = None
    outliers: tuple[Tensor, Tensor] | None = None
    shift: Tensor | None = None
    bite: Tensor | None = None
    """The smallest factor that any single element meets; None where nobody has looked."""

    @classmethod
    def of(cls, decisions: Sequence[Decision], norms: Norms, limits: Limits | None) -> Effect:
        """All decisions of a pass together; only the last may change elements one by one."""
        coefficient: Tensor | None = None
        for own in (decision.coefficient for decision in decisions):
            if coefficient is None or own is None:
                coefficient = own if coefficient is None else coefficient
                continue
            if norms.tensors is not None and coefficient.ndim and own.ndim and coefficient.shape != own.shape:
                coefficient, own = norms.tensors.spread(coefficient), norms.tensors.spread(own)
            coefficient = coefficient * own
        last = decisions[-1]
        return cls(coefficient, limits, last.outliers, last.shift, last.bite)

    @property
    def scales_only(self) -> bool:
        """Whether a coefficient is all there is."""
        return self.limits is None and self.outliers is None and self.shift is None

    @property
    def known_to_be_nothing(self) -> bool:
        """Whether nothing changes, where that can be seen without waiting for a device."""
        same = self.limits is None if self.bite is None else _known_to_be_one(self.bite)
        return same and self.shift is None and _known_to_be_one(self.coefficient)

    @property
    def smallest(self) -> Tensor | None:
        """The smallest factor that it applies; None where it only shifts."""
        parts = [part.amin() for part in (self.coefficient, self.bite) if part is not None and part.numel()]
        return torch.stack(parts).prod() if parts else None


def _known_to_be_one(coefficient: Tensor | None) -> bool:
    return coefficient is None or (coefficient.device.type == "cpu" and bool((coefficient == 1.0).all()))


def apply(
    plan: Plan,
    grads: dict[torch.device, LocalGrads],
    effect: Effect,
    grad_scale: Tensor | None = None,
    foreach: bool | None = None,
    *,
    unscale: bool = True,
) -> None:
    """Change gradients, all or some, in place. Local.

    Args:
        grad_scale: what the gradients are multiplied by, 0-d.
        unscale: whether to take that off.
    """
    coefficient, scale = effect.coefficient, grad_scale
    if unscale and scale is not None:
        one = torch.ones((), dtype=torch.float64, device=scale.device if coefficient is None else coefficient.device)
        coefficient = (one if coefficient is None else coefficient) / scale.to(one.device).double()
        scale = None
    if coefficient is not None and coefficient.ndim and coefficient.numel() != plan.slot_count:
        _scale_rows(plan, grads, coefficient)
    else:
        scale_(grads, _of_this_rank(plan, coefficient), foreach)
    if effect.shift is not None:
        _shift_rows(plan, grads, _scaled(effect.shift, scale))
    if effect.outliers is not None and not _known_to_be_one(effect.outliers[1]):
        _damp(plan, grads, _scaled(effect.outliers[0], scale), effect.outliers[1])
    if effect.limits is not None and (effect.bite is None or not _known_to_be_one(effect.bite)):
        _limit(plan, grads, effect.limits, 1.0 if scale is None else float(scale), foreach)


def _scaled(values: Tensor, scale: Tensor | None) -> Tensor:
    return values if scale is None else values * scale.to(values.device).double()


def _of_this_rank(plan: Plan, coefficient: Tensor | None) -> Tensor | None:
    """Of one coefficient for each tensor of the job, those for this rank's."""
    if coefficient is None or coefficient.ndim == 0:
        return coefficient
    return coefficient[plan.slots_on(coefficient.device)]


def scale_(grads: dict[torch.device, LocalGrads], coefficient: Tensor | None, foreach: bool | None = None) -> None:
    """Multiply the gradients in place by a coefficient for all (0-d), or by one for each tensor; None changes nothing.

    Never communicates. On the CPU, where looking at a coefficient is free, one of 1 costs no pass.

    Raises:
        RuntimeError: ``foreach=True`` on a device without foreach kernels; before anything is changed.
    """
    chosen = {device: use_foreach(foreach, device) for device in grads}
    if coefficient is None:
        return
    for device, local in grads.items():
        factors = coefficient.to(device)
        if factors.ndim and len(local.places) < len(factors):
            factors = taken(factors, local.places)
        kernels_for(device).scale_(local.pieces, factors, chosen[device])


def clamp_(grads: dict[torch.device, LocalGrads], bounds: Bounds, foreach: bool | None = None) -> None:
    """Limit the elements of the gradients in place. Never communicates; errors as for ``scale_``."""
    chosen = {device: use_foreach(foreach, device) for device in grads}
    for device, local in grads.items():
        kernels_for(device).clamp_(local.pieces, *bounds, chosen[device])


def _limit(
    plan: Plan, grads: dict[torch.device, LocalGrads], limits: Limits, scale: float, foreach: bool | None
) -> None:
    if isinstance(limits, tuple):
        clamp_(grads, (limits[0] * scale, limits[1] * scale), foreach)
        return
    for device, local in grads.items():
        for piece, place in zip(local.pieces, local.places, strict=True):
            bounds = plan.limit_of(place, limits)
            if bounds is not None:
                kernels_for(device).clamp_([piece], bounds[0] * scale, bounds[1] * scale, False)


def _damp(plan: Plan, grads: dict[torch.device, LocalGrads], limits: Tensor, factors: Tensor) -> None:
    """Multiply the elements of each tensor beyond its limit by its factor."""
    for device, local in grads.items():
        slots = plan.slots_on(limits.device)[plan.index(local.places, limits.device)]
        above, factor = limits[slots].to(device), factors[slots].to(device)
        for place, piece in enumerate(local.pieces):
            for part in rows.blocks(piece):
                wide = part.to(torch.complex128 if part.is_complex() else torch.float64)
                part.copy_(torch.where(wide.abs() > above[place], wide * factor[place], wide))


def _scale_rows(plan: Plan, grads: dict[torch.device, LocalGrads], factors: Tensor) -> None:
    _by_row(plan, grads, factors, rows.scale_)


def _shift_rows(plan: Plan, grads: dict[torch.device, LocalGrads], means: Tensor) -> None:
    _by_row(plan, grads, means, rows.shift_)


def _by_row(
    plan: Plan,
    grads: dict[torch.device, LocalGrads],
    values: Tensor,
    change: rows.Change,
) -> None:
    """Change each row with its own one of ``values``."""
    assert plan.described is not None
    firsts, slots = plan.described.first_units, plan.slots.tolist()
    for device, local in grads.items():
        own = values.to(device)
        for place, block in rows_in(plan, local):
            change(block, own[block.moved(firsts[slots[place]])])
