"""Gradients on a GPU or another accelerator: multi-tensor kernels, accumulation in float64, and never a look at a
result from the host."""

from __future__ import annotations

import torch
from torch import Tensor

from distclip.kernels import multi_scale
from distclip.kernels.common import by_dtype, modulus, real

_NATIVE_SCALARS = frozenset({torch.float32, torch.float64})


def power_sums(tensors: list[Tensor], p: float) -> Tensor:
    sums = torch.empty(len(tensors), dtype=torch.float64, device=tensors[0].device)
    for dtype, places in by_dtype(tensors):
        if dtype.is_complex:
            group = [real(tensors[place]) if p == 2 else tensors[place].abs() for place in places]
        else:
            group = [tensors[place] for place in places]
        # float64 accumulation costs nothing here: the kernel waits for memory.
        norms = torch.stack(torch._foreach_norm(group, p, dtype=torch.float64))
        index = torch.tensor(places, device=sums.device)
        sums[index] = norms if p == float("inf") else norms.pow_(p)
    return sums


def total_power(tensors: list[Tensor], p: float) -> Tensor:
    sums = power_sums(tensors, p)
    return sums.amax() if p == float("inf") else sums.sum()


def extremes(tensors: list[Tensor]) -> Tensor:
    ends = [torch.stack(torch.aminmax(modulus(tensor))).double() for tensor in tensors]
    return torch.stack(ends) * torch.tensor([-1.0, 1.0], device=ends[0].device)


def scale_(tensors: list[Tensor], coefficients: Tensor, foreach: bool) -> None:
    one_for_all = coefficients.ndim == 0
    for dtype, places in by_dtype(tensors):
        group = [tensors[place] for place in places]
        if foreach and multi_scale.can_scale(group):
            multi_scale.scale_(group, coefficients if one_for_all else coefficients[places])
            continue
        if foreach and dtype in _NATIVE_SCALARS:
            factors = coefficients.to(dtype)
            torch._foreach_mul_(group, factors if one_for_all else list(factors[places].unbind()))
            continue
        # torch rounds a 0-d factor to the gradient's dtype. One of shape (1,) promotes the arithmetic instead, and
        # the result alone is rounded.
        factor_dtype = torch.complex128 if dtype.is_complex else torch.float64
        for place, tensor in zip(places, group, strict=True):
            factor = coefficients if one_for_all else coefficients[place]
            elements = tensor if tensor.ndim else tensor.view(1)
            torch.mul(elements, factor.to(factor_dtype).view(1), out=elements)


def clamp_(tensors: list[Tensor], low: float, high: float, foreach: bool) -> None:
    if foreach:
        for _, places in by_dtype(tensors):
            group = [tensors[place] for place in places]
            torch._foreach_clamp_min_(group, low)
            torch._foreach_clamp_max_(group, high)
    else:
        for tensor in tensors:
            tensor.clamp_(low, high)
