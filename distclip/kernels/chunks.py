"""Where gradients lie, as kernels in Triton read it: cut into chunks of the same size, whatever the tensors' sizes.

One program a chunk keeps a whole GPU busy with 20,000 tensors of 64 elements as with one of a GiB. How sizes are cut is
copied to the device once; addresses, where they have changed. No copy waits: it goes through pinned memory, which
torch hands out again only after the copy is done.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from distclip.kernels.common import to_device

# Of a chunk. A program of 256 threads reads its 8 rows at 16 bytes a thread.
_BYTES = 1 << 15
ROWS, WARPS = 8, 8
# Sets of tensors remembered at a time: a clip has one for each dtype, one in the backward pass one for each size.
_KEPT = 64


@dataclass(frozen=True)
class Chunks:
    """Tensors of one device and dtype, cut; int64, on the device, shape ``(count,)`` unless said otherwise."""

    dtype: torch.dtype
    columns: int
    """A whole chunk has ``ROWS`` times as many elements."""
    count: int
    most: int
    """Chunks of the largest tensor."""
    addresses: Tensor
    sizes: Tensor
    """Elements of each chunk."""
    owners: Tensor
    """The place of each chunk's tensor."""
    offsets: Tensor
    """Bytes between the beginnings of tensor and chunk."""
    firsts: Tensor
    """The first chunk of each tensor, and ``count``; shape ``(tensors + 1,)``."""

    @property
    def triton_dtype(self) -> Any:
        import triton.language as tl

        return getattr(tl, str(self.dtype).removeprefix("torch."))


# The stream too: another may still read a table when this one gets the memory of it.
_Key = tuple[int, torch.device, torch.dtype, tuple[int, ...]]
# With the addresses of the tensors.
_known: dict[_Key, tuple[tuple[int, ...], Chunks]] = {}
# A CUDA graph reads these whenever it is replayed.
_captured: list[Chunks] = []


def can_cut(tensor: Tensor) -> bool:
    """Whether a tensor's elements lie side by side in memory, in any order, where its address says."""
    # A tensor of another class, such as one that a collective has yet to fill, has an address of its own idea.
    return (type(tensor) is Tensor or type(tensor) is Parameter) and (
        tensor.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))
    )


def cut(tensors: list[Tensor]) -> Chunks | None:
    """The chunks of tensors of one device and dtype that ``can_cut``; never waits for the device.

    None where a CUDA graph is being captured and the tensors did not lie there before: the copy would be captured too,
    and each replay would read host memory that others use by then.
    """
    first = tensors[0]
    stream = torch.cuda.current_stream(first.device).cuda_stream if first.device.type == "cuda" else 0
    key = stream, first.device, first.dtype, tuple(map(Tensor.numel, tensors))
    places = tuple(map(Tensor.data_ptr, tensors))
    capturing = first.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    known = _known.pop(key, None)
    if known is None or known[0] != places:
        if capturing:
            if known is not None:
                _known[key] = known
            return None
        known = places, _at(places, _cut(*key[1:]) if known is None else known[1])
    elif capturing:
        _captured.append(known[1])
    _known[key] = known
    if len(_known) > _KEPT:
        del _known[next(iter(_known))]
    return known[1]


def _at(places: tuple[int, ...], chunks: Chunks) -> Chunks:
    starts = to_device(torch.tensor(places, dtype=torch.int64, device="cpu"), chunks.owners.device)
    return replace(chunks, addresses=starts.index_select(0, chunks.owners).add_(chunks.offsets))


def _cut(device: torch.device, dtype: torch.dtype, numels: tuple[int, ...]) -> Chunks:
    length = _BYTES // dtype.itemsize
    sizes = torch.tensor(numels, dtype=torch.int64, device="cpu")
    counts = (sizes + (length - 1)) // length
    firsts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    count = int(firsts[-1])
    owners = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), counts)
    starts = (torch.arange(count, device="cpu") - firsts[owners]) * length
    parts = ((sizes[owners] - starts).clamp_(max=length), owners, starts * dtype.itemsize, firsts)
    own = to_device(torch.cat(parts), device).split([part.numel() for part in parts])
    return Chunks(dtype, length // ROWS, count, int(counts.max()), own[0].new_empty(0), *own)
