"""Scaling many tensors on a GPU in one launch that reads its coefficients there, and returns at once where they are 1.

torch's foreach multiplication writes every gradient even if nothing is clipped, and asking the device first would make
the host wait. This kernel, in Triton (which torch's CUDA builds bring along), looks at the coefficient before it
touches a gradient.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from distclip.kernels import trial
from distclip.kernels.chunks import ROWS, WARPS, Chunks, cut


def can_scale(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tensors there can be scaled here."""
    return trial.passed(_is_right, device, dtype)


def scale_(tensors: list[Tensor], chunks: Chunks, coefficients: Tensor) -> None:
    """Multiply in place by one float64 coefficient for all (0-d), or by one for each. No host sync."""
    from distclip.kernels.multi_scale_kernel import multiply

    # No more programs than run at a time: where nothing is to do they must not even take turns.
    grid = (min(chunks.count, _programs(coefficients.device)),)
    each, dtype = coefficients.ndim == 1, chunks.triton_dtype
    with torch.cuda.device_of(coefficients):
        multiply[grid](
            chunks.addresses,
            chunks.sizes,
            chunks.owners,
            coefficients.contiguous(),
            chunks.count,
            each,
            dtype,
            ROWS,
            chunks.columns,
            num_warps=WARPS,
        )
    # As an operation of torch would, for those who look whether gradients were written.
    increment_version(tensors)


@functools.cache
def _programs(device: torch.device) -> int:
    # In Triton's interpreter the device is the CPU.
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """In whole chunks and others, with one coefficient and with one for each."""
    for coefficients in (torch.tensor(0.5), torch.tensor([0.5, 1.0, 2.0])):
        factors = coefficients.to(device, torch.float64)
        values = (torch.arange(40_000, device=device) % 7 - 3).to(dtype)
        tensors = [values.clone(), values[:5].clone(), values.clone()[1:]]
        wanted = [(tensor * factor).to(dtype) for tensor, factor in zip(tensors, factors.expand(3), strict=True)]
        chunks = cut(tensors)
        assert chunks is not None
        scale_(tensors, chunks, factors)
        if not all(torch.equal(tensor, want) for tensor, want in zip(tensors, wanted, strict=True)):
            return False
    return True
