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
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from distclip.kernels.common import SERIAL, WIDE, by_dtype, flat, modulus, real, summed, together

# Elements summed in float32 before float64 takes over: in longer rows (one large element, then many equal ones) all
# roundings can go to one side, which adds up to over 1e-6.
_ROW = 128
# Up to this length a tensor is cheaper to join with others than to look at by itself.
_SHORT = 1 << 13
# Elements copied at a time, which bounds the extra memory: at most so many, and one in so many of all.
_BLOCK, _PART = 1 << 18, 120
_TINY32 = torch.finfo(torch.float32).tiny


def power_sums(tensors: list[Tensor], p: float) -> Tensor:
    groups = [(dtype, places, _chosen(tensors, places)) for dtype, places in by_dtype(tensors)]
    sums = [_each_squared(group) if _is_fast(dtype, p) else _each_in_float64(group, p) for dtype, _, group in groups]
    if len(groups) == 1:
        return sums[0]
    every = torch.empty(len(tensors), dtype=torch.float64, device="cpu")
    for (_, places, _), each in zip(groups, sums, strict=True):
        every[places] = each
    return every


def total_power(tensors: list[Tensor], p: float) -> Tensor:
    totals = []
    for dtype, places in by_dtype(tensors):
        group = _chosen(tensors, places)
        total = _squared(group) if _is_fast(dtype, p) else None
        totals.append(float(together(_each_in_float64(group, p), p)) if total is None else total)
    return torch.tensor(max(totals) if math.isinf(p) else sum(totals), dtype=torch.float64, device="cpu")


def _chosen(tensors: list[Tensor], places: list[int]) -> list[Tensor]:
    return tensors if len(places) == len(tensors) else [tensors[place] for place in places]


def _is_fast(dtype: torch.dtype, p: float) -> bool:
    return p == 2 and dtype not in WIDE


def _each_squared(tensors: list[Tensor]) -> Tensor:
    """The sum of squares of each, of one dtype no wider than float32."""
    parts = _Parts.of(tensors)
    joined = _each_joined(parts)
    if not parts.long:
        return joined
    sums = torch.empty(len(tensors), dtype=torch.float64, device="cpu")
    sums[parts.short_places] = joined
    room = parts.room()
    for place, part in zip(parts.long_places, parts.long, strict=True):
        total = _sum_of_squares(_norms(flat(part), parts, room))
        sums[place] = total if _trusted(total, part.numel()) else _in_float64(part, 2.0)
    return sums


def _squared(tensors: list[Tensor]) -> float | None:
    """The sum of squares of all, of one dtype no wider than float32; None where float32 is too narrow."""
    parts = _Parts.of(tensors)
    room = parts.room()
    norms = [norm for part in parts.long for norm in _norms(flat(part), parts, room)]
    for block in parts.blocks(parts.joined):
        norms += _norms(_end_to_end(parts.short[block]), parts, room)
    total = _sum_of_squares(norms)
    return total if _trusted(total, parts.numel) else None


def _sum_of_squares(norms: Iterable[Tensor]) -> float:
    return float(summed(torch.stack(list(norms)).square_()))


class _Parts(NamedTuple):
    """Tensors of one dtype, made real, by what is cheaper: to join them or to look at each."""

    short: list[Tensor]
    short_places: list[int]
    short_numels: list[int]
    long: list[Tensor]
    long_places: list[int]
    numel: int
    itemsize: int

    @classmethod
    def of(cls, tensors: list[Tensor]) -> _Parts:
        if tensors[0].is_complex():
            tensors = [real(tensor) for tensor in tensors]
        numels, itemsize = list(map(Tensor.numel, tensors)), tensors[0].itemsize
        if max(numels) <= _SHORT:
            return cls(tensors, list(range(len(tensors))), numels, [], [], sum(numels), itemsize)
        short = [place for place, numel in enumerate(numels) if numel <= _SHORT]
        long = [place for place, numel in enumerate(numels) if numel > _SHORT]
        joined, wholes = [tensors[place] for place in short], [tensors[place] for place in long]
        return cls(joined, short, [numels[place] for place in short], wholes, long, sum(numels), itemsize)

    @property
    def block(self) -> int:
        """How many elements may be copied to float32 at a time."""
        return min(max(self.numel * self.itemsize // (4 * _PART), _SHORT // 2), _BLOCK)

    @property
    def joined(self) -> int:
        """How many elements of short tensors may be joined at a time."""
        # Of bf16 and fp16 there are two copies then.
        return self.block if self.itemsize == torch.float32.itemsize else self.block * 2 // 3

    def room(self) -> Tensor | None:
        """For copies in float32; made once, because the system clears what it hands out. None where there are none."""
        if self.itemsize == torch.float32.itemsize:
            return None
        return torch.empty(self.block if self.long else max(self.joined, _SHORT), dtype=torch.float32, device="cpu")

    def blocks(self, size: int) -> Iterator[slice]:
        """The short ones in groups of about so many elements."""
        ends = list(accumulate(self.short_numels, initial=0))
        start = 0
        while start < len(self.short):
            stop = max(start + 1, bisect_right(ends, ends[start] + size) - 1)
            yield slice(start, stop)
            start = stop


def _each_joined(parts: _Parts) -> Tensor:
    """The sum of squares of each short tensor, in float64."""
    sums = torch.empty(len(parts.short), dtype=torch.float64, device="cpu")
    # Their copies are two and a half times as wide, and are there twice.
    for block in parts.blocks(parts.block // 4):
        sums[block] = _segments(parts.short[block], parts.short_numels[block])
    return sums


def _segments(tensors: list[Tensor], numels: list[int]) -> Tensor:
    squares = _end_to_end(tensors).double().square_()
    return torch.segment_reduce(squares, "sum", lengths=torch.tensor(numels, device="cpu"))


def _end_to_end(tensors: list[Tensor]) -> Tensor:
    with _without_autocast():
        # Vectors, which most short tensors are, need no views.
        vectors = set(map(Tensor.dim, tensors)) == {1}
        return torch.cat(tensors) if vectors else _flatten_dense_tensors(tensors)


def _without_autocast() -> AbstractContextManager[None]:
    """Autocast would choose a dtype for joined tensors, or refuse those of the dtype that it does not go by."""
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()


def _norms(elements: Tensor, parts: _Parts, room: Tensor | None) -> Iterator[Tensor]:
    """Norms of what makes up the whole; float64, 0-d. Made in float32, whose range may not suffice.

    Args:
        parts: among which they are.
        room: for bf16 and fp16, whose own norms are of that dtype: where they are copied to, as many as fit at a time.
    """
    if room is None:
        # What is kept for each row is a fortieth of it.
        for part in elements.split(max(parts.numel // 4, _BLOCK)):
            yield from _norms_of_rows(part)
        return
    count = -(-elements.numel() // room.numel())
    size = -(-elements.numel() // (count * _ROW)) * _ROW
    for part in elements.split(min(size, room.numel())):
        yield from _norms_of_rows(room[: part.numel()].copy_(part))


def _norms_of_rows(elements: Tensor) -> Iterator[Tensor]:
    count, rest = divmod(elements.numel(), _ROW)
    if count:
        rows = (elements.narrow(0, 0, count * _ROW) if rest else elements).view(count, _ROW)
        norms = torch.linalg.vector_norm(rows, 2.0, dim=1)
        yield torch.linalg.vector_norm(norms, 2.0, dtype=torch.float64)
    if rest:
        yield torch.linalg.vector_norm(elements.narrow(0, count * _ROW, rest), 2.0, dtype=torch.float64)


def _trusted(total: float, numel: int) -> bool:
    """Whether float32 sufficed for a sum of squares."""
    # A square below float32's range may count as 0: that matters only where the whole sum is hardly larger.
    return numel * (_TINY32 * 1e9) <= total < math.inf


def _each_in_float64(tensors: list[Tensor], p: float) -> Tensor:
    return torch.stack([_in_float64(tensor, p) for tensor in tensors])


def _in_float64(tensor: Tensor, p: float) -> Tensor:
    """``sum(|x|**p)``, or the largest, for any p, dtype and size of values."""
    return together(torch.stack([_power(_widened(part), p) for part in flat(tensor).split(_BLOCK)]), p)


def _power(elements: Tensor, p: float) -> Tensor:
    if elements.numel() <= SERIAL:
        # Most tensors: starting more operations would cost as much again.
        norm: Tensor = torch.linalg.vector_norm(elements, p)
        return norm if math.isinf(p) else norm.pow_(p)
    whole = elements.numel() // SERIAL * SERIAL
    rows = torch.linalg.vector_norm(elements[:whole].view(-1, SERIAL), p, dim=1)
    rest = torch.linalg.vector_norm(elements[whole:], p) if whole < elements.numel() else rows.new_zeros(())
    norms = torch.cat((rows, rest.view(1)))
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
    if dtype in (torch.float32, torch.float64) and not any(map(Tensor.is_neg, tensors)):  # which foreach refuses
        # Faster than with a Python number. One of bf16 or fp16 would be rounded before it is multiplied with.
        torch._foreach_mul_(tensors, torch.tensor(factor, dtype=dtype, device="cpu"))
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
