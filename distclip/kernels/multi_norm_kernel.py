"""The kernels of ``multi_norm``; imported where Triton is."""

import triton
import triton.language as tl


# Where a table lies is nothing to compile another kernel for.
@triton.jit(do_not_specialize=["addresses", "sizes"])
def chunk_sums(
    addresses, sizes, partials, POWER: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Sum ``|x|**POWER`` over the chunk of the program's number, whatever the size of its values."""
    chunk = tl.program_id(0)
    data, size = tl.load(addresses + chunk).to(tl.pointer_type(DTYPE)), tl.load(sizes + chunk)
    total = _sum(data, size, 1.0, POWER, ROWS, COLUMNS)
    # Squares below float32's range lose digits, those above it are inf. Chunks of such values are read again, from the
    # cache; as are those of zeros, which look the same, and those with inf or NaN, which stay what they are.
    if not ((total >= 1e-30) & (total < float("inf"))):
        # The power of two that brings the largest value near 1, made of the bits of a float32.
        exponent = _largest(data, size, COLUMNS).to(tl.int32, bitcast=True) >> 23
        scale = (tl.minimum(tl.maximum(254 - exponent, 1), 254) << 23).to(tl.float32, bitcast=True)
        unscale = 1.0 / scale.to(tl.float64)
        total = _sum(data, size, scale, POWER, ROWS, COLUMNS) * unscale
        if POWER == 2:
            total *= unscale
    tl.store(partials + chunk, total)


@triton.jit
def _sum(data, size, scale, POWER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """In float32 over the few rows of a column, in float64 over columns; the same bits wherever the data lies."""
    columns = tl.arange(0, COLUMNS)
    sums = tl.zeros([COLUMNS], dtype=tl.float32)
    # Triton reads 16 bytes at a time only where there is no mask and the address is known to be a multiple of 16.
    if (size == ROWS * COLUMNS) & (data.to(tl.int64) % 16 == 0):
        for row in tl.static_range(ROWS):
            sums += _terms(tl.load(tl.multiple_of(data + row * COLUMNS + columns, 16)), scale, POWER)
    else:
        for start in range(0, size, COLUMNS):
            sums += _terms(tl.load(data + start + columns, mask=columns < size - start, other=0.0), scale, POWER)
    return tl.sum(sums.to(tl.float64), axis=0)


@triton.jit
def _terms(values, scale, POWER: tl.constexpr):
    values = tl.abs(values.to(tl.float32) * scale)
    return values * values if POWER == 2 else values


@triton.jit
def _largest(data, size, COLUMNS: tl.constexpr):
    columns = tl.arange(0, COLUMNS)
    largest = tl.zeros([COLUMNS], dtype=tl.float32)
    for start in range(0, size, COLUMNS):
        values = tl.load(data + start + columns, mask=columns < size - start, other=0.0)
        largest = tl.maximum(largest, tl.abs(values.to(tl.float32)))
    return tl.max(largest, axis=0)


@triton.jit(do_not_specialize=["firsts"])
def tensor_sums(partials, firsts, sums, BLOCK: tl.constexpr):
    """Add up the chunks of the tensor of the program's number, always in the same order."""
    which = tl.program_id(0)
    end = tl.load(firsts + which + 1)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(tl.load(firsts + which), end, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(partials + offsets, mask=offsets < end, other=0.0)
    tl.store(sums + which, tl.sum(total, axis=0))
