"""The reads and writes of gradients, one file per kind of device.

Each module has the same five functions, all on dense local tensors of one device, mixed dtypes allowed, none empty:
``power_sums``, ``total_power``, ``extremes``, ``scale_`` and ``clamp_``.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.utils._foreach_utils import _device_has_foreach_support

from distclip.hints import checked_flag
from distclip.kernels import accelerator, cpu


class Kernels(Protocol):
    """What each module offers."""

    def power_sums(self, tensors: list[Tensor], p: float) -> Tensor:
        """Sum of ``|x|**p`` over each tensor, for ``p = inf`` the largest ``|x|``; float64, shape ``(n,)``."""

    def total_power(self, tensors: list[Tensor], p: float) -> Tensor:
        """All of these summed up, for ``p = inf`` the largest of them; float64, 0-d."""

    def extremes(self, tensors: list[Tensor]) -> Tensor:
        """Largest of ``-x`` and of ``x`` in each tensor (complex: of ``|x|``), float64, shape ``(n, 2)``; NaN where
        there is a NaN."""

    def scale_(self, tensors: list[Tensor], coefficients: Tensor, foreach: bool) -> None:
        """Multiply in place by one float64 coefficient for all (0-d), or by one for each."""

    def clamp_(self, tensors: list[Tensor], low: float, high: float, foreach: bool) -> None:
        """Limit every element in place; NaN stays NaN."""


def kernels_for(device: torch.device) -> Kernels:
    return cpu if device.type == "cpu" else accelerator


def use_foreach(foreach: bool | None, device: torch.device) -> bool:
    """torch's meaning of ``foreach=``: True insists, None takes it where the device has it.

    Raises:
        RuntimeError: ``foreach=True`` on a device without foreach kernels.
        TypeError: it is a tensor or array of several.
    """
    foreach = None if foreach is None else checked_flag("foreach", foreach)
    supported: bool = _device_has_foreach_support(device)
    if foreach and not supported:
        raise RuntimeError(f"foreach=True was passed, but can't use the foreach API on {device.type} tensors")
    return supported and foreach is not False
