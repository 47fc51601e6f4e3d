"""Gradients on a GPU or another accelerator: a few launches for many tensors, accumulation in float64, and never a look
at a result from the host.

On CUDA kernels in Triton serve, ``multi_norm`` and ``multi_scale``. Where one is missing, fails its trial or cannot
read a tensor, torch's foreach operations do, and single ones where foreach would round.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from distclip.kernels import multi_norm, multi_scale
from distclip.kernels.chunks import Chunks, can_cut, cut
from distclip.kernels.common import by_dtype, modulus, real, taken, together

_NATIVE_SCALARS = frozenset({torch.float32, torch.float64})


def power_sums(tensors: list[Tensor], p: float) -> Tensor:
    sums, order = [], []
    for group, places in _groups(tensors, real if p == 2 else modulus):
        chunks = _to_sum(group, p)
        sums.append(_foreach_sums(group, p) if chunks is None else multi_norm.power_sums(chunks, p))
        order += places
    if len(sums) == 1:
        return sums[0]
    return taken(torch.cat(sums), sorted(range(len(order)), key=order.__getitem__))


def total_power(tensors: list[Tensor], p: float) -> Tensor:
    totals = []
    for group, _ in _groups(tensors, real if p == 2 else modulus):
        chunks = _to_sum(group, p)
        totals.append(together(_foreach_sums(group, p), p) if chunks is None else multi_norm.total_power(chunks, p))
    return totals[0] if len(totals) == 1 else together(torch.stack(totals), p)


def _groups(tensors: list[Tensor], as_real: Callable[[Tensor], Tensor]) -> list[tuple[list[Tensor], list[int]]]:
    """Tensors that can be handled in one go, and their places; complex ones made real."""
    found = defaultdict(list)
    for place, tensor in enumerate(tensors):
        found[tensor.dtype, can_cut(tensor)].append(place)
    return [
        ([as_real(tensors[place]) if dtype.is_complex else tensors[place] for place in places], places)
        for (dtype, _), places in found.items()
    ]


def _to_sum(group: list[Tensor], p: float) -> Chunks | None:
    return _chunks(group, multi_norm.can_sum(group[0].device, group[0].dtype, p))


def _to_scale(group: list[Tensor]) -> Chunks | None:
    return _chunks(group, multi_scale.can_scale(group[0].device, group[0].dtype))


def _chunks(group: list[Tensor], served: bool) -> Chunks | None:
    """The group as Triton's kernels read it, where these have passed their trial; None where torch serves."""
    return cut(group) if served and can_cut(group[0]) else None


def _foreach_sums(group: list[Tensor], p: float) -> Tensor:
    norms = torch.stack(torch._foreach_norm(group, p, dtype=torch.float64))
    return norms if math.isinf(p) else norms.pow_(p)


def extremes(tensors: list[Tensor]) -> Tensor:
    lows, highs = zip(*(torch.aminmax(modulus(tensor)) for tensor in tensors), strict=True)
    return torch.stack((torch.stack(lows).double().neg_(), torch.stack(highs).double()), dim=1)


def scale_(tensors: list[Tensor], coefficients: Tensor, foreach: bool) -> None:
    groups = _groups(tensors, real)
    for group, places in groups:
        factors = coefficients if coefficients.ndim == 0 or len(groups) == 1 else taken(coefficients, places)
        chunks = _to_scale(group) if foreach else None
        if chunks is not None:
            multi_scale.scale_(group, chunks, factors)
        elif foreach and group[0].dtype in _NATIVE_SCALARS:
            native = factors.to(group[0].dtype)
            torch._foreach_mul_(group, list(native.unbind()) if native.ndim else native)
        else:
            _scale_singly(group, factors)


def _scale_singly(group: list[Tensor], factors: Tensor) -> None:
    # torch rounds a 0-d factor to the gradient's dtype. One of shape (1,) promotes the arithmetic instead, and the
    # result alone is rounded.
    for tensor, factor in zip(group, factors.expand(len(group)).unbind(), strict=True):
        elements = tensor if tensor.ndim else tensor.view(1)
        torch.mul(elements, factor.view(1), out=elements)


def clamp_(tensors: list[Tensor], low: float, high: float, foreach: bool) -> None:
    if foreach:
        for _, places in by_dtype(tensors):
            group = [tensors[place] for place in places]
            torch._foreach_clamp_min_(group, low)
            torch._foreach_clamp_max_(group, high)
    else:
        for tensor in tensors:
            tensor.clamp_(low, high)
