"""Rules as texts and as a table, and the shapes in which users pass several."""

from typing import Any

import pytest
import torch
from torch import nn

import distclip
from distclip import Chain, ClipByGlobalNorm, ClipByNorm, ClipByValue, GradClipper, PerGroup
from distclip.rules import catalogue, parse
from distclip.rules.text import NAMES

TEXTS = [
    "global_norm=1.0",
    "zclip",
    "zclip,z_thresh=3",
    "zclip,mode=percentile,skip_update_on_spike=true,max_norm=none",
    "value=-0.1:0.5",
    "agc=0.01,exclude=head.*",
    "agc,exclude=head.*:*.bias",
    "autoclip=20,history=100",
    "quantile=0.5,window=10",
    "ema_ratio=1.1,beta=0.9",
    "centralize",
    "skip_on_spike,sigma=6 | global_norm=1.0",
    "head.* -> norm=0.5 ; * -> (value=1 | global_norm=2)",
    "(a.*:b.* -> norm=1 ; * -> zclip) | skip_above=3",
]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(text: str) -> None:
    rule = parse(text)
    assert str(rule) == text
    vars(rule).pop("_written")
    assert parse(str(rule)) == rule, "and as well where nobody has written it"


def test_a_rule_that_was_changed_tells_what_it_is_now() -> None:
    rule = parse("global_norm=1.0")
    assert isinstance(rule, ClipByGlobalNorm)
    rule.max_norm = 2.0
    assert str(rule) == "global_norm=2.0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zcilp", "unknown name 'zcilp'; did you mean 'zclip'"),
        ("zclip,clip_factor=inf", "clip_factor must be finite, got inf"),
        ("zclip,z_tresh=3", "unknown option 'z_tresh'; did you mean 'z_thresh'"),
        ("zclip,mode=foo", "mode must be 'zscore' or 'percentile', got 'foo'"),
        ("zclip,skip_update_on_spike=1", "skip_update_on_spike must be true or false, got '1'"),
        ("centralize=3", "centralize takes no value"),
        ("quantile=0.5", "missing 1 required positional argument: 'window'"),
        ("skip_on_spike,sigma=6 | globalnorm=1.0", "did you mean 'global_norm'"),
        ("a -> norm=1 ; norm=2", "'norm=2' must be 'pattern -> rule'"),
        ("autoclip,history=1.5", "history must be a whole number of at least 1, got 1.5"),
    ],
)
def test_errors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_the_catalogue_has_every_rule() -> None:
    table = catalogue()
    assert [entry.name for entry in table] == list(NAMES)
    assert {entry.rule.__name__ for entry in table} | {"Chain", "PerGroup", "Rule"} <= set(distclip.__all__)
    assert str(table).count("\n") == len(NAMES)
    assert "arXiv 2504.02507; zclip" in str(table)


def model_with(**values: list[float]) -> nn.ParameterDict:
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(len(row))) for name, row in values.items()})
    for name, row in values.items():
        model[name].grad = torch.tensor(row)
    return model


def test_lists_and_dicts() -> None:
    assert GradClipper(model_with(a=[1.0]), [ClipByValue(1.0), 2.0]).rule == Chain([ClipByValue(1.0), 2.0])
    model = model_with(head=[3.0, 4.0], body=[6.0, 8.0], rest=[1.0])
    report = GradClipper(model, {"head": 1.0, "b*": ClipByNorm(5.0)}).clip()
    torch.testing.assert_close(model["head"].grad, torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(model["body"].grad, torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(model["rest"].grad, torch.tensor([1.0]))
    assert report.total_norm.item() == pytest.approx(126**0.5)
    assert report.threshold.item() == 1.0
    assert report.coefficient.item() == pytest.approx(0.2)


def test_groups_of_an_optimizer() -> None:
    model = model_with(a=[3.0, 4.0], b=[6.0, 8.0], c=[5.0])
    groups: list[dict[str, Any]] = [{"params": [model["a"], model["b"]], "max_norm": 1.0}, {"params": [model["c"]]}]
    rule = PerGroup.by_optimizer(model, torch.optim.SGD(groups, lr=0.1))
    GradClipper(model, rule).clip()
    assert torch.cat([model["a"].grad, model["b"].grad]).norm().item() == pytest.approx(1.0, rel=1e-5)
    assert model["c"].grad.item() == 5.0
    with pytest.raises(ValueError, match="no param group of the optimizer has an entry 'max_norm'"):
        PerGroup.by_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_bad_compositions() -> None:
    rule = distclip.ZClip()
    with pytest.raises(ValueError, match="Chain holds one rule object twice"):
        Chain([rule, rule])
    with pytest.raises(ValueError, match="Chain needs at least one rule"):
        Chain([])
    with pytest.raises(ValueError, match=r"must have one norm_type, got \[1\.0, 2\.0\]"):
        PerGroup({"a": ClipByGlobalNorm(1.0, 1.0), "b": 1.0})
