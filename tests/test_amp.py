"""GradScaler, folding into fused optimizers and attach(), on one process; many ranks are in test_amp_ranks.py."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import distclip
from distclip import ClipByNorm, ClipByValue, GradClipper

SCALERS: list[type[torch.amp.GradScaler]] = [torch.amp.GradScaler, distclip.amp.GradScaler]
FUSED: list[Callable[..., Optimizer]] = [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad]
scalers = pytest.mark.parametrize("make_scaler", SCALERS, ids=["torch", "distclip"])
fused = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    loss: Tensor = 10 * model(x).square().mean()
    return loss


def poison(model: nn.Module) -> None:
    grad = next(model.parameters()).grad
    assert grad is not None
    grad.view(-1)[0] = math.inf


def same(one: nn.Module, other: nn.Module, rtol: float = 2e-6) -> None:
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=1e-7)


@scalers
@fused
@pytest.mark.parametrize("unscaled_by_hand", [False, True])
def test_training_with_a_scaler_is_that_of_torch(
    make_scaler: type[torch.amp.GradScaler], fused: bool, unscaled_by_hand: bool
) -> None:
    ours, theirs = make_model(), make_model()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05, fused=fused) for m in (ours, theirs)]
    scaler = make_scaler("cpu", init_scale=1024.0, growth_interval=3)
    reference = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    clipper = GradClipper(ours, 0.5, optimizer=optimizers[0], scaler=scaler)
    applied = []
    for step in range(12):
        for model, optimizer, each in ((ours, optimizers[0], scaler), (theirs, optimizers[1], reference)):
            optimizer.zero_grad()
            each.scale(loss_of(model, step)).backward()
            if step == 5:
                poison(model)
            if model is theirs or unscaled_by_hand:
                each.unscale_(optimizer)
            if model is theirs:
                truth = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            else:
                report = clipper.clip()
                applied.append(report.applied)
            each.step(optimizer)
            each.update()
        assert scaler.get_scale() == reference.get_scale()
        assert report.skipped.item() is report.nonfinite.item() is (step == 5)
        if step != 5:
            assert report.total_norm.item() == pytest.approx(truth.item(), rel=1e-5)
        same(ours, theirs)
    assert applied[5] == "skipped"
    assert set(applied) == {"folded" if fused else "in place", "skipped"}
    assert not hasattr(optimizers[0], "grad_scale")
    assert not hasattr(optimizers[0], "found_inf")


@pytest.mark.parametrize("make", FUSED, ids=lambda make: make.__name__)
@pytest.mark.parametrize("rule", [0.5, 1e9, 0.0, math.inf], ids=str)
def test_folding_equals_clipping_in_place(make: Callable[..., Optimizer], rule: float) -> None:
    ours, theirs = make_model(), make_model()
    fused, plain = make(ours.parameters(), lr=0.05, fused=True), make(theirs.parameters(), lr=0.05)
    if not getattr(fused, "_step_supports_amp_scaling", False):
        pytest.skip(f"this torch's fused {make.__name__} takes no scale")
    clipper, reference = GradClipper(ours, rule, optimizer=fused), GradClipper(theirs, rule)
    for step in range(5):
        for model, optimizer in ((ours, fused), (theirs, plain)):
            optimizer.zero_grad()
            loss_of(model, step).backward()
        before = [p.grad.clone() for p in ours.parameters() if p.grad is not None]
        report = clipper.clip()
        reference.clip()
        assert report.applied == ("folded" if rule < 1 else "nothing")
        for param, grad in zip(ours.parameters(), before, strict=True):
            assert param.grad is not None
            assert torch.equal(param.grad, grad)
        fused.step()
        plain.step()
        same(ours, theirs)
        assert vars(fused).keys() == vars(make(make_model().parameters(), fused=True)).keys()
        assert not fused._optimizer_step_pre_hooks
        assert not fused._optimizer_step_post_hooks


def test_a_folded_coefficient_is_for_its_own_gradients_only() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    clipper = GradClipper(model, 0.5, optimizer=optimizer)
    loss_of(model, 0).backward()
    assert clipper.clip().applied == "folded"
    optimizer.zero_grad()  # this step is given up
    loss_of(model, 1).backward()
    before = [p.detach().clone() for p in model.parameters()]
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    for param, old, grad in zip(model.parameters(), before, grads, strict=True):
        torch.testing.assert_close(old - param, grad)


def test_gradients_must_not_change_between_a_fold_and_its_step() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    clipper = GradClipper(model, 0.5, optimizer=optimizer)
    loss_of(model, 0).backward()
    clipper.clip()
    loss_of(model, 1).backward()
    with pytest.raises(RuntimeError, match=r"changed after clip\(\)"):
        optimizer.step()


@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_twice_folds_once(scaled: bool) -> None:
    ours, theirs = make_model(), make_model()
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
    clipper = GradClipper(ours, 0.5, optimizer=optimizer, scaler=scaler)
    scaler.scale(loss_of(ours, 0)).backward()
    first = clipper.clip()
    with pytest.warns(UserWarning, match="ran twice"):
        second = clipper.clip()
    assert first.to_dict() == second.to_dict()
    scaler.step(optimizer)
    loss_of(theirs, 0).backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    torch.optim.SGD(theirs.parameters(), lr=1.0).step()
    same(ours, theirs)


def test_folding_keeps_no_gradient_alive() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    clipper = GradClipper(model, 0.5, optimizer=optimizer)
    loss_of(model, 0).backward()
    clipper.clip()
    grads = [weakref.ref(p.grad) for p in model.parameters() if p.grad is not None]
    optimizer.zero_grad()
    gc.collect()
    assert [grad() for grad in grads] == [None] * 4


@pytest.mark.parametrize(
    "rule", [ClipByNorm(0.1), ClipByValue(0.01), distclip.ClipByGlobalNorm(1e-33)], ids=["norm", "value", "tiny"]
)
def test_what_cannot_be_folded_is_scaled_in_place(rule: distclip.Rule) -> None:
    ours, theirs = make_model(), make_model()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, fused=True)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1)
    clipper = GradClipper(ours, rule, optimizer=optimizer)
    for model in (ours, theirs):
        loss_of(model, 0).backward()
    GradClipper(theirs, rule).clip()
    assert clipper.clip().to_dict()["applied"] == "in place"
    optimizer.step()
    reference.step()
    same(ours, theirs)


def test_a_closure_gets_gradients_in_place() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    clipper = GradClipper(model, 0.5, optimizer=optimizer)
    loss_of(model, 0).backward()
    norm = clipper.clip().total_norm.item()
    seen: list[float] = []

    def closure() -> float:
        seen.append(distclip.grad_norm(model).item())
        return 1.0

    assert optimizer.step(closure) == 1.0
    assert norm > 0.5
    assert seen == [pytest.approx(0.5, rel=1e-5)]
    assert not hasattr(optimizer, "grad_scale")


@fused
def test_a_clip_inside_a_closure_is_for_the_step_that_runs(fused: bool) -> None:
    ours, theirs = make_model(), make_model()
    optimizer, reference = (torch.optim.SGD(m.parameters(), lr=1.0, fused=fused) for m in (ours, theirs))
    clipper = GradClipper(ours, 1e-3, optimizer=optimizer)

    def closure() -> float:
        loss = loss_of(ours, 0)
        loss.backward()
        assert clipper.clip().applied == "in place"
        return loss.item()

    optimizer.step(closure)
    loss_of(theirs, 0).backward()
    nn.utils.clip_grad_norm_(theirs.parameters(), 1e-3)
    reference.step()
    same(ours, theirs)


@fused
def test_skip_leaves_parameters_and_state_as_they_were(fused: bool) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    clipper = GradClipper(model, 0.5, optimizer=optimizer, nonfinite="skip")
    loss_of(model, 0).backward()
    clipper.clip()
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    state = [t.clone() for s in optimizer.state.values() for t in s.values()]
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    poison(model)
    report = clipper.clip()
    assert report.skipped
    assert report.applied == ("folded" if fused else "skipped")
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(
        torch.equal(t, old)
        for t, old in zip((t for s in optimizer.state.values() for t in s.values()), state, strict=True)
    )


def test_two_optimizers_skip_together() -> None:
    model = make_model()
    one, two = torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.SGD(model[2].parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    clipper = GradClipper(model, 0.5, optimizer=[one, two], scaler=scaler)
    scaler.scale(loss_of(model, 0)).backward()
    poison(model)
    before = [p.detach().clone() for p in model.parameters()]
    clipper.clip()
    scaler.step(one)
    scaler.step(two)
    scaler.update()
    assert scaler.get_scale() == 32.0
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_sum_that_overflows_is_no_overflow() -> None:
    """Each of these is finite in float16; torch's norm of them is not."""
    model = nn.Linear(64, 64).half()
    for param in model.parameters():
        param.grad = torch.full_like(param, 60000.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    report = GradClipper(model, 1.0, optimizer=optimizer, scaler=scaler).clip()
    assert not report.nonfinite
    assert report.total_norm.item() == pytest.approx(60000 / 8 * math.sqrt(64 * 65), rel=1e-6)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 8.0
    assert distclip.grad_norm(model).item() == pytest.approx(1.0, rel=1e-3)


def test_what_goes_wrong_with_scalers_is_told() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    clipper = GradClipper(model, 1.0, optimizer=optimizer, scaler=scaler)
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match="scaler= needs optimizer="):
        GradClipper(model, 1.0, scaler=scaler).clip()
    with pytest.raises(RuntimeError, match=r"no loss went through scaler\.scale"):
        clipper.clip()
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 0)).backward()
    clipper.clip()
    with pytest.raises(RuntimeError, match=r"already been called"):
        scaler.unscale_(optimizer)
    with pytest.warns(UserWarning, match="ran twice"):
        clipper.clip()
    scaler.scale(loss_of(model, 1)).backward()
    with pytest.raises(RuntimeError, match="in the middle of an accumulation"):
        clipper.clip()
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"after scaler.step\(\)|in the middle"):
        clipper.clip()
    scaler.update()
    other = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises(ValueError, match=r"1 parameters \(of shape \(3,\) ...\) that are not in the clipper's model"):
        GradClipper(model, 1.0, optimizer=other, scaler=scaler).clip()
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer or several, got str"):
        GradClipper(model, 1.0, optimizer=["adam"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="cannot serve a scaler"):
        GradClipper(model, ClipByNorm(1.0), optimizer=optimizer, scaler=scaler).clip_in_backward()


def test_a_disabled_scaler_is_none() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = distclip.amp.GradScaler("cpu", enabled=False)
    clipper = GradClipper(model, 0.5, optimizer=optimizer, scaler=scaler).attach(optimizer)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert clipper.report is not None
    assert distclip.grad_norm(model).item() == pytest.approx(0.5, rel=1e-5)


def test_functions_under_our_scaler() -> None:
    model = make_model().half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = distclip.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 6).half()).square().mean()).backward()
        if step:
            with pytest.raises(RuntimeError, match=r"still multiplied by the loss scale 8: call scaler.unscale_"):
                distclip.clip_grad_norm_(model, 1.0)
        scaler.unscale_(optimizer)
        norm = distclip.clip_grad_norm_(model, 0.01)
        assert 0.01 < norm < 10
        scaler.step(optimizer)
        scaler.update()
    assert distclip.grad_norm(model).item() == pytest.approx(0.01, rel=1e-2)


def test_our_scaler_loads_what_torch_saved() -> None:
    theirs, ours = torch.amp.GradScaler("cpu", init_scale=4.0), distclip.amp.GradScaler("cpu")
    theirs.scale(torch.ones(()))
    ours.load_state_dict(theirs.state_dict())
    assert ours.scale(torch.ones(())).item() == 4.0
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert isinstance(ours, torch.amp.GradScaler)


@fused
@scalers
def test_attached_with_a_scaler(make_scaler: type[torch.amp.GradScaler], fused: bool) -> None:
    ours, theirs = make_model(), make_model()
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.05, fused=fused)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.05)
    scaler, other = make_scaler("cpu", init_scale=256.0), torch.amp.GradScaler("cpu", init_scale=256.0)
    given = scaler if type(scaler) is torch.amp.GradScaler else None
    clipper = GradClipper(ours, 0.5, scaler=given).attach(optimizer)
    for step in range(6):
        for model, each, s in ((ours, optimizer, scaler), (theirs, reference, other)):
            each.zero_grad()
            s.scale(loss_of(model, step)).backward()
            if step == 3:
                poison(model)
            if model is theirs:
                s.unscale_(each)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            s.step(each)
            s.update()
        same(ours, theirs)
        assert scaler.get_scale() == other.get_scale()
    assert clipper.steps == 6
    clipper.detach()
    assert "step" not in vars(optimizer)
    assert "step" not in vars(scaler)


def test_attached_without_its_scaler() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GradClipper(model, 0.5).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(ValueError, match="Pass it: GradClipper"):
        scaler.step(optimizer)


@fused
@pytest.mark.parametrize("scheduled", ["before", "after"])
def test_attached_with_a_scheduler_and_a_closure(fused: bool, scheduled: str) -> None:
    ours, theirs = make_model(), make_model()
    optimizer, reference = (torch.optim.SGD(m.parameters(), lr=0.1, fused=fused) for m in (ours, theirs))
    clipper = GradClipper(ours, 0.5)

    def schedule(optimizer: Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    if scheduled == "before":
        scheduler = schedule(optimizer)
        assert clipper.attach(optimizer) is clipper
    else:
        clipper.attach(optimizer)
        scheduler = schedule(optimizer)
    other = schedule(reference)
    with pytest.raises(RuntimeError, match="attached already"):
        clipper.attach(optimizer)
    with pytest.raises(RuntimeError, match="attached already"):
        GradClipper(ours, 1.0).attach(optimizer)
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(ours, step)
            loss.backward()
            return loss

        reference.zero_grad()
        loss_of(theirs, step).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        if step % 2:
            loss: Any = optimizer.step(closure)
            assert loss.item() > 0
        else:
            closure()
            optimizer.step()
        reference.step()
        scheduler.step()
        other.step()
        same(ours, theirs)
    assert clipper.steps == 4
    clipper.detach()
    before = [p.detach().clone() for p in ours.parameters()]
    loss_of(ours, 9).backward()
    grads = [p.grad.clone() for p in ours.parameters() if p.grad is not None]
    optimizer.step()
    assert clipper.steps == 4
    for param, old, grad in zip(ours.parameters(), before, grads, strict=True):
        torch.testing.assert_close(old - param, grad * optimizer.param_groups[0]["lr"])


def test_optimizers_that_cannot_be_attached() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="LBFGS makes several gradients"):
        GradClipper(model).attach(torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.Adafactor(m.parameters()),
        pytest.param(
            lambda m: torch.optim.Muon([p for p in m.parameters() if p.ndim == 2]),
            marks=pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon"),
        ),
        lambda m: torch.optim.Adam(m.parameters(), foreach=False),
        lambda m: torch.optim.Adam(m.parameters(), foreach=True),
        lambda m: torch.optim.AdamW(
            [{"params": m[0].parameters()}, {"params": m[2].parameters(), "lr": 0.5}], fused=True
        ),
        lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01),
    ],
    ids=["adafactor", "muon", "for-loop", "foreach", "groups", "rmsprop"],
)
def test_optimizers_of_every_kind(make: Callable[[nn.Module], Optimizer]) -> None:
    ours, theirs = make_model(), make_model()
    optimizer, reference = make(ours), make(theirs)
    clipper = GradClipper(ours, 0.1, optimizer=optimizer, nonfinite="skip").attach(optimizer)
    for step in range(4):
        for model, each in ((ours, optimizer), (theirs, reference)):
            model.zero_grad()
            loss_of(model, step).backward()
            if step == 2:
                poison(model)
            elif model is theirs:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if step != 2 or model is ours:
                each.step()
        same(ours, theirs, rtol=1e-5)
    assert clipper.steps == 4


def test_a_compiled_step_between() -> None:
    """Clipping stays outside what is compiled."""
    model = make_model()
    compiled: Any = torch.compile(model, backend="eager")
    clipper = GradClipper(compiled, 0.5)
    loss_of(compiled, 0).backward()
    report = clipper.clip()
    assert report.total_norm > 0.5
    assert distclip.grad_norm(model).item() == pytest.approx(0.5, rel=1e-5)


@pytest.fixture
def accelerate() -> Iterator[Any]:
    module = pytest.importorskip("accelerate")
    yield module
    module.state.AcceleratorState._reset_state(reset_partial_state=True)
    module.state.GradientState._reset_state()


@pytest.mark.parametrize("attached", [False, True], ids=["clip", "attach"])
def test_an_optimizer_that_accelerate_prepared(accelerate: Any, attached: bool) -> None:
    ours, theirs = make_model(), make_model()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    inner, reference = (torch.optim.AdamW(m.parameters(), lr=0.05, fused=not attached) for m in (ours, theirs))
    schedules = [torch.optim.lr_scheduler.StepLR(each, 1, gamma=0.5) for each in (inner, reference)]
    model, optimizer, scheduler = accelerator.prepare(ours, inner, schedules[0])
    clipper = GradClipper(model, 0.5, optimizer=optimizer)
    if attached:
        clipper.attach(optimizer)
    for step in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, step))
            if accelerator.sync_gradients and not attached:
                assert clipper.clip().applied == "folded"
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        (loss_of(theirs, step) / 2).backward()
        if step % 2:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
            reference.step()
            schedules[1].step()
            reference.zero_grad()
        same(ours, theirs, rtol=1e-5)
    assert clipper.steps == 3
    assert scheduler.get_last_lr() == schedules[1].get_last_lr()
    clipper.detach()
    assert not {"grad_scale", "found_inf", "_distclip_attachment"} & vars(inner).keys()


@fused
@scalers
@pytest.mark.parametrize("attached", [False, True], ids=["clip", "attach"])
def test_the_scaler_that_accelerate_steps_with(
    accelerate: Any, attached: bool, make_scaler: type[torch.amp.GradScaler], fused: bool
) -> None:
    """Nobody names it: it sets the inner optimizer's ``step`` anew in each step, past ours."""
    accelerate.Accelerator(cpu=True)
    ours, theirs = make_model(), make_model()
    inner, reference = (torch.optim.AdamW(m.parameters(), lr=0.05, fused=fused) for m in (ours, theirs))
    scaler, other = make_scaler("cpu", init_scale=64.0), torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(inner, scaler=scaler)
    clipper = GradClipper(ours, 0.5) if attached else GradClipper(ours, 0.5, optimizer=optimizer)
    if attached:
        clipper.attach(optimizer)
    for step in range(5):
        for model, each in ((ours, scaler), (theirs, other)):
            each.scale(loss_of(model, step)).backward()
            if step == 2:
                poison(model)
        if not attached:
            clipper.clip()
        optimizer.step()
        other.unscale_(reference)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        other.step(reference)
        other.update()
        assert scaler.get_scale() == other.get_scale()
        assert fused or optimizer.step_was_skipped is (step == 2)
        optimizer.zero_grad()
        reference.zero_grad()
        same(ours, theirs)
    assert clipper.steps == 5
    clipper.detach()
    assert "step" not in vars(scaler)
    scaler.scale(loss_of(ours, 9)).backward()
    optimizer.step()
    assert clipper.steps == 5


class Lookahead(Optimizer):
    """An optimizer around another, as users write them; scalers know it, not the inner one."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step()


def test_an_optimizer_around_another_is_unscaled_once() -> None:
    ours, theirs = make_model(), make_model()
    optimizer = Lookahead(torch.optim.SGD(ours.parameters(), lr=0.1))
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    clipper = GradClipper(ours, 0.5, optimizer=optimizer, scaler=scaler)
    for step in range(3):
        for model in (ours, theirs):
            model.zero_grad()
        scaler.scale(loss_of(ours, step)).backward()
        clipper.clip()
        scaler.step(optimizer)
        scaler.update()
        loss_of(theirs, step).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
        same(ours, theirs)


def test_a_clip_of_some_parameters_forgets_no_overflow() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = distclip.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(loss_of(model, 0)).backward()
    poison(model)
    scaler.unscale_(optimizer)
    distclip.clip_grad_norm_(model[2], 1.0)  # the inf is in the other layer
    before = [p.detach().clone() for p in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 32.0
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("tried_again", [False, True])
def test_a_fused_step_that_raised_leaves_nothing_for_later_steps(tried_again: bool) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    clipper = GradClipper(model, 0.5, optimizer=optimizer)

    def out_of_memory(*_: Any) -> None:
        raise MemoryError

    loss_of(model, 0).backward()
    clipper.clip()
    hook = optimizer.register_step_pre_hook(out_of_memory)
    with pytest.raises(MemoryError):
        optimizer.step()
    hook.remove()
    if tried_again:
        optimizer.step()
        assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    assert clipper.clip().applied == "folded"
    assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()
    optimizer.step()
    assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()


def test_a_group_that_is_not_fused_is_clipped_in_place() -> None:
    model = make_model()
    groups: list[dict[str, Any]] = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    groups[1]["fused"] = False
    optimizer = torch.optim.AdamW(groups, fused=True)
    clipper = GradClipper(model, 0.5, optimizer=optimizer)
    loss_of(model, 0).backward()
    assert clipper.clip().applied == "in place"
    optimizer.step()


def test_detach_forgets_the_optimizer() -> None:
    model = make_model()
    clipper = GradClipper(model, 0.5)
    clipper.attach(torch.optim.AdamW(model.parameters(), fused=True)).detach()
    loss_of(model, 0).backward()
    assert clipper.clip().applied == "in place"


def test_folding_among_the_hooks_of_others() -> None:
    """torch walks through them while ours comes and goes."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    clipper = GradClipper(model, 0.5, optimizer=optimizer)
    called: list[str] = []
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        assert clipper.clip().applied == "folded"
        optimizer.register_step_pre_hook(lambda *_: called.append("before"))
        optimizer.register_step_post_hook(lambda *_: called.append("after"))
        optimizer.step()
    assert called == ["before", "after", "before", "before", "after", "after"]
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 2
