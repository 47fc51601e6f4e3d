"""The reads and writes of gradients on the CPU: exact whatever the sizes, the values and torch's own settings."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import distclip
from distclip.bench.counters import peak_memory
from distclip.kernels import cpu

NARROW = [torch.float32, torch.bfloat16, torch.float16]
EDGES = (1, 5, 127, 128, 129, 4096, 8191, 8192, 8193, 100_003)


def squares(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.to(torch.complex128).abs().square().sum() for tensor in tensors])


def assert_right(tensors: list[Tensor]) -> None:
    want = squares(tensors)
    torch.testing.assert_close(cpu.power_sums(tensors, 2.0), want, rtol=2e-6, atol=0.0, equal_nan=True)
    torch.testing.assert_close(cpu.total_power(tensors, 2.0), want.sum(), rtol=2e-6, atol=0.0, equal_nan=True)
    for p in (1.0, math.inf):
        each = torch.stack([torch.linalg.vector_norm(tensor.double().flatten(), p) for tensor in tensors])
        torch.testing.assert_close(cpu.power_sums(tensors, p), each, rtol=1e-12, atol=0.0)
        whole = each.amax() if math.isinf(p) else each.sum()
        torch.testing.assert_close(cpu.total_power(tensors, p), whole, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_sizes_at_the_edges(dtype: torch.dtype) -> None:
    tensors = [torch.randn(size).to(dtype) for size in EDGES]
    assert_right(tensors)
    assert_right(
        [*tensors, torch.randn(3, 4).t().to(dtype), torch.randn(()).to(dtype), torch.randn(90, 200).to(dtype).t()]
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9000), st.sampled_from(NARROW)), min_size=1, max_size=12))
def test_any_sizes_and_dtypes(shapes: list[tuple[int, torch.dtype]]) -> None:
    assert_right([torch.randn(size).to(dtype) for size, dtype in shapes])


@pytest.mark.parametrize("size", [4096, 1 << 16])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_roundings_to_one_side(dtype: torch.dtype, size: int) -> None:
    """A large element in each row, and equal ones after it: float32 rounds all of these alike."""
    for value in (1.2, 1.1, 0.7, 1.3):
        for every in (128, 512):
            tensor = torch.full((size,), value).to(dtype)
            tensor[::every] = 1024.0
            want = float(tensor.double().norm())
            assert math.sqrt(float(cpu.total_power([tensor], 2.0))) == pytest.approx(want, rel=1e-6)
            assert math.sqrt(float(cpu.power_sums([tensor], 2.0))) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("value", [1e-25, 1e-40, 1e20, 3e38, math.inf, math.nan])
@pytest.mark.parametrize("size", [7, 8192, 50_000])
def test_extreme_values(value: float, size: int) -> None:
    tensors = [torch.full((size,), value), torch.ones(3), torch.randn(9000)]
    assert_right_squares(tensors)
    assert_right_squares(tensors[:1])


def assert_right_squares(tensors: list[Tensor]) -> None:
    want = squares(tensors)
    torch.testing.assert_close(cpu.power_sums(tensors, 2.0), want, rtol=2e-6, atol=0.0, equal_nan=True)
    torch.testing.assert_close(cpu.total_power(tensors, 2.0), want.sum(), rtol=2e-6, atol=0.0, equal_nan=True)


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


def clipped(dtypes: list[torch.dtype], size: int = 20_000) -> None:
    params = [nn.Parameter(torch.zeros(size, dtype=dtype)) for dtype in dtypes]
    for param in params:
        param.grad = torch.randn(size, dtype=torch.float32).to(param.dtype)
    want = float(
        torch.stack([param.grad.double().square().sum() for param in params if param.grad is not None]).sum().sqrt()
    )
    found = distclip.clip_grad_norm_(params, 1.0)
    assert found.device.type == "cpu"
    assert float(found) == pytest.approx(want, rel=1e-6)
    assert float(distclip.grad_norm(params)) == pytest.approx(1.0, rel=5e-3)


@pytest.mark.usefixtures("default_dtype")
def test_whatever_the_default_dtype() -> None:
    for dtype in NARROW:
        clipped([dtype])
        clipped([dtype], size=100)


def test_whatever_the_default_device() -> None:
    with torch.device("meta"):
        params = [nn.Parameter(torch.zeros(size, device="cpu")) for size in (100, 20_000)]
        for param in params:
            param.grad = torch.full_like(param, 3.0)
        found = distclip.clip_grad_norm_(params, 1.0)
    assert float(found) == pytest.approx(3.0 * math.sqrt(20_100), rel=1e-6)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(autocast: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=autocast):
        for dtype in NARROW:
            clipped([dtype], size=100)
            clipped([dtype, dtype], size=9000)


def test_negative_bits() -> None:
    first, second = (nn.Parameter(torch.zeros(5, dtype=torch.float64)) for _ in range(2))
    first.grad, second.grad = torch.ones(5, dtype=torch.float64), torch._neg_view(torch.ones(5, dtype=torch.float64))
    assert float(distclip.clip_grad_norm_([first, second], 0.1)) == pytest.approx(math.sqrt(10))
    torch.testing.assert_close(second.grad, torch.full((5,), -0.1 / (math.sqrt(10) + 1e-6), dtype=torch.float64))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(
    ("count", "size", "one_by_one"), [(1, 1 << 24, False), (64, 1 << 18, True), (1000, 8192, True), (4000, 1024, False)]
)
def test_extra_memory(count: int, size: int, one_by_one: bool, dtype: torch.dtype) -> None:
    tensors = [torch.ones(size, dtype=dtype) for _ in range(count)]
    kernel = cpu.power_sums if one_by_one else cpu.total_power
    used = peak_memory(lambda: kernel(tensors, 2.0), torch.device("cpu"))
    assert 0 < used < 0.01 * count * size * dtype.itemsize
