"""Scaling many tensors on a GPU in one launch that reads its coefficients there, and returns at once where they are 1.

torch's foreach multiplication writes every gradient even if nothing is clipped, and asking the device first would make
the host wait. This kernel, in Triton (which torch's CUDA builds bring along), looks at the coefficient before it
touches a gradient.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from distclip.warning import warn

# Elements of one step of a program, and programs that share a tensor.
_BLOCK, _PROGRAMS = 1024, 64
# Products are made in float32.
_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})

# By device and dtype, where the tensors scaled last lay, and their sizes: gradients often come to lie there again.
_tables: dict[tuple[torch.device, torch.dtype], tuple[tuple[int, ...], Tensor]] = {}


def can_scale(tensors: list[Tensor]) -> bool:
    """Whether these tensors, of one device and dtype, can be scaled here."""
    device = tensors[0].device
    if device.type != "cuda" or tensors[0].dtype not in _DTYPES or torch.cuda.is_current_stream_capturing():
        # A captured copy of the table would read host memory that others use by the time of the replay.
        return False
    return all(tensor.is_contiguous() for tensor in tensors) and _works_on(device)


def scale_(tensors: list[Tensor], coefficients: Tensor) -> None:
    """Multiply in place by one float64 coefficient for all (0-d), or by one for each. No host sync."""
    import triton.language as tl

    from distclip.kernels.multi_scale_kernel import multiply

    dtypes = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    addresses, sizes = _table(tensors).unbind()
    stride = coefficients.stride(0) if coefficients.ndim else 0
    grid = (len(tensors), _PROGRAMS)
    multiply[grid](addresses, sizes, coefficients, stride, dtypes[tensors[0].dtype], _BLOCK, _PROGRAMS)


def _table(tensors: list[Tensor]) -> Tensor:
    """Address and size of each tensor, shape ``(2, n)``, on their device."""
    first = tensors[0]
    numbers = (*(tensor.data_ptr() for tensor in tensors), *(tensor.numel() for tensor in tensors))
    known = _tables.get((first.device, first.dtype))
    if known is None or known[0] != numbers:
        table = torch.tensor(numbers, dtype=torch.int64).view(2, -1)
        if first.device.type == "cuda":
            table = table.pin_memory().to(first.device, non_blocking=True)
        known = _tables[first.device, first.dtype] = numbers, table
    return known[1]


@functools.cache
def _works_on(device: torch.device) -> bool:
    """Try it once: without Triton, or with one that compiles for no such device, torch's own operations serve."""
    tensors = [torch.arange(5.0, device=device), torch.ones(3 * _BLOCK, device=device)]
    wanted = [tensor * torch.tensor(0.5, device=device) for tensor in tensors]
    try:
        scale_(tensors, torch.tensor(0.5, dtype=torch.float64, device=device))
        right = all(torch.equal(tensor, want) for tensor, want in zip(tensors, wanted, strict=True))
    except ImportError:
        return False
    except Exception as error:
        warn(f"gradients on {device} are scaled by torch's own operations, because Triton failed: {error!r:.200}")
        return False
    return right
