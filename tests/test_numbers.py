"""Finite in, finite out: the whole range of each dtype, and the accuracy that DESIGN promises."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import distclip
from tests import oracle


def params_with(grads: list[Tensor]) -> list[nn.Parameter]:
    params = []
    for grad in grads:
        param = nn.Parameter(torch.zeros_like(grad))
        param.grad = grad.clone(memory_format=torch.preserve_format)
        params.append(param)
    return params


def whole(params: list[nn.Parameter]) -> oracle.Whole:
    return {str(i): p.grad.double().numpy().copy() for i, p in enumerate(params) if p.grad is not None}


FP32_MAX = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("grads", "norm"),
    [
        pytest.param([torch.full((4,), 60000.0, dtype=torch.float16)], 120000.0, id="fp16 norm above 65504"),
        pytest.param([torch.full((4,), 6e-8, dtype=torch.float16)], 2 * 5.9604645e-08, id="fp16 subnormal"),
        pytest.param([torch.full((100,), 1e20)], 1e21, id="1e20"),
        pytest.param([torch.full((100,), 1e-25)], 1e-24, id="1e-25"),
        pytest.param([torch.full((100,), 1e-25), torch.ones(1)], 1.0, id="1e-25 next to 1"),
        pytest.param([torch.full((100_000,), 1e-25)], math.sqrt(1e5) * 1e-25, id="many 1e-25"),
        pytest.param([torch.full((100,), 1e-45)], 10 * 1.401298464324817e-45, id="fp32 subnormal"),
        pytest.param([torch.full((2**16,), 2.0**100, dtype=torch.bfloat16)], 2.0**108, id="bf16 2**100"),
        pytest.param([torch.ones(1, dtype=torch.bfloat16)] * 300, math.sqrt(300), id="300 bf16 tensors"),
        pytest.param([torch.full((1 << 20,), 0.1)], 102.40000152587891, id="a million equal elements"),
        pytest.param([torch.full((1 << 20,), 0.1, dtype=torch.bfloat16)], 102.5, id="a million bf16 elements"),
    ],
)
def test_range_and_accuracy(grads: list[Tensor], norm: float) -> None:
    params = params_with(grads)
    before = whole(params)
    got = distclip.clip_grad_norm_(params, norm / 2)
    assert got.item() == pytest.approx(norm, rel=1e-6)
    oracle.assert_same(whole(params), oracle.clip_by_global_norm(before, norm / 2), grads[0].dtype)


def test_a_norm_above_float32_clips_right() -> None:
    params = params_with([torch.full((1000,), FP32_MAX), torch.tensor([1e30])])
    before = whole(params)
    assert oracle.norm(before) > FP32_MAX
    report = distclip.GradClipper(nn.ParameterList(params), 1.0).clip()
    assert report.total_norm.item() == math.inf
    assert not report.nonfinite.item()
    oracle.assert_same(whole(params), oracle.clip_by_global_norm(before, 1.0))
    assert distclip.clip_grad_norm_(params, 1.0, error_if_nonfinite=True).item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.5, math.inf])
def test_a_million_random_elements(dtype: torch.dtype, p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    params = params_with([torch.randn(1 << 20, generator=generator).to(dtype), torch.ones(3, dtype=dtype)])
    before = whole(params)
    got = distclip.grad_norm(params, p)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.item() == pytest.approx(oracle.norm(before, p), rel=1e-12 if dtype == torch.float64 else 1e-6)


def test_dtype_of_the_norm() -> None:
    double, single = torch.ones(2, dtype=torch.float64), torch.ones(2)
    assert distclip.grad_norm(params_with([double, double])).dtype == torch.float64
    assert distclip.grad_norm(params_with([double, single])).dtype == torch.float32


@pytest.mark.parametrize(
    ("grad", "p"),
    [
        (torch.full((2,), 1e200, dtype=torch.float64), 2.0),
        (torch.full((2,), 1e-200, dtype=torch.float64), 2.0),
        (torch.full((2,), 1e38), 10.0),
        (torch.full((2,), 1e-38), 10.0),
        (torch.full((1000,), 1.0), 0.005),
    ],
)
def test_powers_that_leave_float64_are_an_error(grad: Tensor, p: float) -> None:
    params = params_with([grad])
    with pytest.raises(OverflowError, match=f"norm_type={p}"):
        distclip.clip_grad_norm_(params, 1.0, p)
    assert params[0].grad is not None
    torch.testing.assert_close(params[0].grad, grad, rtol=0, atol=0)


@pytest.mark.parametrize("p", [0.5, 8.0, 12.0])
def test_unusual_p_within_range(p: float) -> None:
    params = params_with([torch.linspace(-2, 3, 500), torch.zeros(4)])
    assert distclip.grad_norm(params, p).item() == pytest.approx(oracle.norm(whole(params), p), rel=1e-6)


def test_wide_values_next_to_negligible_ones() -> None:
    params = params_with(
        [torch.tensor([1e-200, 3.0], dtype=torch.float64), torch.full((1,), 1e-170, dtype=torch.float64)]
    )
    assert distclip.grad_norm(params).item() == pytest.approx(3.0, rel=1e-12)


shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@st.composite
def gradients(draw: st.DrawFn) -> list[Tensor]:
    tensors = []
    for shape, dtype in draw(st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=6)):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        scale = 10.0 ** draw(st.integers(-30, 30))
        grad = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        limit = torch.finfo(dtype).max / 2
        tensors.append(grad.clamp(-limit, limit).to(dtype))
    return tensors


@settings(max_examples=150, deadline=None)
@given(grads=gradients(), p=st.sampled_from([1.0, 2.0, 3.5, math.inf]), fraction=st.sampled_from([0.0, 0.3, 2.0]))
def test_any_shapes_and_dtypes(grads: list[Tensor], p: float, fraction: float) -> None:
    params = params_with(grads)
    before = whole(params)
    truth = oracle.norm(before, p)
    got = distclip.clip_grad_norm_(params, truth * fraction, p)
    if truth < FP32_MAX:
        assert got.item() == pytest.approx(truth, rel=1e-6, abs=1e-45)
    after = whole(params)
    norm_is_float64 = got.dtype == torch.float64
    want = oracle.clip_by_global_norm(before, truth * fraction, p)
    for place, grad in enumerate(grads):
        oracle.assert_same({"g": after[str(place)]}, {"g": want[str(place)]}, grad.dtype, norm_is_float64)


def test_the_oracle_itself() -> None:
    """Against exact rational arithmetic."""
    values = [3e200, -4e200, 1e-300]
    exact = math.isqrt(int(sum(Fraction(v) ** 2 for v in values)))
    assert oracle.norm({"g": np.array(values)}) == pytest.approx(exact, rel=1e-15)
    assert oracle.norm({"a": np.array([1.0, -2.0]), "b": np.array([[3.0]])}, 1.0) == 6.0
    assert oracle.norm({}, math.inf) == 0.0
