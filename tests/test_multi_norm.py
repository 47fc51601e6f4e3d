"""The Triton kernels that sum: on a GPU, or in Triton's interpreter, wherever that installs (TRITON_INTERPRET=1)."""

import os

import pytest
import torch
from torch import Tensor

from distclip.kernels import multi_norm
from distclip.kernels.chunks import Chunks, cut

pytest.importorskip("triton", reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    # The interpreter is numpy, which warns where a GPU does not; and Triton 3.4 uses it in an older way.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|underflow) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def chunks_of(tensors: list[Tensor]) -> Chunks:
    chunks = cut(tensors)
    assert chunks is not None
    return chunks


def in_float64(tensors: list[Tensor], p: float) -> Tensor:
    return torch.stack([tensor.double().abs().pow(p).sum() for tensor in tensors])


def check(tensors: list[Tensor], p: float, rtol: float = 2e-7) -> None:
    sums, wanted = multi_norm.power_sums(chunks_of(tensors), p), in_float64(tensors, p)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, wanted, rtol=rtol, atol=0, equal_nan=True)
    total = multi_norm.total_power(chunks_of(tensors), p)
    torch.testing.assert_close(total, wanted.sum(), rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_a_chunk(dtype: torch.dtype, p: float) -> None:
    chunk = 32 * 1024 // dtype.itemsize
    sizes = (1, 5, chunk // 8, chunk - 1, chunk, chunk + 1, 3 * chunk, 3 * chunk + 7)
    check([torch.randn(size, device=DEVICE).to(dtype) for size in sizes], p)


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-25, 1e-19, 1e-15, 1.0, 1e15, 1e19, 1e20, 1e38])
def test_magnitudes_of_float32(magnitude: float, p: float) -> None:
    sizes = (3, 8192, 20_000)
    check([torch.randn(size, device=DEVICE).clamp(-3, 3).double().mul(magnitude).float() for size in sizes], p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_ends_of_short_dtypes(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    # The interpreter makes other numbers of bfloat16's subnormal ones.
    least = 1.0 if INTERPRETED and dtype == torch.bfloat16 else info.eps
    for value in (info.smallest_normal, info.smallest_normal * least, info.max):
        check([torch.full((size,), value, dtype=dtype, device=DEVICE) for size in (7, 16_384, 40_000)], 2.0)


def test_extreme_chunks_beside_usual_ones_and_zeros() -> None:
    values = torch.zeros(5 * 8192, device=DEVICE)
    values[:8192], values[8192:16_384], values[20_000] = 1.0, 1e-30, 1e20
    check([values, values[:16_384].clone(), torch.zeros(9000, device=DEVICE)], 2.0)


def test_equal_values_do_not_drift() -> None:
    # Float32 adds up a million of these to 1e-3 more than they are.
    check([torch.full((1 << 20,), 0.1, device=DEVICE)], 2.0, rtol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_so(dtype: torch.dtype) -> None:
    tensors = [torch.ones(20_000, dtype=dtype, device=DEVICE) for _ in range(5)]
    tensors[0][17_000], tensors[1][3], tensors[2][5] = float("inf"), float("-inf"), float("nan")
    tensors[3][7], tensors[3][18_000] = float("nan"), float("inf")
    sums = multi_norm.power_sums(chunks_of(tensors), 2.0).tolist()
    assert sums[:2] == [float("inf")] * 2
    assert sums[2] != sums[2]
    assert sums[3] != sums[3]
    assert sums[4] == 20_000


def test_more_chunks_than_are_added_up_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_norm, "_BLOCK", 4)
    check([torch.randn(size, device=DEVICE) for size in (100_000, 3, 70_000)], 2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_bits_wherever_a_tensor_lies(dtype: torch.dtype) -> None:
    values = torch.randn(50_000, device=DEVICE).to(dtype)
    found = set()
    for before in range(4):
        room = torch.empty(before + values.numel(), dtype=dtype, device=DEVICE)
        moved = room[before:].copy_(values)
        others = [torch.ones(11, dtype=dtype, device=DEVICE)] * before
        found.add(multi_norm.power_sums(chunks_of([*others, moved]), 2.0)[-1].item())
    assert len(found) == 1


def test_an_empty_tensor_sums_to_nothing() -> None:
    tensors = [torch.ones(2, device=DEVICE), torch.ones(0, device=DEVICE)]
    assert multi_norm.power_sums(chunks_of(tensors), 2.0).tolist() == [2, 0]
