"""Clipping while backward() runs, against one process that holds the whole model and clips by hand."""

import gc
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate as replicate_plain
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from distclip import ClipByGlobalNorm, ClipByNorm, ClipByValue, GradClipper, Rule
from distclip.rules import Decision, Norms
from tests.collectives import recorded_collectives
from tests.layouts import LAYOUTS, Layout, backward, build
from tests.nets import Net, loss_of, make_batch, make_net
from tests.ranks import ranks, run_ranks
from tests.test_clipper import small_model

fsdp1 = partial(FullyShardedDataParallel, device_id=torch.device("cpu"))

STEPS = 6
SGD = partial(torch.optim.SGD, lr=0.002, momentum=0.9, foreach=False)


class ToMedian(Rule):
    """A rule whose coefficients are one a tensor, and yet need all norms."""

    needs_per_tensor = True

    def decide(self, norms: Norms) -> Decision:
        assert norms.per_tensor is not None
        median = norms.per_tensor[norms.per_tensor > 0].median()
        return Decision((median / norms.per_tensor).clamp(max=1.0), median)


RULES: dict[str, tuple[Rule, bool]] = {
    "norm": (ClipByNorm(1.0), False),
    "value": (ClipByValue((-0.05, 0.1)), False),
    "global": (ClipByGlobalNorm(5.0), True),
    "global-1": (ClipByGlobalNorm(20.0, 1.0), True),
    "global-inf": (ClipByGlobalNorm(1.0, math.inf), True),
    "norm-previous": (ClipByNorm(1.0), True),
    "median-previous": (ToMedian(), True),
}


def step_in_backward(model: nn.Module) -> None:
    """An optimizer for each parameter, that steps in its hook and frees the gradient."""
    for param in model.parameters():
        if param.requires_grad:
            optimizer = SGD([param])

            def step(param: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.step()
                param.grad = None

            param.register_post_accumulate_grad_hook(step)


def by_hand(grads: dict[str, Tensor], rule: Rule, previous: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """What the rule makes of a step's whole gradients; `previous`: those of the step before, where it goes by them."""
    if isinstance(rule, ClipByValue):
        return {name: grad.clamp(*rule.bounds) for name, grad in grads.items()}
    norms = {n: torch.linalg.vector_norm(g, rule.norm_type) for n, g in (previous or grads).items()}
    if isinstance(rule, ClipByGlobalNorm):
        total = torch.linalg.vector_norm(torch.stack(list(norms.values())), rule.norm_type)
        return {name: grad * min(1.0, rule.max_norm / (total.item() + 1e-6)) for name, grad in grads.items()}
    limit = rule.max_norm if isinstance(rule, ClipByNorm) else torch.stack(list(norms.values())).median().item()
    return {name: grad * min(1.0, limit / norms[name].item()) for name, grad in grads.items()}


def trained_by_hand(layout: Layout, rule: Rule, by_previous: bool) -> tuple[Net, list[float]]:
    """The network after STEPS steps on the whole batch in one process, and each step's norm."""
    net = make_net(layout.hidden)
    optimizer = SGD([p for p in net.parameters() if p.requires_grad])
    norms: list[float] = []
    previous: dict[str, Tensor] | None = None
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(net, make_batch(8)).backward()
        grads = {name: p.grad.double() for name, p in net.named_parameters() if p.grad is not None}
        every = torch.cat([grad.flatten() for grad in grads.values()])
        norms.append(torch.linalg.vector_norm(every, rule.norm_type).item())
        clipped = grads if by_previous and step == 0 else by_hand(grads, rule, previous)
        for name, param in net.named_parameters():
            if name in clipped:
                param.grad = clipped[name].float()
        optimizer.step()
        previous = grads if by_previous else None
    return net, norms


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_training(layout: Layout, name: str) -> None:
    rule, by_previous = RULES[name]
    truth, norms = trained_by_hand(layout, rule, by_previous)
    model = layout.wrap(make_net(layout.hidden))
    step_in_backward(model)
    clipper = GradClipper(model, rule)
    clipper.clip_in_backward(previous_norm=by_previous)
    for step in range(STEPS):
        backward(layout, model)
        assert clipper.report is not None
        assert clipper.report.total_norm.item() == pytest.approx(norms[step], rel=1e-4)
        assert bool(clipper.report.clipped) == (step > 0 or not by_previous)
    assert clipper.steps == STEPS
    assert all(param.grad is None for param in model.parameters())
    got = {name: whole(param) for name, param in model.named_parameters()}
    torch.testing.assert_close(got, dict(truth.named_parameters()), rtol=1e-4, atol=1e-5)


CASES = [
    *(("single", 1, name) for name in RULES),
    *(("fsdp2", size, name) for size in (2, 4) for name in RULES),
    *(("hsdp-2x", 4, name) for name in RULES),
    *(
        (layout, size, name)
        for layout, size in (
            ("replicate-dtensor", 2),
            ("fsdp2-cpu-offload", 2),
            ("fsdp2-keep-unsharded", 2),
            ("tp", 2),
            ("tp-sequence", 2),
            ("fsdp2+tp", 4),
            ("fsdp2+tp-sequence", 4),
        )
        for name in ("norm", "value", "global")
    ),
]


@pytest.mark.parametrize(
    ("layout", "size", "name"),
    [
        pytest.param(
            *case, id="-".join(map(str, case)), marks=[pytest.mark.slow] if case[1] == 4 and case[2] != "norm" else []
        )
        for case in CASES
    ],
)
def test_training(layout: str, size: int, name: str) -> None:
    run_ranks(check_training, size, LAYOUTS[layout], name)


@ranks(2)
@pytest.mark.parametrize(
    ("name", "small"), [("norm", 12), ("value", 0), ("global", 0)]
)  # twelve trained tensors, each cut in two
def test_collectives(name: str, small: int) -> None:
    """One all-reduce for each tensor whose norm is wanted, and one for the report."""
    counts = []
    rule, by_previous = RULES[name]
    for clipped in (False, True):
        model = LAYOUTS["fsdp2"].wrap(make_net())
        if clipped:
            GradClipper(model, rule).clip_in_backward(previous_norm=by_previous)
        with recorded_collectives() as collectives:
            loss_of(model, make_batch(2)).backward()
        counts.append(len(collectives))
    assert counts[1] - counts[0] == small + 1


@ranks(2)
def test_fsdp2_accumulates_before_the_hooks() -> None:
    layout = LAYOUTS["fsdp2-accumulate"]
    model = layout.wrap(make_net())
    expected = GradClipper(layout.wrap(make_net()), math.inf)
    backward(layout, expected._params.modules[0])
    step_in_backward(model)
    clipper = GradClipper(model, ClipByNorm(1.0))
    clipper.clip_in_backward()
    backward(layout, model)
    assert clipper.steps == 1
    assert clipper.report is not None
    assert clipper.report.total_norm.item() == pytest.approx(expected.clip().total_norm.item(), rel=1e-6)


@ranks(2)
def test_fsdp2_without_one_root() -> None:
    """Each half reduces its last gradients in a callback of its own at the end of backward()."""
    model = small_model()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    twin = small_model()
    step_in_backward(model)
    clipper = GradClipper(model, 0.1)
    clipper.clip_in_backward(previous_norm=True)
    data = torch.linspace(-1, 1, 12).view(3, 4)
    (10 * twin(data).square().sum()).backward()
    (10 * model(data).square().sum()).backward()
    truth = math.sqrt(sum(p.grad.square().sum().item() for p in twin.parameters() if p.grad is not None))
    assert clipper.report is not None
    assert clipper.report.total_norm.item() == pytest.approx(truth, rel=1e-5)


@ranks(2)
def test_a_module_that_ran_twice_under_fully_shard() -> None:
    torch.manual_seed(0)
    model, twin = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)
    twin.load_state_dict(model[0].state_dict())
    fully_shard(model[0])
    clipper = GradClipper(model, ClipByNorm(0.1))
    clipper.clip_in_backward()
    model(model(torch.ones(1, 4, requires_grad=True))).sum().backward()
    twin(twin(torch.ones(1, 4))).sum().backward()
    assert clipper.report is not None
    assert clipper.report.total_norm.item() == pytest.approx(GradClipper(twin, 1.0).clip().total_norm.item(), rel=1e-6)
    grad = next(model.parameters()).grad
    assert grad is not None
    assert whole(grad).norm().item() == pytest.approx(0.1, rel=1e-6)


@ranks(2)
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (DistributedDataParallel, r"cannot clip 0\.weight: DistributedDataParallel averages gradients after"),
        (replicate_plain, r"cannot clip 0\.weight: replicate\(\) averages"),
        (fsdp1, "FullyShardedDataParallel never calls hooks of single parameters"),
        (partial(fsdp1, use_orig_params=True), "FullyShardedDataParallel never calls hooks of single parameters"),
    ],
    ids=["ddp", "replicate", "fsdp1-flat", "fsdp1-orig"],
)
def test_wrappers_that_reduce_later(wrap: Callable[[nn.Module], nn.Module], message: str) -> None:
    clipper = GradClipper(wrap(small_model()), ClipByNorm(1.0))
    with pytest.raises(RuntimeError, match=message):
        clipper.clip_in_backward()


@ranks(2)
def test_parameters_that_fully_shard_ignores() -> None:
    net = make_net()
    fully_shard(net, ignored_params={net.scale})
    with pytest.raises(RuntimeError, match=r"cannot clip scale: it is kept out of fully_shard"):
        GradClipper(net, ClipByNorm(1.0)).clip_in_backward()
    net.scale.requires_grad_(False)
    GradClipper(net, ClipByNorm(1.0)).clip_in_backward().remove()


@ranks(2)
def test_ranks_that_disagree() -> None:
    model = LAYOUTS["fsdp2"].wrap(make_net())
    clipper = GradClipper(model, ClipByNorm(1.0))
    with pytest.raises(RuntimeError, match="disagree on the rule"):
        clipper.clip_in_backward(previous_norm=dist.get_rank() == 0)


@pytest.mark.parametrize(
    ("clipper", "options", "message"),
    [
        ({"rule": 1.0}, {}, r"ClipByGlobalNorm\(max_norm=1\.0, norm_type=2\.0\) needs the norm over all gradients"),
        ({"rule": ClipByValue(1.0)}, {"previous_norm": True}, r"means nothing to ClipByValue\(clip_value=1\.0\)"),
        ({"nonfinite": "skip"}, {"previous_norm": True}, "cannot honour nonfinite='skip'"),
        ({"nonfinite": "raise"}, {"previous_norm": True}, "cannot honour nonfinite='raise'"),
    ],
)
def test_bad_settings(clipper: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradClipper(small_model(), **clipper).clip_in_backward(**options)


@ranks(2)
def test_pipelines_are_refused() -> None:
    clipper = GradClipper(small_model(), ClipByNorm(1.0), pipeline_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="cannot serve pipeline_group"):
        clipper.clip_in_backward()


def backward_of(model: nn.Module) -> None:
    dtype = next(model.parameters()).dtype
    (10 * model(torch.linspace(-1, 1, 12, dtype=dtype).view(3, 4)).square().sum()).backward()


def test_clip_while_active() -> None:
    model = small_model()
    clipper = GradClipper(model, ClipByNorm(0.1))
    handle = clipper.clip_in_backward()
    with pytest.raises(RuntimeError, match="active already"):
        clipper.clip_in_backward()
    backward_of(model)
    with pytest.raises(RuntimeError, match=r"clip_in_backward\(\) is active"):
        clipper.clip()
    handle.remove()
    handle.remove()
    model.zero_grad()
    backward_of(model)
    assert clipper.clip().clipped
    assert clipper.steps == 2
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


def test_hooks_of_any_age_come_after_the_clip() -> None:
    model = nn.Linear(2, 1, bias=False)
    seen: list[float] = []
    model.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm().item()))
    GradClipper(model, ClipByNorm(0.5)).clip_in_backward()
    model.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm().item()))
    model(torch.tensor([[3.0, 4.0]])).sum().backward()
    assert seen == pytest.approx([0.5, 0.5])


@pytest.mark.filterwarnings("ignore:.*AccumulateGrad node's stream:UserWarning")
def test_the_optimizer_in_backward_that_torch_brings() -> None:
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 1.0})
    GradClipper(model, ClipByNorm(0.5)).clip_in_backward()
    model(torch.tensor([[3.0, 4.0]])).sum().backward()
    torch.testing.assert_close(before - model.weight, torch.tensor([[0.3, 0.4]]))
    assert model.weight.grad is None


@pytest.mark.parametrize("previous", [False, True])
def test_several_backwards_per_step(previous: bool) -> None:
    """Each is a step of its own: two losses over two parts of the model, and over the same part."""
    model = nn.ModuleList([nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)])
    seen: list[float] = []

    def free(param: Tensor) -> None:
        assert param.grad is not None
        seen.append(param.grad.norm().item())
        param.grad = None

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(free)
    clipper = GradClipper(model, ClipByNorm(2.0))
    clipper.clip_in_backward(previous_norm=previous)
    totals = []
    for part, data in ((0, [3.0, 4.0]), (1, [6.0, 8.0]), (0, [3.0, 4.0])):
        model[part](torch.tensor([data])).sum().backward()
        assert clipper.report is not None
        totals.append(clipper.report.total_norm.item())
    assert totals == [5.0, 10.0, 5.0]
    # By the norms of the backward before, in which the other part had no gradient: no norm, nothing to clip.
    assert seen == pytest.approx([5.0, 10.0, 5.0] if previous else [2.0, 2.0, 2.0])


def test_a_gradient_that_nobody_freed() -> None:
    model = small_model()
    GradClipper(model, ClipByNorm(1e-3)).clip_in_backward()
    backward_of(model)
    with pytest.raises(RuntimeError, match=r"gradient of 2\.\w+ was clipped in an earlier backward"):
        backward_of(model)
    model.zero_grad(set_to_none=False)
    backward_of(model)
    model.zero_grad()
    backward_of(model)


def test_a_backward_that_failed_leaves_nothing() -> None:
    model = small_model()
    clipper = GradClipper(model, 0.1)
    clipper.clip_in_backward(previous_norm=True)
    failing = next(model.parameters()).register_post_accumulate_grad_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backward_of(model)
    assert clipper.steps == 0
    failing.remove()
    model.zero_grad()
    twin = small_model()
    backward_of(twin)
    backward_of(model)
    assert clipper.report is not None
    assert clipper.report.total_norm == GradClipper(twin, math.inf).clip().total_norm
    assert not clipper.report.clipped


def test_a_norm_that_is_not_finite_does_not_reach_the_next_step() -> None:
    model = nn.Linear(2, 1, bias=False)
    clipper = GradClipper(model, 1.0)
    clipper.clip_in_backward(previous_norm=True)
    seen = []
    for value in (4.0, math.inf, math.nan, 2.0, 1.0):
        model.zero_grad()
        model(torch.tensor([[value, 0.0]])).sum().backward()
        assert clipper.report is not None
        assert clipper.report.nonfinite == (not math.isfinite(value))
        seen.append(clipper.report.coefficient.item())
    assert seen == pytest.approx([1.0, 0.25, 0.25, 0.25, 0.5], rel=1e-5)


@pytest.mark.parametrize("name", ["global", "median-previous"])
def test_resuming(name: str) -> None:
    def run(steps: int, model: nn.Module, clipper: GradClipper) -> None:
        for _ in range(steps):
            backward_of(model)
            torch.optim.SGD(model.parameters(), lr=1e-3, foreach=False).step()
            model.zero_grad()
        assert clipper.report is not None

    rule, _ = RULES[name]
    whole_run, first = small_model(), small_model()
    clipper = GradClipper(whole_run, rule)
    clipper.clip_in_backward(previous_norm=True)
    run(4, whole_run, clipper)
    clipper = GradClipper(first, rule)
    assert "in_backward" not in clipper.state_dict()
    clipper.clip_in_backward(previous_norm=True)
    run(2, first, clipper)
    for late in (False, True):
        second = small_model()
        second.load_state_dict(first.state_dict())
        resumed = GradClipper(second, rule)
        if late:
            resumed.clip_in_backward(previous_norm=True)
        resumed.load_state_dict(clipper.state_dict())
        if not late:
            resumed.clip_in_backward(previous_norm=True)
        run(2, second, resumed)
        assert resumed.steps == 4
        for ours, theirs in zip(second.parameters(), whole_run.parameters(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model, _: model[0].requires_grad_(),
            r"0\.weight was not clipped: it was replaced, or became",
        ),
        (lambda model, _: setattr(model[2], "weight", nn.Parameter(torch.ones(2, 3))), r"2\.weight was not clipped"),
        (lambda model, _: model.append(nn.Linear(2, 2)), r"3\.weight was not clipped"),
        (lambda model, _: model.double(), "were converted"),
        (lambda _, clipper: setattr(clipper, "rule", ClipByNorm(2.0)), "rule was exchanged"),
    ],
)
def test_changes_after_the_hooks_were_set(change: Callable[[Any, GradClipper], Any], message: str) -> None:
    model = small_model()
    model[0].requires_grad_(False)
    clipper = GradClipper(model, ClipByNorm(1.0))
    handle = clipper.clip_in_backward()
    backward_of(model)
    model.zero_grad()
    change(model, clipper)
    with pytest.raises(RuntimeError, match=message):
        backward_of(model)
    handle.remove()
    model.zero_grad()
    clipper.clip_in_backward()
    backward_of(model)


@ranks(2)
def test_gradients_of_before() -> None:
    """Partial ones would tell a plan that they stay so; whole ones do no harm."""
    model = small_model()
    backward_of(model)
    GradClipper(model, ClipByNorm(1.0)).clip_in_backward()
    partial_ones = build(LAYOUTS["tp-sequence"])
    with pytest.raises(RuntimeError, match=r"call zero_grad\(\) before clip_in_backward"):
        GradClipper(partial_ones, ClipByNorm(1.0)).clip_in_backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    model, twin = small_model(), small_model()
    clipper = GradClipper(model, 0.1)
    clipper.clip_in_backward(previous_norm=True)
    data = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_()
    hidden: Any = checkpoint(model[0], data, use_reentrant=reentrant)
    loss = 10 * model[2](model[1](hidden)).square().sum()
    if reentrant:
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            loss.backward()
        return
    loss.backward()
    backward_of(twin)
    assert clipper.report is not None
    assert clipper.report.total_norm == GradClipper(twin, math.inf).clip().total_norm


def test_sparse_complex_and_wide_gradients() -> None:
    embed = nn.Embedding(5, 2, sparse=True)
    GradClipper(embed, ClipByNorm(0.5)).clip_in_backward()
    embed(torch.tensor([1, 1, 3])).sum().backward()
    assert embed.weight.grad is not None
    assert embed.weight.grad.to_dense().norm().item() == pytest.approx(0.5)

    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    handle = GradClipper(model, ClipByValue(1.0)).clip_in_backward()
    with pytest.raises(TypeError, match="gradient of weight is complex"):
        model.weight.abs().sum().backward()
    handle.remove()

    wide = nn.Linear(2, 1, bias=False).double()
    GradClipper(wide, ClipByNorm(1.0)).clip_in_backward()
    with pytest.raises(OverflowError):
        wide(torch.full((1, 2), 1e200, dtype=torch.float64)).sum().backward()


def test_nothing_is_left_behind() -> None:
    gc.collect()
    from distclip.layout import memory

    before = sum(type(thing) is memory.Mark for thing in gc.get_objects())
    for _ in range(5):
        model = small_model()
        clipper = GradClipper(model, ClipByNorm(1.0))
        clipper.clip_in_backward()
        backward_of(model)
        del model, clipper
    gc.collect()
    assert sum(type(thing) is memory.Mark for thing in gc.get_objects()) == before
