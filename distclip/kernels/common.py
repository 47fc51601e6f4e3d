"""What the kernels of every device share."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter

import torch
from torch import Tensor

WIDE = frozenset({torch.float64, torch.complex128})
# So many elements torch reduces in one thread. More it shares out, and where they are cut, roundings go another way:
# ranks that do not reduce (DDP's) must not depend on how many threads each has.
SERIAL = 1 << 14
_DTYPE = attrgetter("dtype")


def by_dtype(tensors: Iterable[Tensor]) -> Iterator[tuple[torch.dtype, list[int]]]:
    """The places of the tensors of each dtype: foreach kernels take one dtype at a time."""
    dtypes = list(map(_DTYPE, tensors))
    if len(set(dtypes)) == 1:
        return iter([(dtypes[0], list(range(len(dtypes))))])
    places: dict[torch.dtype, list[int]] = defaultdict(list)
    for place, dtype in enumerate(dtypes):
        places[dtype].append(place)
    return iter(places.items())


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real ones: the same sum of squares."""
    # Conjugating a lazily conjugated tensor back costs nothing and changes no modulus.
    return torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor) if tensor.is_complex() else tensor


def modulus(tensor: Tensor) -> Tensor:
    """The tensor itself, unless it is complex."""
    return tensor.abs() if tensor.is_complex() else tensor


def flat(tensor: Tensor) -> Tensor:
    """All elements in one dimension, in any order; without a copy for every layout that leaves no gaps."""
    if not tensor.is_contiguous():
        axes = sorted(range(tensor.ndim), key=lambda axis: (tensor.stride(axis), tensor.size(axis)), reverse=True)
        tensor = tensor.permute(axes)
    return tensor.reshape(-1)


def together(powers: Tensor, p: float) -> Tensor:
    """The power sum of all, from those of each (see ``Kernels.power_sums``)."""
    return powers.amax() if math.isinf(p) else summed(powers)


def summed(values: Tensor) -> Tensor:
    """The sum of a vector; the same bits however many threads there are."""
    if values.numel() <= SERIAL:
        return values.sum()
    return torch.stack([part.sum() for part in values.split(SERIAL)]).sum()


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers of the host on a device, without waiting for it."""
    if device.type != "cuda":
        return numbers.to(device)
    # Pinned memory is handed out again only when the copies from it are done.
    pinned = numbers.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


def taken(values: Tensor, places: list[int]) -> Tensor:
    """``values[places]``, where an index that was used before is on the device already."""
    return values.index_select(0, index(places, values.device))


def index(places: Sequence[int], device: torch.device) -> Tensor:
    """Places as a tensor; those that were asked for before are on the device already."""
    if device.type == "cpu":
        return torch.tensor(places, dtype=torch.int64, device="cpu")
    found = _index(tuple(places), device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(found)
    return found


@functools.lru_cache(maxsize=8)
def _index(places: tuple[int, ...], device: torch.device) -> Tensor:
    return to_device(torch.tensor(places, dtype=torch.int64, device="cpu"), device)


# What a CUDA graph reads whenever it is replayed.
_captured: list[Tensor] = []
