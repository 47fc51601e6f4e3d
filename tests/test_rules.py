"""Laws that every rule keeps, rules from text, and a user's own rule."""

import math
from typing import Any

import pytest
import torch
import torch.distributed.tensor  # as torch.testing does at its first comparison, on the clock of hypothesis
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import distclip
from distclip import ClipByGlobalNorm, ClipByNorm, ClipByValue, GradClipper, Rule
from distclip.rules import Decision, Norms, parse

thresholds = st.floats(0, 1e3)
finite = st.floats(-1e3, 1e3, width=32)
RULES = [ClipByGlobalNorm, ClipByNorm, ClipByValue]


def model_with(values: list[list[float]]) -> nn.ParameterList:
    params = nn.ParameterList(nn.Parameter(torch.zeros(len(row))) for row in values)
    for param, row in zip(params, values, strict=True):
        param.grad = torch.tensor(row)
    return params


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([param.grad.double() for param in model.parameters() if param.grad is not None])


def clip(model: nn.Module, rule: Rule) -> None:
    GradClipper(model, rule).clip()


gradients = st.lists(st.lists(finite, min_size=1, max_size=5), min_size=1, max_size=4)


@pytest.mark.parametrize("rule", RULES)
@given(values=gradients, threshold=thresholds)
def test_laws(rule: Any, values: list[list[float]], threshold: float) -> None:
    model = model_with(values)
    before = flat(model)
    clip(model, rule(threshold))
    once = flat(model)
    tolerance = 1e-5 * threshold + 1e-30
    if rule is ClipByGlobalNorm:
        assert once.norm() <= threshold + tolerance
        assert once.norm() >= min(before.norm().item(), threshold) * (1 - 1e-5) - 2e-6
    elif rule is ClipByNorm:
        assert all(p.grad.norm() <= threshold + tolerance for p in model.parameters() if p.grad is not None)
    else:
        assert once.abs().max() <= threshold + tolerance
    assert (once.abs() <= before.abs()).all(), "clipping never enlarges an element"
    assert (once * before >= 0).all(), "nor turns its sign"
    clip(model, rule(threshold))
    torch.testing.assert_close(flat(model), once, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("rule", RULES)
@given(values=gradients)
def test_an_idle_clip_changes_no_bit(rule: Any, values: list[list[float]]) -> None:
    model = model_with(values)
    before = flat(model)
    clip(model, rule(1e6))
    clip(model, rule(math.inf))
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("rule", RULES)
def test_a_threshold_of_zero_clears_the_gradients(rule: Any) -> None:
    model = model_with([[3.0, -4.0], [0.0]])
    clip(model, rule(0.0))
    assert flat(model).abs().sum() == 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_bad_thresholds(rule: Any, bad: float) -> None:
    with pytest.raises(ValueError, match=f"must be at least 0, got {bad}"):
        rule(bad)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("global_norm=1.0", ClipByGlobalNorm(1.0)),
        ("global_norm=inf", ClipByGlobalNorm(math.inf)),
        (" global_norm = 2 , norm_type = inf ", ClipByGlobalNorm(2.0, math.inf)),
        ("norm=0.5", ClipByNorm(0.5)),
        ("value=0.1", ClipByValue(0.1)),
        ("value=-0.1:0.5", ClipByValue((-0.1, 0.5))),
    ],
)
def test_parse(text: str, rule: Rule) -> None:
    assert parse(text) == rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("globalnorm=1", "unknown name 'globalnorm'; did you mean 'global_norm'"),
        ("xyz=1", "unknown name 'xyz'; known are global_norm, norm, value,"),
        ("", "unknown name ''"),
        ("global_norm=1,normtype=2", "unknown option 'normtype'; did you mean 'norm_type'"),
        ("norm=abc", "'abc' is not a number"),
        ("norm", "'' is not a number"),
        ("global_norm=-1", "max_norm must be at least 0"),
        ("global_norm=1:2", r"rule .global_norm=1:2.: max_norm must be a number, got \(1\.0, 2\.0\)"),
    ],
)
def test_parse_errors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


class ScaleToMedian(Rule):
    """Every tensor is brought to the median norm of all."""

    needs_per_tensor = True

    def decide(self, norms: Norms) -> Decision:
        assert norms.per_tensor is not None
        median = norms.per_tensor.median()
        return Decision(coefficient=median / norms.per_tensor, threshold=median)


def test_a_rule_of_ones_own() -> None:
    model = model_with([[3.0, 4.0], [1.0], [0.0, 2.0]])
    report = GradClipper(model, ScaleToMedian()).clip()
    torch.testing.assert_close(flat(model).float(), torch.tensor([1.2, 1.6, 2.0, 0.0, 2.0]))
    assert report.threshold.item() == 2.0
    assert report.coefficient.item() == pytest.approx(0.4)


def test_a_rule_without_decide() -> None:
    model = model_with([[1.0]])
    with pytest.raises(NotImplementedError, match="Rule must define decide"):
        GradClipper(model, Rule()).clip()
    assert distclip.grad_norm(model).item() == 1.0
