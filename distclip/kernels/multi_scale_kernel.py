"""The kernel of ``multi_scale``; imported where Triton is."""

import triton
import triton.language as tl


# Where a table lies, or how long it is, is nothing to compile another kernel for.
@triton.jit(do_not_specialize=["addresses", "sizes", "owners", "coefficients", "chunks"])
def multiply(
    addresses,
    sizes,
    owners,
    coefficients,
    chunks,
    EACH: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Scale all chunks, shared by the programs, by one coefficient or by that of each one's owner; 1 writes nothing."""
    if EACH or tl.load(coefficients).to(tl.float32) != 1.0:
        for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
            factor = tl.load(coefficients + (tl.load(owners + chunk) if EACH else 0))
            if factor.to(tl.float32) != 1.0:
                data, size = tl.load(addresses + chunk).to(tl.pointer_type(DTYPE)), tl.load(sizes + chunk)
                _scale(data, size, factor, DTYPE, ROWS, COLUMNS)


@triton.jit
def _scale(data, size, factor, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.arange(0, COLUMNS)
    # Float32 holds a factor below its normal numbers to fewer digits: such a one is applied in two.
    shift = tl.where(tl.abs(factor) < 1e-37, 18446744073709551616.0, 1.0)
    first, then = (factor * shift).to(tl.float32), (1.0 / shift).to(tl.float32)
    # Triton moves 16 bytes at a time only where there is no mask and the address is known to be a multiple of 16.
    if (size == ROWS * COLUMNS) & (data.to(tl.int64) % 16 == 0):
        # All is read before anything is written: a store would hold up the loads that come after it.
        rows = tl.arange(0, ROWS)
        pointers = tl.multiple_of(data + rows[:, None] * COLUMNS + columns[None, :], (16, 16))
        tl.store(pointers, (tl.load(pointers).to(tl.float32) * first * then).to(DTYPE))
    else:
        for start in range(0, size, COLUMNS):
            inside = columns < size - start
            values = tl.load(data + start + columns, mask=inside)
            tl.store(data + start + columns, (values.to(tl.float32) * first * then).to(DTYPE), mask=inside)
