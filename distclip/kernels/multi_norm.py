"""Sums of squares, or of absolute values, of many tensors on a GPU in two launches.

torch's foreach norm launches once for every hundred or so tensors, and is right over the whole range of float32 only in
float64, in which most GPUs are slow. These kernels, in Triton (which torch's CUDA builds bring along), add up eight
terms at a time in float32 and the rest in float64; a chunk whose squares leave float32 is scaled by a power of two
first. A tensor's sum depends on its elements alone, to the last bit: not on where it lies, what is measured with it,
or which program comes first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distclip.kernels import trial
from distclip.kernels.chunks import ROWS, WARPS, Chunks, cut

# Chunks of a tensor that are added up at a time.
_BLOCK = 4096


def can_sum(device: torch.device, dtype: torch.dtype, p: float) -> bool:
    """Whether tensors there can be summed here."""
    return p in (1.0, 2.0) and trial.passed(_is_right, device, dtype)


def power_sums(chunks: Chunks, p: float) -> Tensor:
    """Sum of ``|x|**p`` over each tensor, for ``p`` 1 or 2; float64, shape ``(tensors,)``. No host sync."""
    import triton

    from distclip.kernels.multi_norm_kernel import tensor_sums

    partials = _partials(chunks, p)
    sums = partials.new_empty(chunks.firsts.numel() - 1)
    block = min(_BLOCK, triton.next_power_of_2(chunks.most))
    with torch.cuda.device_of(sums):
        tensor_sums[(sums.numel(),)](partials, chunks.firsts, sums, block, num_warps=1 if block < 512 else 4)
    return sums


def total_power(chunks: Chunks, p: float) -> Tensor:
    """The same over all tensors together, 0-d."""
    return _partials(chunks, p).sum()


def _partials(chunks: Chunks, p: float) -> Tensor:
    """The sum over each chunk."""
    from distclip.kernels.multi_norm_kernel import chunk_sums

    partials = torch.empty(chunks.count, dtype=torch.float64, device=chunks.addresses.device)
    grid, dtype = (chunks.count,), chunks.triton_dtype
    with torch.cuda.device_of(partials):
        chunk_sums[grid](chunks.addresses, chunks.sizes, partials, int(p), dtype, ROWS, chunks.columns, num_warps=WARPS)
    return partials


def _is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """On usual, extreme and non-finite values, in whole chunks and others."""
    limits, steps = torch.finfo(dtype), torch.arange(40_000, device=device) % 7 - 3
    for unit in (1.0, limits.max / 4, limits.tiny, float("inf")):
        values = (steps * unit).to(dtype)
        tensors = [values, values[:5], values[1:]]
        chunks = cut(tensors)
        assert chunks is not None
        wanted = torch.stack([tensor.double().square().sum() for tensor in tensors])
        for found, want in ((power_sums(chunks, 2.0), wanted), (total_power(chunks, 2.0), wanted.sum())):
            if not torch.allclose(found, want, rtol=1e-6, atol=0.0, equal_nan=True):
                return False
    return True
