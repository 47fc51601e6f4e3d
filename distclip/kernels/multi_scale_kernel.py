"""The kernel of ``multi_scale``; imported where Triton is."""

import triton
import triton.language as tl


@triton.jit
def multiply(addresses, sizes, coefficients, stride, DTYPE: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):
    """Scale the tensor of the first program id, shared by the programs of the second. A coefficient of 1 ends it."""
    which = tl.program_id(0)
    factor = tl.load(coefficients + which * stride).to(tl.float32)
    if factor != 1.0:
        size = tl.load(sizes + which)
        data = tl.load(addresses + which).to(tl.pointer_type(DTYPE))
        for start in range(tl.program_id(1) * BLOCK, size, PROGRAMS * BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            inside = offsets < size
            values = tl.load(data + offsets, mask=inside)
            tl.store(data + offsets, (values.to(tl.float32) * factor).to(DTYPE), mask=inside)
