"""GradClipper on one process: construction, the order of calls, state, replaced parameters."""

import copy
import gc
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import distclip
from distclip import ClipByGlobalNorm, ClipByNorm, ClipByValue, GradClipper


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def backward(model: nn.Module) -> float:
    """One backward; returns the true norm."""
    for param in model.parameters():
        param.grad = None
    (10 * model(torch.linspace(-1, 1, 12).view(3, 4)).square().sum()).backward()
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None))


def test_a_number_is_the_largest_global_norm() -> None:
    model = small_model()
    truth = backward(model)
    clipper = GradClipper(model, truth / 4)
    report = clipper.clip()
    assert clipper.report is report
    assert report.to_dict() == {
        "total_norm": pytest.approx(truth, rel=1e-6),
        "clipped_norm": pytest.approx(truth / 4, rel=1e-5),
        "coefficient": pytest.approx(0.25, rel=1e-5),
        "threshold": truth / 4,
        "clipped": True,
        "nonfinite": False,
        "skipped": False,
        "nonfinite_steps": 0,
        "applied": "in place",
    }
    assert distclip.grad_norm(model).item() == pytest.approx(truth / 4, rel=1e-5)


def test_the_report_holds_tensors() -> None:
    model = small_model()
    backward(model)
    report = GradClipper(model, ClipByNorm(0.1)).clip()
    for name in ("total_norm", "coefficient", "threshold", "clipped", "nonfinite", "skipped"):
        value = getattr(report, name)
        assert isinstance(value, torch.Tensor)
        assert value.shape == ()
    assert report.per_tensor is not None
    assert list(report.per_tensor) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_measuring_only() -> None:
    model = small_model()
    truth = backward(model)
    report = GradClipper(model, math.inf).clip().to_dict()
    assert report["total_norm"] == pytest.approx(truth, rel=1e-6)
    assert (report["coefficient"], report["clipped"]) == (1.0, False)


def test_several_modules() -> None:
    one, two = small_model(), small_model()
    truth = math.hypot(backward(one), backward(two))
    report = GradClipper([one, two], ClipByNorm(1e9)).clip()
    assert report.total_norm.item() == pytest.approx(truth, rel=1e-6)
    assert report.per_tensor is not None
    assert "0.0.weight" in report.per_tensor
    assert "1.2.bias" in report.per_tensor


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rule": -1.0}, ValueError, r"max_norm must be at least 0, got -1\.0"),
        ({"rule": math.nan}, ValueError, "max_norm must be at least 0, got nan"),
        ({"rule": "global_norm=1"}, TypeError, "rule must be a number"),
        ({"rule": True}, TypeError, "rule must be a number"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite must be one of propagate, raise, skip, got 'ignore'"),
        ({"check": "sometimes"}, ValueError, "check must be one of first, always, never, got 'sometimes'"),
        ({"model": nn.Parameter(torch.ones(1))}, TypeError, r"model must be a torch\.nn\.Module"),
        ({"model": [1]}, TypeError, r"model must be a torch\.nn\.Module"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GradClipper(**{"model": small_model(), **arguments})


def test_a_model_without_parameters() -> None:
    with pytest.warns(UserWarning, match="parameters is empty"):
        clipper = GradClipper(nn.ReLU(), ClipByNorm(1.0))
    assert clipper.clip().to_dict()["total_norm"] == 0


def test_clip_before_backward() -> None:
    clipper = GradClipper(small_model())
    with pytest.warns(UserWarning, match="no gradient on this rank: call it after backward") as caught:
        assert clipper.clip().total_norm.item() == 0
    assert caught[0].filename == __file__


def test_a_frozen_model_has_nothing_to_warn_of() -> None:
    clipper = GradClipper(small_model().requires_grad_(False))
    assert clipper.clip().total_norm.item() == 0


@pytest.mark.parametrize("max_norm", [0.1, 1e9], ids=["clipped", "below"])
def test_clip_twice_in_one_step(max_norm: float) -> None:
    model = small_model()
    clipper = GradClipper(model, max_norm)
    backward(model)
    clipper.clip()
    with pytest.warns(UserWarning, match="twice on the same gradients"):
        clipper.clip()
    backward(model)
    clipper.clip()
    # Accumulating into the same tensors is a new step too.
    model(torch.ones(1, 4)).sum().backward()
    clipper.clip()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_state_of_a_fixed_rule(tmp_path: Path) -> None:
    model = small_model()
    clipper = GradClipper(model, 1.0)
    before = clipper.state_dict()
    backward(model)
    clipper.clip()
    state = clipper.state_dict()
    assert state.keys() == before.keys()
    assert state["steps"] == 1
    save({"clipper": clipper}, checkpoint_id=tmp_path, no_dist=True)
    resumed = GradClipper(small_model(), 1.0)
    load({"clipper": resumed}, checkpoint_id=tmp_path, no_dist=True)
    assert resumed.steps == 1
    assert resumed.state_dict() == state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "not of a GradClipper: it has no rule, rule_state, steps"),
        ({"rule": "ClipByNorm", "rule_state": {}, "steps": 1}, "of rule ClipByNorm, this clipper has ClipByGlobalNorm"),
        ({"rule": "ClipByGlobalNorm", "rule_state": {"ema": 1}, "steps": 1}, r"keeps no state, but .* \['ema'\]"),
    ],
)
def test_foreign_state(state: dict[str, Any], message: str) -> None:
    clipper = GradClipper(small_model(), 1.0)
    with pytest.raises(ValueError, match=message):
        clipper.load_state_dict(state)
    assert clipper.steps == 0


def test_replaced_added_and_removed_parameters() -> None:
    model = small_model()
    clipper = GradClipper(model, math.inf)
    for change in (
        lambda: setattr(model[0], "weight", nn.Parameter(torch.ones(3, 4))),
        lambda: model.append(nn.Linear(2, 2)),
        lambda: setattr(model[2], "bias", None),
        lambda: model.load_state_dict({k: v.clone() * 2 for k, v in model.state_dict().items()}, assign=True),
        lambda: model.double(),
    ):
        change()
        dtype = next(model.parameters()).dtype
        for param in model.parameters():
            param.grad = None
        model(torch.ones(2, 4, dtype=dtype)).square().sum().backward()
        truth = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None))
        assert clipper.clip().total_norm.item() == pytest.approx(truth, rel=1e-6)


def test_value_report() -> None:
    model = small_model()
    backward(model)
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    bound = grads.abs().max().item() / 5
    report = GradClipper(model, ClipByValue(bound)).clip().to_dict()
    assert report["coefficient"] == pytest.approx(0.2)
    assert report["threshold"] == pytest.approx(bound)
    assert report["clipped"]
    backward(model)
    report = GradClipper(model, ClipByValue(bound * 10)).clip().to_dict()
    assert (report["coefficient"], report["clipped"]) == (1.0, False)


def test_a_nan_does_not_hide_large_values_from_the_bounds() -> None:
    model = nn.Linear(3, 1, bias=False)
    model.weight.grad = torch.tensor([[math.nan, 7.0, -0.1]])
    report = GradClipper(model, ClipByValue(1.0)).clip()
    torch.testing.assert_close(model.weight.grad, torch.tensor([[math.nan, 1.0, -0.1]]), equal_nan=True)
    assert report.nonfinite


def test_a_nan_tensor_does_not_touch_the_others_under_clip_by_norm() -> None:
    model = nn.Linear(2, 1)
    model.weight.grad = torch.tensor([[math.nan, 1.0]])
    model.bias.grad = torch.tensor([4.0])
    GradClipper(model, ClipByNorm(1.0)).clip()
    torch.testing.assert_close(model.bias.grad, torch.tensor([1.0]))
    torch.testing.assert_close(model.weight.grad, torch.tensor([[math.nan, 1.0]]), equal_nan=True)


def test_rules_can_be_printed() -> None:
    assert repr(ClipByGlobalNorm(1, "inf")) == "ClipByGlobalNorm(max_norm=1.0, norm_type=inf)"  # type: ignore[arg-type]
    assert repr(ClipByValue((-1, 2))) == "ClipByValue(clip_value=(-1, 2))"


@pytest.mark.parametrize("bounds", [(0.1, 0.5), (-0.5, -0.1), (-2.0, -1.0)])
def test_bounds_that_leave_out_zero(bounds: tuple[float, float]) -> None:
    model = nn.Linear(3, 1, bias=False)
    model.weight.grad = torch.tensor([[0.05, -0.2, 0.3]])
    report = GradClipper(model, ClipByValue(bounds)).clip().to_dict()
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.05, -0.2, 0.3]]).clamp(*bounds))
    assert report["clipped"]
    assert 0 <= report["coefficient"] < 1


def test_a_rule_may_change_between_clips() -> None:
    model = nn.Linear(2, 1, bias=False)
    rule = ClipByValue(10.0)
    clipper = GradClipper(model, rule)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    clipper.clip()
    rule.clip_value = 2.0
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    clipper.clip()
    torch.testing.assert_close(model.weight.grad, torch.tensor([[2.0, 2.0]]))
    clipper.rule = ClipByNorm(1.0)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    clipper.clip()
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.8]]))


@pytest.mark.parametrize("swap", [False, True], ids=["in place", "swapped"])
def test_a_model_converted_after_its_first_clip(swap: bool) -> None:
    """`Module.double()` keeps the parameter objects, or swaps what they are, which weak references would forbid."""
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model = nn.Linear(2, 1, bias=False)
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        clipper = GradClipper(model, 1.0)
        assert clipper.clip().total_norm.dtype == torch.float32
        distclip.grad_norm(model)
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    model.weight.grad = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert distclip.grad_norm(model).dtype == torch.float64
    assert clipper.clip().total_norm.dtype == torch.float64
    model.weight.grad = torch.full((1, 2), 1e200, dtype=torch.float64)
    with pytest.raises(OverflowError):
        distclip.clip_grad_norm_(model, 1.0)


def test_copies_and_files_of_a_model_that_distclip_has_seen(tmp_path: Path) -> None:
    model = small_model()
    backward(model)
    clipper = GradClipper(model, 1.0)
    clipper.clip()
    distclip.grad_norm(model)
    twin = copy.deepcopy(model)
    assert distclip.grad_norm(twin).item() == 0
    truth = backward(twin)
    assert distclip.grad_norm(twin).item() == pytest.approx(truth, rel=1e-6)
    torch.save(model, tmp_path / "model.pt")
    torch.save(list(model.parameters()), tmp_path / "params.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    truth = backward(loaded)
    assert distclip.grad_norm(loaded).item() == pytest.approx(truth, rel=1e-6)
    assert len(torch.load(tmp_path / "params.pt", weights_only=True)) == 4
    assert isinstance(pickle.loads(pickle.dumps(model)), nn.Module)


def test_models_leave_nothing_behind() -> None:
    from distclip import cache
    from distclip.layout import memory

    gc.collect()
    before = sum(type(thing) is memory.Mark for thing in gc.get_objects()), len(cache._entries)
    for _ in range(20):
        model = small_model()
        backward(model)
        GradClipper(model, 1.0).clip()
        distclip.grad_norm(model)
        del model
    gc.collect()
    assert (sum(type(thing) is memory.Mark for thing in gc.get_objects()), len(cache._entries)) == before


def test_numbers_of_other_kinds() -> None:
    model = small_model()
    backward(model)
    half: Any = np.float32(0.5)
    assert GradClipper(model, half).clip().threshold.item() == 0.5
    distclip.clip_grads_with_norm_(model, 1.0, torch.tensor([2.0]))
    distclip.clip_grads_with_norm_(model, 1.0, 1e39)
