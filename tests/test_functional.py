"""The drop-in functions on one process: torch's behaviour where torch is right, and DESIGN's table of bad input."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distclip
from tests import oracle


def params_with(*grads: Tensor | None) -> list[nn.Parameter]:
    """One parameter for each gradient; a parameter of one element where there is none."""
    params = []
    for grad in grads:
        param = nn.Parameter(torch.zeros(1) if grad is None else torch.zeros_like(grad.to_dense()))
        param.grad = grad
        params.append(param)
    return params


def some_params(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return params_with(*(torch.randn(shape, generator=generator) for shape in [(3, 4), (5,), (), (2, 1, 3)]))


def grads_of(params: list[nn.Parameter]) -> list[Tensor]:
    return [param.grad.clone() for param in params if param.grad is not None]


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("p", [1, 2, 3.5, 0.5, math.inf, "inf"])
@pytest.mark.parametrize("max_norm", [0, 0.5, 1e9])
def test_same_as_torch(p: Any, max_norm: float, foreach: bool | None) -> None:
    ours, theirs = some_params(), some_params()
    got = distclip.clip_grad_norm_(ours, max_norm, p, foreach=foreach)
    want = nn.utils.clip_grad_norm_(theirs, max_norm, p, foreach=foreach)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=0)
    torch.testing.assert_close(grads_of(ours), grads_of(theirs), rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_value_and_second_half_as_torch(foreach: bool | None) -> None:
    ours, theirs = some_params(), some_params()
    distclip.clip_grad_value_(ours, 0.3, foreach)
    nn.utils.clip_grad_value_(theirs, 0.3, foreach)
    torch.testing.assert_close(grads_of(ours), grads_of(theirs), rtol=0, atol=0)
    distclip.clip_grads_with_norm_(ours, 0.2, torch.tensor(0.7), foreach)
    nn.utils.clip_grads_with_norm_(theirs, 0.2, torch.tensor(0.7), foreach)
    torch.testing.assert_close(grads_of(ours), grads_of(theirs), rtol=1e-6, atol=0)


def test_value_pair() -> None:
    (param,) = params_with(torch.tensor([-1.0, -0.1, 0.2, 3.0, math.nan, math.inf]))
    distclip.clip_grad_value_(param, (-0.5, 1.0))
    expected = torch.tensor([-0.5, -0.1, 0.2, 1.0, math.nan, 1.0])
    torch.testing.assert_close(param.grad, expected, equal_nan=True)


def test_what_parameters_may_be() -> None:
    module = nn.Linear(3, 2)
    module(torch.ones(1, 3)).sum().backward()
    truth = distclip.grad_norm(list(module.parameters()))
    assert truth.item() == pytest.approx(math.sqrt(8))
    assert distclip.grad_norm(module) == truth
    assert distclip.grad_norm([module]) == truth
    assert distclip.grad_norm(module.parameters()) == truth
    assert distclip.grad_norm(parameters=module, foreach=None) == truth
    assert distclip.grad_norm(dict(module.named_parameters()).values()) == truth
    assert distclip.grad_norm(module.bias).item() == pytest.approx(math.sqrt(2))
    # Several stages of a pipeline on one rank; a module next to a tensor of it.
    other = nn.Linear(3, 2)
    assert distclip.grad_norm([module, other]) == truth
    assert distclip.grad_norm([module, module.bias]) == truth  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [5, "weights", b"x", None, [1.0], ["weight"], [{"params": []}]])
def test_parameters_of_a_wrong_type(bad: Any) -> None:
    with pytest.raises(TypeError, match="parameters must"):
        distclip.clip_grad_norm_(bad, 1.0)


def test_no_parameters() -> None:
    module = nn.Linear(2, 2)
    used_up = module.parameters()
    list(used_up)
    with pytest.warns(UserWarning, match="empty generator"):
        assert distclip.clip_grad_norm_(used_up, 1.0).item() == 0
    with pytest.warns(UserWarning, match="parameters is empty"):
        assert distclip.clip_grad_norm_([], 1.0).item() == 0
    with pytest.warns(UserWarning, match="parameters is empty"):
        distclip.clip_grad_value_(nn.ReLU(), 1.0)


def test_the_warning_points_at_the_caller() -> None:
    with pytest.warns(UserWarning, match="parameters is empty") as caught:
        distclip.clip_grad_norm_([], 1.0)
    assert caught[0].filename == __file__


def test_no_gradients() -> None:
    norm = distclip.clip_grad_norm_(nn.Linear(2, 2), 1.0)
    assert norm.item() == 0
    assert norm.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: distclip.clip_grad_norm_(p, -1.0), r"max_norm must be at least 0, got -1\.0"),
        (lambda p: distclip.clip_grad_norm_(p, math.nan), "max_norm must be at least 0, got nan"),
        (lambda p: distclip.clip_grad_norm_(p, 1.0, 0), "norm_type must be above 0, got 0"),
        (lambda p: distclip.clip_grad_norm_(p, 1.0, -2), "norm_type must be above 0, got -2"),
        (lambda p: distclip.clip_grad_norm_(p, 1.0, math.nan), "norm_type must be above 0, got nan"),
        (lambda p: distclip.grad_norm(p, -math.inf), "norm_type must be above 0, got -inf"),
        (lambda p: distclip.clip_grads_with_norm_(p, -1, torch.tensor(1.0)), "max_norm must be at least 0, got -1"),
        (lambda p: distclip.clip_grad_value_(p, -0.1), r"clip_value must be at least 0, got -0\.1"),
        (lambda p: distclip.clip_grad_value_(p, math.nan), "clip_value must be at least 0, got nan"),
        (lambda p: distclip.clip_grad_value_(p, (1.0, 0.5)), r"lo <= hi, got \(1\.0, 0\.5\)"),
        (lambda p: distclip.clip_grad_value_(p, (math.nan, 0.5)), "lo <= hi"),
        (lambda p: distclip.clip_grad_value_(p, (1.0, 2.0, 3.0)), "a number or a pair"),  # type: ignore[arg-type]
    ],
)
def test_bad_values(call: Callable[[Any], object], message: str) -> None:
    params = some_params()
    before = grads_of(params)
    with pytest.raises(ValueError, match=message):
        call(params)
    torch.testing.assert_close(grads_of(params), before, rtol=0, atol=0)


@pytest.mark.parametrize("bad", ["one", None, [1.0]])
def test_thresholds_of_a_wrong_type(bad: Any) -> None:
    with pytest.raises(TypeError, match="max_norm must be a number"):
        distclip.clip_grad_norm_(some_params(), bad)


def test_the_same_parameter_twice() -> None:
    once, twice = some_params(), some_params()
    expected = distclip.clip_grad_norm_(once, 0.5)
    assert distclip.clip_grad_norm_([*twice, *twice], 0.5) == expected
    torch.testing.assert_close(grads_of(twice), grads_of(once), rtol=0, atol=0)


def test_tied_weights_of_a_module_count_once() -> None:
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    module(torch.ones(1, 3)).sum().backward()
    assert isinstance(module[0].weight.grad, Tensor)
    assert distclip.grad_norm(module).item() == pytest.approx(module[0].weight.grad.norm().item())


@pytest.mark.parametrize("coalesced", [True, False])
def test_sparse_gradients(coalesced: bool) -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1, 4, 4, 1, 7])).pow(3).sum().backward()
    grad = embedding.weight.grad
    assert grad is not None
    assert grad.is_sparse
    if coalesced:
        embedding.weight.grad = grad.coalesce()
    dense = grad.to_dense().clone()
    truth = dense.norm().item()
    assert distclip.clip_grad_norm_(embedding, truth / 2).item() == pytest.approx(truth, rel=1e-6)
    assert embedding.weight.grad is not None
    torch.testing.assert_close(embedding.weight.grad.to_dense(), dense / 2)
    distclip.clip_grad_value_(embedding, 0.01)
    torch.testing.assert_close(embedding.weight.grad.to_dense(), (dense / 2).clamp(-0.01, 0.01))


def test_sparse_gradients_cannot_be_pushed_away_from_zero() -> None:
    params = params_with(torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match=r"parameters\[0\] is sparse, but clip_value bounds"):
        distclip.clip_grad_value_(params, (0.5, 1.0))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_complex_gradients_count_by_modulus(p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(4, 5, dtype=torch.complex64, generator=generator)
    truth = oracle.norm({"g": grad.abs().double().numpy()}, p)
    params = params_with(grad.clone())
    assert distclip.clip_grad_norm_(params, truth / 4, p).item() == pytest.approx(truth, rel=1e-6)
    torch.testing.assert_close(params[0].grad, grad / 4)
    with pytest.raises(TypeError, match=r"gradient of parameters\[0\] is complex"):
        distclip.clip_grad_value_(params, 1.0)


def test_other_layouts_are_refused_by_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR support beta
        param = nn.Parameter(torch.eye(2).to_sparse_csr())
        param.grad = torch.eye(2).to_sparse_csr()
    with pytest.raises(TypeError, match=r"the gradient of weight has layout torch\.sparse_csr"):
        distclip.clip_grad_norm_(nn.ParameterDict({"weight": param}), 1.0)


def test_max_norm_inf_only_measures() -> None:
    params = params_with(torch.tensor([1.0, math.inf, -2.0]), torch.tensor([3.0]))
    before = grads_of(params)
    assert distclip.clip_grad_norm_(params, math.inf).item() == math.inf
    torch.testing.assert_close(grads_of(params), before, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.5, math.inf])
def test_nonfinite(p: float, bad: float) -> None:
    params = params_with(torch.ones(3), torch.tensor([1.0, bad]), None)
    before = grads_of(params)
    with pytest.raises(RuntimeError, match="non-finite"):
        distclip.clip_grad_norm_(params, 1.0, p, error_if_nonfinite=True)
    torch.testing.assert_close(grads_of(params), before, rtol=0, atol=0, equal_nan=True)
    assert not distclip.clip_grad_norm_(params, 1.0, p).isfinite()
    theirs = params_with(*(grad.clone() for grad in before), None)
    nn.utils.clip_grad_norm_(theirs, 1.0, p)
    torch.testing.assert_close(grads_of(params), grads_of(theirs), equal_nan=True)


def test_foreach_on_a_device_without_it() -> None:
    param = nn.Parameter(torch.zeros(2, device="meta"))
    param.grad = torch.ones(2, device="meta")
    with pytest.raises(RuntimeError, match="foreach=True was passed, but can't use the foreach API on meta"):
        distclip.clip_grad_value_(param, 1.0, foreach=True)


def test_zero_element_and_scalar_gradients() -> None:
    params = params_with(torch.zeros(0), torch.zeros(0, 3), torch.tensor(3.0), torch.tensor([4.0]))
    for p, truth in [(2.0, 5.0), (1.0, 7.0), (math.inf, 4.0)]:
        assert distclip.grad_norm(params, p).item() == pytest.approx(truth)
    assert distclip.grad_norm(params[:2], math.inf).item() == 0


@pytest.mark.parametrize(
    "make", [lambda g: g.t(), lambda g: g[:, ::2], lambda g: g.to(memory_format=torch.preserve_format)]
)
def test_strided_gradients(make: Callable[[Tensor], Tensor]) -> None:
    grad = make(torch.randn(70, 90, generator=torch.Generator().manual_seed(0)))
    params = params_with(grad.clone(memory_format=torch.preserve_format))
    params[0].grad = grad
    want = grad.clone()
    truth = float(np.linalg.norm(want.double().numpy()))
    assert distclip.clip_grad_norm_(params, 1.0).item() == pytest.approx(truth, rel=1e-6)
    torch.testing.assert_close(params[0].grad, want / (truth + 1e-6), rtol=1e-5, atol=1e-7)


def test_a_list_that_grows_or_shrinks_is_planned_anew() -> None:
    params = some_params()
    whole = distclip.grad_norm(params).item()
    assert distclip.grad_norm(params[:2]).item() == pytest.approx(oracle_norm(params[:2]), rel=1e-6)
    assert distclip.grad_norm(params[:1] + params[2:]).item() == pytest.approx(
        oracle_norm(params[:1] + params[2:]), rel=1e-6
    )
    params[1] = params_with(torch.full((5,), 9.0))[0]
    assert distclip.grad_norm(params).item() == pytest.approx(oracle_norm(params), rel=1e-6)
    assert distclip.grad_norm(params).item() != pytest.approx(whole)


def oracle_norm(params: list[nn.Parameter]) -> float:
    return oracle.norm({str(i): grad.double().numpy() for i, grad in enumerate(grads_of(params))})


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_the_result_is_detached_and_gradients_that_require_grad_work() -> None:
    weight = nn.Parameter(torch.ones(3))
    (weight.pow(3).sum()).backward(create_graph=True)
    norm = distclip.clip_grad_norm_(weight, 1.0)
    assert not norm.requires_grad
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.detach(), torch.full((3,), 1 / math.sqrt(3)), rtol=1e-5, atol=0)


def test_lazily_conjugated_gradients() -> None:
    weight = nn.Parameter(torch.tensor([1 + 1j, 2.0, -1j]))
    (weight.conj() * torch.tensor([1 + 2j, 2j, 3.0])).sum().abs().backward()
    assert weight.grad is not None
    truth = weight.grad.abs().norm().item()
    assert distclip.clip_grad_norm_(weight, truth / 2).item() == pytest.approx(truth, rel=1e-6)
    assert weight.grad.abs().norm().item() == pytest.approx(truth / 2, rel=1e-5)
