"""Steps that a rule leaves out: under scalers, fused optimizers and in a checkpoint of torch's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import distclip
from distclip import AdaGC, Chain, GradClipper, SkipAbove, ZClip


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def backward(model: nn.Module, size: float, scaler: torch.amp.GradScaler | None = None) -> None:
    loss = size * model(torch.ones(2, 4)).square().mean()
    (loss if scaler is None else scaler.scale(loss)).backward()


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
def test_a_skipped_step_changes_nothing(fused: bool, scaled: bool) -> None:
    """Neither parameters nor the optimizer's state; and a spike is no reason to shrink the loss scale."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if scaled else None
    clipper = GradClipper(model, [SkipAbove(5.0), 1.0], optimizer=optimizer, scaler=scaler)
    for size, skipped in ((0.1, False), (1000.0, True), (0.1, False)):
        backward(model, size, scaler)
        before = [param.detach().clone() for param in model.parameters()]
        report = clipper.clip()
        assert bool(report.skipped) == skipped
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == 256.0
        optimizer.zero_grad()
        changed = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
        assert changed == [not skipped] * 4
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


def test_an_overflow_still_shrinks_the_scale() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    clipper = GradClipper(model, SkipAbove(5.0), optimizer=optimizer, scaler=scaler)
    backward(model, float("inf"), scaler)
    assert clipper.clip().skipped
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 128.0


def test_a_scaler_does_not_change_what_rules_see() -> None:
    """Two passes over gradients that are still scaled, and thresholds in units of those that are not."""
    results = []
    for scale in (None, 2.0**14):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        rule = Chain([distclip.CentralizeGradient(), distclip.ClipByValue(0.1), distclip.StableSPAM(), 0.3])
        clipper = GradClipper(model, rule, optimizer=optimizer, scaler=scaler)
        for _ in range(3):
            optimizer.zero_grad()
            backward(model, 5.0, scaler)
            clipper.clip()
            if scaler is not None:
                scaler.step(optimizer)
                scaler.update()
        results.append([param.grad for param in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def adaptive() -> Chain:
    return Chain([AdaGC(warmup_steps=1), ZClip(warmup_steps=2), distclip.AutoClip()])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_of_torch(tmp_path: Path) -> None:
    """It loads only keys that are there before: into a clipper that has never clipped."""
    model = make_model()
    clipper = GradClipper(model, adaptive())
    for size in (1.0, 3.0, 2.0):
        backward(model, size)
        clipper.clip()
    save({"clipper": clipper}, checkpoint_id=tmp_path)
    state: dict[str, Any] = clipper.state_dict()
    fresh = GradClipper(model, adaptive())
    load({"clipper": fresh}, checkpoint_id=tmp_path)
    assert fresh.state_dict() == state
    reports = []
    for each in (clipper, fresh):
        model.zero_grad()
        backward(model, 4.0)
        reports.append(each.clip().to_dict())
    assert reports[0] == reports[1]


def test_complex_and_sparse_gradients() -> None:
    model = nn.ParameterDict({"z": nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))})
    model["z"].grad = torch.full((2, 2), 3 + 4j)
    GradClipper(model, distclip.AdaptiveGradientClipping()).clip()
    torch.testing.assert_close(model["z"].grad.abs().flatten(), torch.full((4,), 0.01))
    with pytest.raises(TypeError, match="the gradient of z is complex: this rule takes means of real ones"):
        GradClipper(model, distclip.CentralizeGradient()).clip()
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 1])).sum().backward()
    with pytest.raises(TypeError, match="the gradient of weight is sparse: this rule looks at the rows of dense ones"):
        GradClipper(embedding, distclip.AdaptiveGradientClipping()).clip()
    assert GradClipper(embedding, distclip.AdaGC()).clip().coefficient < 1


def test_what_clip_in_backward_cannot_do() -> None:
    limited = distclip.ClipByValue(1.0)
    mixtures = (Chain([limited, 1.0]), Chain([1.0, limited]), distclip.PerGroup({"*": limited}))
    for rule in (SkipAbove(1.0), distclip.AdaptiveGradientClipping(), *mixtures):
        with pytest.raises(ValueError, match=r"cannot serve .* Use clip"):
            GradClipper(make_model(), rule).clip_in_backward(previous_norm=True)


def test_a_rule_of_sizes_clips_in_backward() -> None:
    rule = distclip.ClipByBlockRMS(0.1)
    one, other = make_model(), make_model()
    GradClipper(one, rule).clip_in_backward()
    for model in (one, other):
        backward(model, 5.0)
    GradClipper(other, rule).clip()
    compare(one, other)


def compare(one: nn.Module, other: nn.Module) -> None:
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_rules_put_together_clip_in_backward_by_the_previous_norms() -> None:
    """Memory and all: each step is scaled by what the one before it gives."""
    rule = Chain([AdaGC(warmup_steps=1), distclip.PerGroup({"0.*": 0.5}), 0.2])
    one, other = make_model(), make_model()
    GradClipper(one, rule).clip_in_backward(previous_norm=True)
    for _ in range(3):
        for model in (one, other):
            model.zero_grad()
            backward(model, 5.0)
    # The gradients are the same in every step, so that what clip() would do comes one step late.
    again = GradClipper(other, Chain([AdaGC(warmup_steps=1), distclip.PerGroup({"0.*": 0.5}), 0.2]))
    for _ in range(2):
        other.zero_grad()
        backward(other, 5.0)
        again.clip()
    compare(one, other)
