"""Every rule against its formula in NumPy, in one process: over steps, with spikes, NaN, zeros and a checkpoint."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import distclip
from distclip import GradClipper
from tests.formulas import FORMULAS, Whole

SHAPES = {"blocks.0.up": (4, 3), "blocks.1.conv": (2, 3, 2, 2), "norm": (5,), "scalar": (), "unused": (3, 2)}
every_rule = pytest.mark.parametrize("name", FORMULAS)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module(), nn.Module()])
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            owner, _, leaf = name.rpartition(".")
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.get_submodule(owner).register_parameter(leaf, nn.Parameter(values))


def give_gradients(model: nn.Module, step: int, size: float | None = None) -> Whole:
    """Gradients of a size that changes from step to step; ``unused`` has none."""
    generator = torch.Generator().manual_seed(step)
    size = 2.0 * (1 + step % 3) if size is None else size
    whole = {}
    for name, param in model.named_parameters():
        if name != "unused":
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64) * size
            whole[name] = param.grad.numpy().copy()
    return whole


def weights_of(model: nn.Module) -> Whole:
    return {name: param.detach().numpy() for name, param in model.named_parameters()}


def check(model: nn.Module, want: Whole | None, report: distclip.ClipReport) -> None:
    assert bool(report.skipped) == (want is None)
    for name, param in model.named_parameters():
        if want is None or name not in want:
            assert param.grad is None
        else:
            assert param.grad is not None
            np.testing.assert_allclose(param.grad.numpy(), want[name], rtol=1e-9, atol=1e-14, err_msg=name)


@every_rule
def test_formula(name: str) -> None:
    """With a checkpoint after the fourth step, and zero gradients in the sixth."""
    model, formula = Model(), FORMULAS[name]()
    clipper = GradClipper(model, formula.rule())
    for step in range(12):
        grads = give_gradients(model, step, 0.0 if step == 5 else None)
        want = formula(grads, weights_of(model))
        check(model, want, clipper.clip())
        model.zero_grad()
        if step == 3:
            state = clipper.state_dict()
            assert clipper.state_dict() == state
            clipper = GradClipper(model, formula.rule())
            clipper.load_state_dict(state)
            np.testing.assert_equal(clipper.state_dict(), state)


@every_rule
def test_state_has_its_keys_from_the_first_call_on(name: str) -> None:
    clipper = GradClipper(Model(), FORMULAS[name]().rule())
    before = keys(clipper.state_dict())
    give_gradients(clipper_model(clipper), 0)
    clipper.clip()
    assert keys(clipper.state_dict()) == before


def clipper_model(clipper: GradClipper) -> nn.Module:
    return clipper._params.modules[0]


def keys(state: Any) -> Any:
    return {key: keys(value) for key, value in state.items()} if isinstance(state, dict) else None


@every_rule
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_norm_teaches_nothing(name: str, bad: float) -> None:
    """The step with it leaves the rule as if it had not been."""
    results = []
    for poisoned in (False, True):
        model = Model()
        clipper = GradClipper(model, FORMULAS[name]().rule())
        for step in range(8):
            give_gradients(model, step)
            clipper.clip()
            if poisoned and step in (0, 4):
                give_gradients(model, 99)
                grad = model.get_parameter("norm").grad
                assert grad is not None
                grad[1] = bad
                assert bool(clipper.clip().nonfinite)
        state = clipper.state_dict()["rule_state"]
        results.append(state)
        assert not [value for value in numbers(state) if value == -math.inf]
    np.testing.assert_equal(*results)


def numbers(state: Any) -> list[float]:
    if isinstance(state, dict):
        return [number for value in state.values() for number in numbers(value)]
    if isinstance(state, list):
        return [number for value in state for number in numbers(value)]
    return [state] if isinstance(state, float) else []


def test_a_skipped_step_teaches_only_the_rule_that_skips() -> None:
    model = Model()
    rule = distclip.Chain([distclip.AdaGC(warmup_steps=1), distclip.SkipAbove(0.0)])
    clipper = GradClipper(model, rule)
    give_gradients(model, 0)
    report = clipper.clip()
    assert bool(report.skipped)
    assert report.applied == "skipped"
    assert all(param.grad is None for param in model.parameters())
    assert clipper.state_dict()["rule_state"]["0"]["seen"] == 0.0


@pytest.mark.parametrize(
    "rule",
    [
        distclip.ClipByGlobalNorm(math.inf),
        distclip.ClipByNorm(math.inf),
        distclip.ClipByValue(math.inf),
        distclip.ClipByAverageNorm(math.inf),
        distclip.ClipByBlockRMS(math.inf),
        distclip.AdaptiveGradientClipping(math.inf),
        distclip.NormalizeGradient(math.inf),
        distclip.QuantileClip(0.5, 3, math.inf),
        distclip.ZClip(z_thresh=math.inf, max_norm=math.inf),
        distclip.ZClip(z_thresh=math.inf, max_norm=None, mode="percentile"),
        distclip.AdaGC(lambda_abs=math.inf, lambda_rel=math.inf, warmup_steps=1),
        distclip.EMARatioClip(math.inf, 0.5),
        distclip.SkipAbove(math.inf),
        distclip.SkipOnSpike(4, math.inf, 2),
    ],
    ids=str,
)
def test_a_threshold_of_inf_changes_nothing(rule: distclip.Rule) -> None:
    model = Model()
    clipper = GradClipper(model, rule)
    for step in range(5):
        before = give_gradients(model, step)
        check(model, before, clipper.clip())


@pytest.mark.parametrize(
    "rule",
    [
        distclip.ClipByAverageNorm(0.0),
        distclip.ClipByBlockRMS(0.0),
        distclip.AdaptiveGradientClipping(0.0),
        distclip.NormalizeGradient(0.0),
        distclip.QuantileClip(0.5, 3, 0.0),
        distclip.ZClip(max_norm=0.0),
        distclip.AdaGC(lambda_abs=0.0, lambda_rel=0.0, warmup_steps=1),
        distclip.AdaGC(lambda_rel=0.0, warmup_steps=0),
        distclip.EMARatioClip(0.0, 0.5),
    ],
    ids=str,
)
def test_a_threshold_of_zero_clears_the_gradients(rule: distclip.Rule) -> None:
    model = Model()
    clipper = GradClipper(model, rule)
    for step in range(3):
        before = give_gradients(model, step)
        check(model, {name: 0 * grad for name, grad in before.items()}, clipper.clip())


def test_a_tensor_that_wakes_up_late_is_not_frozen() -> None:
    model = Model()
    clipper = GradClipper(model, distclip.AdaGC(warmup_steps=2))
    for step in range(4):
        give_gradients(model, step)
        clipper.clip()
    unused = model.get_parameter("unused")
    unused.grad = torch.ones_like(unused)
    clipper.clip()
    assert torch.equal(unused.grad, torch.ones_like(unused))


def test_a_loss_that_spikes_skips_the_step() -> None:
    model = Model()
    clipper = GradClipper(model, distclip.SkipOnSpike(8, 6.0, 3))
    for step in range(6):
        give_gradients(model, 0)
        report = clipper.clip(loss=torch.tensor(2.0 + 0.1 * (step % 2)))
        assert not report.skipped
    give_gradients(model, 0)
    assert clipper.clip(loss=3.0).skipped
    give_gradients(model, 0)
    assert not clipper.clip().skipped, "no loss, no test of it"
    give_gradients(model, 0)
    with pytest.raises(ValueError, match=r"loss must be a scalar, got a tensor of shape \(2,\)"):
        clipper.clip(loss=torch.zeros(2))


def test_schedules() -> None:
    model = Model()
    clipper = GradClipper(model, distclip.ClipByGlobalNorm(lambda step: 1.0 + step))
    for step in range(3):
        give_gradients(model, step, 100.0)
        report = clipper.clip()
        assert report.threshold.item() == 1.0 + step
        assert report.clipped_norm is not None
        assert report.clipped_norm.item() == pytest.approx(1.0 + step)
    clipper = GradClipper(model, distclip.ClipByValue(lambda step: -1.0))
    with pytest.raises(ValueError, match="clip_value must be at least 0"):
        clipper.clip()
