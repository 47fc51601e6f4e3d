"""What a rule decided, done to the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from distclip.gradients import LocalGrads
from distclip.kernels import kernels_for, use_foreach


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
        kernels_for(device).scale_(
            local.pieces, factors if factors.ndim == 0 else factors[local.places], chosen[device]
        )


def clamp_(grads: dict[torch.device, LocalGrads], bounds: tuple[float, float], foreach: bool | None = None) -> None:
    """Limit the elements of the gradients in place. Never communicates; errors as for ``scale_``."""
    chosen = {device: use_foreach(foreach, device) for device in grads}
    for device, local in grads.items():
        kernels_for(device).clamp_(local.pieces, *bounds, chosen[device])
