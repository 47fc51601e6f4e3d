"""Gradients in main memory.

Here a result can be looked at without waiting for a device, so the fast way is tried first and its result judged: sums
of squares in float32 over short rows (which runs at the speed of a plain read and errs by less than 1e-6), and again in
float64 where float32's range did not hold. ``torch._foreach_norm`` sums a whole tensor in float32: 1e-5 off for a
million elements, and inf or 0 outside 1e-19 to 1e19. Starting an operation costs more than summing a small tensor, so
small ones are joined, in blocks that stay below a hundredth of the gradients' memory.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from distclip.kernels.common import WIDE, by_dtype, flat, modulus, real

# Elements summed in float32 before float64 takes over: longer rows of equal values round to one side by over 1e-6.
_ROW = 512
# Up to this length a tensor is cheaper to join with others than to look at by itself.
_SHORT = 16 * _ROW
# Elements copied at a time, which bounds the extra memory: at most so many, and one in so many of all.
_BLOCK, _PART = 512 * _ROW, 128
_TINY32 = torch.finfo(torch.float32).tiny


def power_sums(tensors: list[Tensor], p: float) -> Tensor:
    sums = torch.empty(len(tensors), dtype=torch.float64)
    for dtype, places in by_dtype(tensors):
        group = _chosen(tensors, places)
        sums[places] = _each_squared(group) if _is_fast(dtype, p) else _each_in_float64(group, p)
    return sums


def total_power(tensors: list[Tensor], p: float) -> Tensor:
    totals = []
    for dtype, places in by_dtype(tensors):
        group = _chosen(tensors, places)
        total = _squared(group) if _is_fast(dtype, p) else None
        totals.append(_combined(_each_in_float64(group, p), p) if total is None else total)
    return totals[0] if len(totals) == 1 else _combined(torch.stack(totals), p)


def _chosen(tensors: list[Tensor], places: list[int]) -> list[Tensor]:
    return tensors if len(places) == len(tensors) else [tensors[place] for place in places]


def _is_fast(dtype: torch.dtype, p: float) -> bool:
    return p == 2 and dtype not in WIDE


def _combined(powers: Tensor, p: float) -> Tensor:
    return powers.amax() if math.isinf(p) else powers.sum()


def _each_squared(tensors: list[Tensor]) -> Tensor:
    """The sum of squares of each, of one dtype no wider than float32."""
    parts = _Parts.of(tensors)
    sums = torch.empty(len(tensors), dtype=torch.float64)
    if parts.short:
        sums[parts.short_places] = _each_joined(parts)
    for place, part in zip(parts.long_places, parts.long, strict=True):
        square = torch.stack(list(_norms(flat(part)))).square_().sum()
        sums[place] = square if _trusted(square, part.numel()) else _in_float64(part, 2.0)
    return sums


def _squared(tensors: list[Tensor]) -> Tensor | None:
    """The sum of squares of all, of one dtype no wider than float32; None where float32 is too narrow."""
    parts = _Parts.of(tensors)
    norms = [norm for part in parts.long for norm in _norms(flat(part))]
    for block in parts.blocks(_PART):
        norms += _norms(_end_to_end(parts.short[block]))
    total = torch.stack(norms).square_().sum()
    return total if _trusted(total, parts.numel) else None


class _Parts(NamedTuple):
    """Tensors of one dtype, made real, by what is cheaper: to join them or to look at each."""

    short: list[Tensor]
    short_places: list[int]
    short_numels: list[int]
    long: list[Tensor]
    long_places: list[int]
    numel: int

    @classmethod
    def of(cls, tensors: list[Tensor]) -> _Parts:
        if tensors[0].is_complex():
            tensors = [real(tensor) for tensor in tensors]
        numels = list(map(Tensor.numel, tensors))
        if max(numels) <= _SHORT:
            return cls(tensors, list(range(len(tensors))), numels, [], [], sum(numels))
        short = [place for place, numel in enumerate(numels) if numel <= _SHORT]
        long = [place for place, numel in enumerate(numels) if numel > _SHORT]
        joined = [tensors[place] for place in short]
        return cls(
            joined, short, [numels[place] for place in short], [tensors[place] for place in long], long, sum(numels)
        )

    def blocks(self, part: int) -> Iterator[slice]:
        """The short ones in groups, each of about one ``part``-th of their elements."""
        ends = list(accumulate(self.short_numels, initial=0))
        size = min(max(ends[-1] // part, _SHORT // 2), _BLOCK)
        start = 0
        while start < len(self.short):
            stop = max(start + 1, bisect_right(ends, ends[start] + size) - 1)
            yield slice(start, stop)
            start = stop


def _each_joined(parts: _Parts) -> Tensor:
    """The sum of squares of each short tensor, in float64."""
    sums = []
    for block in parts.blocks(3 * _PART):
        squares = _end_to_end(parts.short[block]).double().square_()
        sums.append(torch.segment_reduce(squares, "sum", lengths=torch.tensor(parts.short_numels[block])))
    return torch.cat(sums)


def _end_to_end(tensors: list[Tensor]) -> Tensor:
    # Vectors, which most short tensors are, need no views.
    vectors = set(map(Tensor.dim, tensors)) == {1}
    return torch.cat(tensors) if vectors else _flatten_dense_tensors(tensors)


def _norms(elements: Tensor) -> Iterator[Tensor]:
    """Norms of parts that make up the whole; float64, 0-d. Made in float32, whose range may not suffice."""
    count, rest = divmod(elements.numel(), _ROW)
    if count:
        rows = (elements.narrow(0, 0, count * _ROW) if rest else elements).view(count, _ROW)
        norms = torch.linalg.vector_norm(rows, 2.0, dim=1) if rows.dtype == torch.float32 else _low_norms(rows)
        yield torch.linalg.vector_norm(norms, 2.0, dtype=torch.float64)
    if rest:
        yield torch.linalg.vector_norm(elements.narrow(0, count * _ROW, rest), 2.0, dtype=torch.float64)


def _low_norms(rows: Tensor) -> Tensor:
    """Norms of rows of bf16 or fp16, in float32."""
    # torch's norms of these are of their dtype, or of a copy in float32. But the gradient of a batch norm's weight,
    # sum(dy * (x - mean) * invstd), is summed in the dtype of the weight: with dy = x a sum of squares.
    channels, zeros, ones = rows.unsqueeze(0), torch.zeros(len(rows)), torch.ones(len(rows))
    _, squares, _ = torch.ops.aten.native_batch_norm_backward(
        channels, channels, ones, None, None, zeros, ones, True, 0.0, (False, True, False)
    )
    result: Tensor = squares.sqrt_()
    return result


def _trusted(total: Tensor, numel: int) -> bool:
    """Whether float32 sufficed for a sum of squares."""
    # A square below float32's range may count as 0: that matters only where the whole sum is hardly larger.
    return bool(numel * (_TINY32 * 1e9) <= float(total) < math.inf)


def _each_in_float64(tensors: list[Tensor], p: float) -> Tensor:
    return torch.stack([_in_float64(tensor, p) for tensor in tensors])


def _in_float64(tensor: Tensor, p: float) -> Tensor:
    """``sum(|x|**p)``, or the largest, for any p, dtype and size of values."""
    norms = torch.stack([torch.linalg.vector_norm(_widened(part), p) for part in flat(tensor).split(_BLOCK)])
    return norms.max() if math.isinf(p) else norms.pow_(p).sum()


def _widened(part: Tensor) -> Tensor:
    return part.to(torch.complex128).abs() if part.is_complex() else part.to(torch.float64)


def extremes(tensors: list[Tensor]) -> Tensor:
    ends = [torch.stack(torch.aminmax(modulus(tensor))).double() for tensor in tensors]
    return torch.stack(ends) * torch.tensor([-1.0, 1.0], device=ends[0].device)


def scale_(tensors: list[Tensor], coefficients: Tensor, foreach: bool) -> None:
    # What was read last is still in the cache.
    if coefficients.ndim == 0:
        for dtype, places in by_dtype(tensors):
            backwards = _chosen(tensors, places)[::-1]
            for factor in _factors(float(coefficients)):
                _scale_all(backwards, factor, dtype)
        return
    for tensor, coefficient in zip(reversed(tensors), reversed(coefficients.tolist()), strict=True):
        for factor in _factors(coefficient):
            tensor.mul_(factor)


def _scale_all(tensors: list[Tensor], factor: float, dtype: torch.dtype) -> None:
    if dtype in (torch.float32, torch.float64):
        # Faster than with a Python number. One of bf16 or fp16 would be rounded before it is multiplied with.
        torch._foreach_mul_(tensors, torch.tensor(factor, dtype=dtype))
        return
    for tensor in tensors:
        tensor.mul_(factor)


def _factors(coefficient: float) -> tuple[float, ...]:
    """The coefficient as factors that float32, in which torch scales, holds to full precision."""
    if coefficient == 1.0:
        return ()
    return (coefficient,) if not 0.0 < coefficient < _TINY32 else (2.0**-64, coefficient * 2.0**64)


def clamp_(tensors: list[Tensor], low: float, high: float, foreach: bool) -> None:
    for tensor in tensors:
        tensor.clamp_(low, high)
