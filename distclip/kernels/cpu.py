"""Gradients in main memory.

Here a result can be looked at without waiting for a device, so the fast way is tried first and its result judged: sums
of squares in float32 over short rows (which runs at the speed of a plain read and errs by 1e-8), and again in float64
where float32's range did not hold. ``torch._foreach_norm`` sums a whole tensor in float32: 1e-5 off for a million
elements, and inf or 0 outside 1e-19 to 1e19.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distclip.kernels.common import WIDE, by_dtype, flat, modulus, real

# Elements summed in float32 before float64 takes over: longer rows of equal values round to one side by over 1e-6.
_ROW = 512
# Up to this length a tensor is cheaper to sum in float64 than to cut into rows.
_SHORT = 16 * _ROW
# Elements converted to a wider dtype at a time: what bounds the extra memory.
_BLOCK = 512 * _ROW
_TINY32 = torch.finfo(torch.float32).tiny


def power_sums(tensors: list[Tensor], p: float) -> Tensor:
    sums = torch.empty(len(tensors), dtype=torch.float64)
    for dtype, places in by_dtype(tensors):
        group = [tensors[place] for place in places]
        fast = p == 2 and dtype not in WIDE
        sums[places] = _squares(group) if fast else torch.stack([_in_float64(tensor, p) for tensor in group])
    return sums


def _squares(tensors: list[Tensor]) -> Tensor:
    """Sums of squares of tensors of one dtype, by float32 rows where these suffice."""
    parts = [real(tensor) for tensor in tensors]
    numels = torch.tensor([part.numel() for part in parts])
    sums = torch.empty(len(parts), dtype=torch.float64)
    for chosen, dtype in ((numels <= _ROW, torch.float32), ((numels > _ROW) & (numels <= _SHORT), torch.float64)):
        places = chosen.nonzero().flatten().tolist()
        if places:
            norms = torch._foreach_norm([parts[place] for place in places], 2.0, dtype=dtype)
            sums[places] = torch.stack(norms).double().square_()
    for place in (numels > _SHORT).nonzero().flatten().tolist():
        sums[place] = _row_squares(parts[place])
    # A square below float32's range may count as 0: that matters only where the whole sum is hardly larger.
    trusted = sums.isfinite() & (sums >= numels * (_TINY32 * 1e9))
    for place in (~trusted).nonzero().flatten().tolist():
        sums[place] = _in_float64(tensors[place], 2.0)
    return sums


def _row_squares(tensor: Tensor) -> Tensor:
    elements = flat(tensor)
    # Another dtype than float32 is converted first, as a whole: hand it over block by block.
    block = elements.numel() if tensor.dtype == torch.float32 else _BLOCK
    norms = []
    for part in elements.split(block):
        whole = part.numel() - part.numel() % _ROW
        rows, rest = part[:whole].view(-1, _ROW), part[whole:]
        norms.append(torch.linalg.vector_norm(rows, 2.0, dim=1, dtype=torch.float32))
        if rest.numel():
            norms.append(torch.linalg.vector_norm(rest, 2.0, dtype=torch.float32).view(1))
    return torch.cat(norms).double().square_().sum()


def _in_float64(tensor: Tensor, p: float) -> Tensor:
    """The same for any p, dtype and size of values."""
    norms = torch.stack([torch.linalg.vector_norm(_widened(part), p) for part in flat(tensor).split(_BLOCK)])
    return norms.max() if math.isinf(p) else norms.pow_(p).sum()


def _widened(part: Tensor) -> Tensor:
    return part.to(torch.complex128).abs() if part.is_complex() else part.to(torch.float64)


def extremes(tensors: list[Tensor]) -> Tensor:
    ends = [torch.stack(torch.aminmax(modulus(tensor))).double() for tensor in tensors]
    return torch.stack(ends) * torch.tensor([-1.0, 1.0], device=ends[0].device)


def scale_(tensors: list[Tensor], coefficients: Tensor, foreach: bool) -> None:
    # The CPU has no foreach kernels: torch loops, and rounds the coefficient to bf16 or fp16 before it multiplies.
    values = coefficients.expand(len(tensors)).tolist()
    for tensor, coefficient in zip(tensors, values, strict=True):
        if coefficient != 1.0:
            for factor in _factors(coefficient):
                tensor.mul_(factor)


def _factors(coefficient: float) -> tuple[float, ...]:
    """The coefficient as factors that float32, in which torch scales, holds to full precision."""
    return (coefficient,) if not 0.0 < coefficient < _TINY32 else (2.0**-64, coefficient * 2.0**64)


def clamp_(tensors: list[Tensor], low: float, high: float, foreach: bool) -> None:
    for tensor in tensors:
        tensor.clamp_(low, high)
