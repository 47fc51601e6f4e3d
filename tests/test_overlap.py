"""Gradients measured while backward() runs: the same numbers as `clip()` alone gives, without its read."""

import copy
import gc
import io
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import distclip
from distclip import GradClipper
from distclip.kernels import cpu
from distclip.layout.memory import Mark
from tests import oracle
from tests.collectives import recorded_collectives
from tests.layouts import LAYOUTS, Layout, backward
from tests.nets import loss_of, make_batch, make_net
from tests.ranks import ranks, run_ranks
from tests.test_clipper import small_model

# Clips that compare what hooks measured (the second and the third, and the fifth) come before the one looked at.
STEPS = 4


@contextmanager
def reads() -> Iterator[list[int]]:
    """The numbers of elements that the kernels read to measure norms, one for each call."""
    seen: list[int] = []

    def counted(kernel: Callable[[list[Tensor], float], Tensor], tensors: list[Tensor], p: float) -> Tensor:
        seen.append(sum(tensor.numel() for tensor in tensors))
        return kernel(tensors, p)

    with pytest.MonkeyPatch.context() as patch:
        for kernel in (cpu.power_sums, cpu.total_power):
            patch.setattr(cpu, kernel.__name__, partial(counted, kernel))
        yield seen


def check_clip(model: nn.Module, clipper: GradClipper, max_norm: float, layout: Layout | None = None) -> list[int]:
    """Clip, and hold norm and gradients against float64 on the whole; returns what the clip read."""
    grads = oracle.whole_grads(model)
    with reads() as seen, recorded_collectives() as collectives:
        report = clipper.clip()
    assert report.total_norm.item() == pytest.approx(oracle.norm(grads), rel=1e-6)
    assert report.clipped == (oracle.norm(grads) > max_norm)
    want = oracle.clip_by_global_norm(grads, max_norm)
    oracle.assert_same(oracle.whole_grads(model), want, layout.dtype if layout else torch.float32)
    if layout is not None and clipper.steps > 1:
        assert len(collectives) == layout.collectives
    return seen


def check_layout(layout: Layout, left: int) -> None:
    """`left`: calls of kernels that are left to clip() here."""
    model = layout.wrap(make_net(layout.hidden))
    clipper = GradClipper(model, 0.5, overlap=True)
    for _ in range(STEPS):
        model.zero_grad()
        backward(layout, model)
        seen = check_clip(model, clipper, 0.5, layout)
    assert len(seen) == left


slow = pytest.mark.slow
CASES = [
    ("single", 1, 0),
    ("ddp", 2, 0),
    ("ddp-accumulate", 2, 0),
    ("replicate", 2, 1),
    ("replicate-dtensor", 2, 0),
    ("fsdp2", 2, 0),
    ("fsdp2-accumulate", 2, 0),
    ("fsdp2-keep-unsharded", 2, 0),
    ("fsdp2-cpu-offload", 2, 0),
    ("fsdp2-mixed-precision", 2, 0),
    ("fsdp2-bf16", 2, 0),
    ("fsdp2-ignored", 2, 1),
    ("fsdp1-full_shard-orig", 2, 1),
    ("fsdp1-accumulate", 2, 1),
    ("tp", 2, 1),
    pytest.param("fsdp2-mixed-dtypes", 2, 2, marks=slow),
    pytest.param("fsdp2", 4, 0, marks=slow),
    pytest.param("hsdp-2x", 4, 0, marks=slow),
    pytest.param("fsdp2-context-parallel", 4, 0, marks=slow),
    pytest.param("fsdp2+tp", 4, 0, marks=slow),
    pytest.param("fsdp2+tp-sequence", 4, 0, marks=slow),
    pytest.param("fsdp1-full_shard-flat", 2, 1, marks=slow),
]


@pytest.mark.parametrize(("name", "size", "left"), CASES)
def test_layouts(name: str, size: int, left: int) -> None:
    run_ranks(check_layout, size, LAYOUTS[name], left)


def backward_of(model: nn.Module, scale: float = 1.0) -> None:
    dtype = next(model.parameters()).dtype
    (10 * scale * model(torch.linspace(-1, 1, 12, dtype=dtype).view(3, 4)).square().sum()).backward()


def started(model: nn.Module) -> GradClipper:
    """A clipper that is past its first comparisons."""
    clipper = GradClipper(model, 0.5, overlap=True)
    for _ in range(5):
        model.zero_grad()
        backward_of(model)
        clipper.clip()
    model.zero_grad()
    return clipper


def first_grad(model: nn.Module) -> Tensor:
    grad = next(model.parameters()).grad
    assert grad is not None
    return grad


def set_by_hand(model: nn.Module) -> None:
    for param in model.parameters():
        param.grad = torch.full_like(param, 3.0)


def free_one(model: nn.Module) -> None:
    next(model.parameters()).grad = None


def zero_in_place(model: nn.Module) -> None:
    model.zero_grad(set_to_none=False)
    backward_of(model, 2.0)


EDITS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda model: None,
    "in place": lambda model: first_grad(model).mul_(2),
    "exchanged": lambda model: setattr(next(model.parameters()), "grad", first_grad(model) * 3),
    "data set": lambda model: setattr(first_grad(model), "data", first_grad(model) * 3),
    "by hand": set_by_hand,
    "freed": free_one,
    "added": lambda model: backward_of(model, 3.0),
    "zeroed in place": zero_in_place,
    "another loss": lambda model: model[0](torch.ones(2, 4)).square().sum().backward(),
    "clipped": lambda model: distclip.clip_grad_norm_(model, 3.0),
    "another storage": lambda model: first_grad(model).set_((first_grad(model) * 2).untyped_storage()).resize_(3, 4),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_after_backward(name: str) -> None:
    model = small_model()
    clipper = started(model)
    for _ in range(2):
        model.zero_grad()
        backward_of(model)
        EDITS[name](model)
        seen = check_clip(model, clipper, 0.5)
        assert bool(seen) == (name in ("in place", "exchanged", "data set", "by hand", "clipped", "another storage"))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zeroed(set_to_none: bool) -> None:
    model = small_model()
    clipper = started(model)
    backward_of(model)
    model.zero_grad(set_to_none=set_to_none)
    if set_to_none:
        with pytest.warns(UserWarning, match="found no gradient"):
            assert clipper.clip().total_norm == 0
    else:
        assert clipper.clip().total_norm == 0


HIDDEN: dict[str, Callable[[nn.Module], Any]] = {
    "data": lambda model: first_grad(model).data.mul_(0.5),
    "unscaled": lambda model: torch._amp_foreach_non_finite_check_and_unscale_(
        [p.grad for p in model.parameters() if p.grad is not None], torch.zeros(1), torch.tensor(0.5)
    ),
    "numpy": lambda model: first_grad(model).numpy().__imul__(3),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_writes_that_torch_does_not_count(name: str) -> None:
    model = small_model()
    clipper = GradClipper(model, 0.5, overlap=True)
    for step in range(3):
        model.zero_grad()
        # In the second step there is nothing to see.
        backward_of(model, 0.0 if step == 1 else 1.0)
        HIDDEN[name](model)
        if step < 2:
            check_clip(model, clipper, 0.5)
        else:
            with pytest.warns(UserWarning, match=r"overlap=True is off from here on: the gradient of 0\.weight was"):
                check_clip(model, clipper, 0.5)
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())
    model.zero_grad()
    backward_of(model)
    HIDDEN[name](model)
    assert check_clip(model, clipper, 0.5)


def test_comparisons_become_rare() -> None:
    model = small_model()
    clipper = GradClipper(model, 0.5, overlap=True)
    read = []
    for step in range(1, 40):
        model.zero_grad()
        backward_of(model)
        with reads() as seen:
            clipper.clip()
        read += [step] if seen else []
    # The first clip has no hooks before it.
    assert read == [1, 2, 3, 5, 9, 17, 33]


RULES: dict[str, Callable[[], Any]] = {
    "global-1": lambda: distclip.ClipByGlobalNorm(0.5, 1.0),
    "global-inf": lambda: distclip.ClipByGlobalNorm(0.5, math.inf),
    "global-8": lambda: distclip.ClipByGlobalNorm(0.5, 8.0),
    "norm": lambda: distclip.ClipByNorm(0.1),
    "value": lambda: distclip.ClipByValue(0.01),
    "agc": lambda: distclip.AdaptiveGradientClipping(0.01),
    "zclip": lambda: distclip.ZClip(warmup_steps=2),
    "chain": lambda: [distclip.ClipByValue(0.5), distclip.ClipByNorm(0.3), 0.5],
    "norms": lambda: [distclip.ClipByGlobalNorm(1.0, math.inf), 0.5],
    "groups": lambda: {"0.*": 0.1, "*": distclip.ClipByNorm(0.1)},
}


def check_rule(name: str) -> None:
    models: list[nn.Module] = [small_model(), small_model()]
    if dist.is_initialized():
        for model in models:
            fully_shard(model)
    clippers = [GradClipper(m, RULES[name](), overlap=on) for m, on in zip(models, (False, True), strict=True)]
    for _ in range(6):
        for model, clipper in zip(models, clippers, strict=True):
            model.zero_grad()
            backward_of(model)
            clipper.clip()
        ours, theirs = (clipper.report for clipper in clippers)
        assert ours is not None
        assert theirs is not None
        for name in ("total_norm", "coefficient", "threshold"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=0)
        grads = [oracle.whole_grads(model) for model in models]
        oracle.assert_same(grads[1], grads[0])


@pytest.mark.parametrize("name", RULES)
def test_rules(name: str) -> None:
    check_rule(name)


@ranks(2)
@pytest.mark.parametrize("name", ["norm", "agc", "chain"])
def test_rules_on_two_ranks(name: str) -> None:
    check_rule(name)


def test_another_rule() -> None:
    model = small_model()
    clipper = started(model)
    clipper.rule = distclip.ClipByGlobalNorm(0.5, 1.0)
    for _ in range(3):
        model.zero_grad()
        backward_of(model)
        truth = oracle.norm(oracle.whole_grads(model), 1.0)
        assert clipper.clip().total_norm.item() == pytest.approx(truth, rel=1e-6)


def test_wide_sparse_and_complex_gradients() -> None:
    wide = small_model().double()
    clipper = started(wide)
    backward_of(wide)
    truth = oracle.norm(oracle.whole_grads(wide))
    assert clipper.clip().total_norm.item() == pytest.approx(truth, rel=1e-12)

    embed = nn.Embedding(5, 2, sparse=True)
    odd = nn.Module()
    odd.weight = nn.Parameter(torch.tensor([3.0 + 4.0j, 1.0j]))
    clipper = GradClipper([embed, odd], 0.5, overlap=True)
    for _ in range(STEPS):
        embed.zero_grad()
        odd.zero_grad()
        (embed(torch.tensor([1, 1, 3])).sum() + 0.5 * odd.weight.abs().square().sum()).backward()
        # Rows of 2 and of 1, and the complex weight itself.
        assert clipper.clip().total_norm.item() == pytest.approx(math.sqrt(2 * 4 + 2 * 1 + 25 + 1), rel=1e-6)


def test_micro_batches_are_measured_in_the_last_of_them() -> None:
    model = small_model()
    clipper = started(model)
    for step in range(4):
        model.zero_grad()
        with reads() as seen:
            for _ in range(3):
                backward_of(model)
        # In the first step nobody knows yet that three belong together.
        assert len(seen) == (3 if step == 0 else 1)
        check_clip(model, clipper, 0.5)
    model.zero_grad()
    backward_of(model)
    assert check_clip(model, clipper, 0.5)


def test_gradients_that_never_come_and_those_that_come_later() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)])
    model[1].requires_grad_(False)
    clipper = GradClipper(model, 0.5, overlap=True)
    for step in range(8):
        model[1].requires_grad_(step > 2)
        model.zero_grad()
        parts = [model[0], *([model[1]] if step > 2 else []), *([model[2]] if step % 2 else [])]
        sum(part(torch.ones(2, 4)).square().sum() for part in parts).backward()
        seen = check_clip(model, clipper, 0.5)
    assert not seen
    hooked = [bool(param._post_accumulate_grad_hooks) for param in model.parameters()]
    assert all(hooked)
    model[2] = nn.Linear(4, 4)
    for _ in range(STEPS):
        model.zero_grad()
        sum(part(torch.ones(2, 4)).square().sum() for part in model).backward()
        seen = check_clip(model, clipper, 0.5)
    assert not seen


def test_large_gradients_are_measured_before_backward_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distclip.overlap._ENOUGH", 1 << 20)
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(3)))
    clipper = GradClipper(model, 0.5, overlap=True)
    order: list[str] = []
    for _ in range(STEPS):
        order.clear()
        model.zero_grad()
        with reads() as seen:
            out = model(torch.ones(1, 1024))
            next(model.parameters()).register_hook(lambda grad, seen=seen: order.append(f"after {len(seen)}"))
            out.square().sum().backward()
        check_clip(model, clipper, 0.5)
    assert order[-1] == "after 2"


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    model = small_model()
    clipper = GradClipper(model, 0.5, overlap=True)
    for _ in range(STEPS):
        model.zero_grad()
        data = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_()
        hidden: Any = checkpoint(model[0], data, use_reentrant=reentrant)
        (10 * model[2](model[1](hidden)).square().sum()).backward()
        seen = check_clip(model, clipper, 0.5)
    assert not seen


def test_a_backward_that_failed() -> None:
    model = small_model()
    clipper = started(model)
    failing = next(model.parameters()).register_post_accumulate_grad_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backward_of(model)
    check_clip(model, clipper, 0.5)
    failing.remove()
    model.zero_grad()
    backward_of(model)
    check_clip(model, clipper, 0.5)


def test_attached_to_an_optimizer() -> None:
    model, twin = small_model(), small_model()
    for each, overlap in ((model, True), (twin, False)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.01, foreach=False)
        GradClipper(each, 0.5, overlap=overlap).attach(optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            backward_of(each)
            with reads() as seen:
                optimizer.step()
        assert bool(seen) != overlap
    torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()))


@pytest.mark.parametrize("by_hand", [False, True])
def test_loss_scale(by_hand: bool) -> None:
    """The scaler's own unscale_() is a write that torch does not count; its overflows come first."""
    norms: list[list[float]] = []
    told: list[str] = []
    for overlap in (False, True):
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, foreach=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
        clipper = GradClipper(model, 0.5, optimizer=optimizer, scaler=scaler, overlap=overlap)
        norms.append([])
        for step in range(9):
            optimizer.zero_grad()
            scaler.scale(10 * model(torch.linspace(-1, 1, 12).view(3, 4)).square().sum()).backward()
            if by_hand:
                scaler.unscale_(optimizer)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                clipper.clip()
            told += [str(warning.message) for warning in caught]
            assert clipper.report is not None
            norms[-1].append(clipper.report.total_norm.item())
            scaler.step(optimizer)
            scaler.update()
            assert step or not math.isfinite(norms[-1][0])
    assert math.isfinite(norms[0][-1])
    assert len(told) == by_hand
    assert all("overlap=True is off" in text and "GradScaler.unscale_" in text for text in told)
    assert norms[1] == pytest.approx(norms[0], rel=1e-6, nan_ok=True)


def test_nothing_keeps_hooks_or_gradients() -> None:
    model = small_model()
    clipper = started(model)
    backward_of(model)
    grad, overlap = weakref.ref(first_grad(model)), weakref.ref(clipper._overlap)
    assert all(param._post_accumulate_grad_hooks for param in model.parameters())
    model.zero_grad()
    assert grad() is None
    del clipper
    assert overlap() is None
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())
    backward_of(model)


def test_nothing_is_left_behind() -> None:
    gc.collect()
    before = sum(issubclass(type(thing), Mark) for thing in gc.get_objects())
    for _ in range(5):
        model = small_model()
        clipper = started(model)
        backward_of(model)
        del model, clipper
    gc.collect()
    assert sum(issubclass(type(thing), Mark) for thing in gc.get_objects()) == before


def test_copies_and_files() -> None:
    model = small_model()
    clipper = started(model)
    backward_of(model)
    twin = copy.deepcopy(model)
    assert not any(param._post_accumulate_grad_hooks for param in twin.parameters())
    file = io.BytesIO()
    torch.save({name: param.grad for name, param in model.named_parameters()}, file)
    torch.save(model, io.BytesIO())
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for name, param in twin.named_parameters():
        param.grad = loaded[name]
    with reads() as seen:
        norm = GradClipper(twin, math.inf, overlap=True).clip().total_norm
    assert seen
    assert norm == clipper.clip().total_norm
    copied_model, copied = copy.deepcopy((model, clipper))
    for _ in range(STEPS):
        copied_model.zero_grad()
        backward_of(copied_model)
        seen = check_clip(copied_model, copied, 0.5)
    assert not seen


def test_refused_with_clip_in_backward() -> None:
    with pytest.raises(ValueError, match="make the clipper without overlap=True"):
        GradClipper(small_model(), distclip.ClipByNorm(1.0), overlap=True).clip_in_backward()


@ranks(1)
@pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning")
def test_refused_with_a_deepspeed_engine() -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    from tests.test_deepspeed import CASES, make_engine

    with pytest.raises(ValueError, match="overlap=True cannot serve a DeepSpeed engine"):
        GradClipper(make_engine(CASES[0]), overlap=True)


def assert_same_grads(model: nn.Module, twin: nn.Module, exact: bool) -> None:
    grads, want = ([p.grad for p in each.parameters() if p.grad is not None] for each in (model, twin))
    torch.testing.assert_close(grads, want, rtol=0.0 if exact else 1e-6, atol=0.0 if exact else 1e-6)


@ranks(2, 3)
@pytest.mark.parametrize("in_place", [True, False])
def test_ddp_averages_as_before(in_place: bool) -> None:
    """By bucket; under no_sync; and when the clipper is gone."""
    exact = not in_place or dist.get_world_size() == 2
    model, twin = (
        DistributedDataParallel(make_net(), gradient_as_bucket_view=in_place, bucket_cap_mb=1e-4) for _ in range(2)
    )
    clipper, plain = GradClipper(model, 0.5, overlap=True), GradClipper(twin, 0.5)
    for step in range(8):
        for each in (model, twin):
            each.zero_grad(set_to_none=step % 2 == 0)
            if step % 3 == 2:
                with each.no_sync():
                    backward(LAYOUTS["ddp"], each.module)
            with reads() as early:
                backward(LAYOUTS["ddp"], each)
            # A clipper's first step comes before it knows the model.
            assert (len(early) > 1) == (each is model and step not in (0, 4))
        assert_same_grads(model, twin, exact)
        seen = check_clip(model, clipper, 0.5)
        assert clipper.report is not None
        assert clipper.report.total_norm.item() == pytest.approx(plain.clip().total_norm.item(), rel=1e-6)
        if step == 3:
            # Another one takes the same buckets over.
            assert not seen
            clipper = GradClipper(model, 0.5, overlap=True)
    assert not seen
    del clipper
    for each in (model, twin):
        each.zero_grad()
        backward(LAYOUTS["ddp"], each)
    assert_same_grads(model, twin, exact)


@ranks(2)
def test_ddp_with_uneven_inputs() -> None:
    model, twin = (DistributedDataParallel(small_model()) for _ in range(2))
    for each, overlap in ((model, True), (twin, False)):
        clipper = GradClipper(each, 0.5, overlap=overlap)
        with each.join():
            for _ in range(3 + 2 * dist.get_rank()):
                each.zero_grad()
                backward_of(each)
                clipper.clip()
    if dist.get_rank() == 1:
        assert_same_grads(model, twin, exact=False)


class Branches(nn.Module):
    """The second branch is used by none, the third by rank 0 alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers[0](x)
        return out + self.layers[2](x) if dist.get_rank() == 0 else out


@ranks(2)
@pytest.mark.parametrize("in_place", [True, False])
def test_ddp_with_unused_parameters(in_place: bool) -> None:
    model = DistributedDataParallel(Branches(), find_unused_parameters=True, gradient_as_bucket_view=in_place)
    clipper = GradClipper(model, 0.5, overlap=True)
    for step in range(STEPS):
        model.zero_grad()
        if step == 2:
            with model.no_sync():
                model.module.layers[1](torch.ones(1, 4)).sum().backward()
        (model(torch.ones(2, 4)).square().sum() * (1 + dist.get_rank())).backward()
        check_clip(model, clipper, 0.5)


@ranks(2)
def test_ddp_that_waits_for_an_unused_parameter() -> None:
    """It averages no further: gradients are what clip() alone would find."""
    model = DistributedDataParallel(Branches(), bucket_cap_mb=1e-5)
    clipper = GradClipper(model, 0.5, overlap=True)
    sum(layer(torch.ones(2, 4)).square().sum() for layer in model.module.layers).backward()
    clipper.clip()
    model.zero_grad()
    model(torch.ones(2, 4)).square().sum().backward()
    check_clip(model, clipper, 0.5)


@ranks(2)
def test_ddp_with_a_hook_of_the_users() -> None:
    model = DistributedDataParallel(make_net())
    model.register_comm_hook(None, allreduce_hook)
    clipper = GradClipper(model, 0.5, overlap=True)
    for _ in range(STEPS):
        model.zero_grad()
        backward(LAYOUTS["ddp"], model)
        assert len(check_clip(model, clipper, 0.5)) > 0


@ranks(2)
@pytest.mark.filterwarnings(r"ignore:clip\(\) found no gradient:UserWarning")
def test_a_pipeline_with_a_stage_without_gradients() -> None:
    model = small_model() if dist.get_rank() == 0 else nn.Sequential(nn.Identity(), nn.Linear(3, 3))
    clippers = [GradClipper(model, math.inf, pipeline_group=dist.group.WORLD, overlap=on) for on in (False, True)]
    for _ in range(STEPS):
        model.zero_grad()
        if dist.get_rank() == 0:
            backward_of(model)
        ours, theirs = (clipper._clip_under(None).total_norm for clipper in clippers)
        assert ours == theirs


@ranks(2)
def test_averages_by_hand() -> None:
    """A collective that nobody counts: left to clip()."""
    model = small_model()
    clipper = GradClipper(model, 0.5, overlap=True)
    for _ in range(STEPS):
        model.zero_grad()
        backward_of(model, 1.0 + dist.get_rank())
        for param in model.parameters():
            dist.all_reduce(param.grad)
        assert check_clip(model, clipper, 0.5)


@ranks(2)
def test_collectives_of_a_step() -> None:
    counts = []
    for overlap in (False, True):
        model = LAYOUTS["fsdp2"].wrap(make_net())
        clipper = GradClipper(model, 0.5, overlap=overlap)
        for _ in range(STEPS):
            with recorded_collectives() as collectives:
                model.zero_grad()
                loss_of(model, make_batch(2)).backward()
                clipper.clip()
        counts.append(collectives)
    assert counts[0] == counts[1]


@ranks(2)
def test_shards_edited_after_backward() -> None:
    model = LAYOUTS["fsdp2"].wrap(make_net())
    clipper = GradClipper(model, 0.5, overlap=True)
    for step in range(STEPS + 2):
        model.zero_grad()
        backward(LAYOUTS["fsdp2"], model)
        if step == STEPS:
            for param in model.parameters():
                if param.grad is not None:
                    param.grad.mul_(2)
        elif step == STEPS + 1:
            for param in model.parameters():
                if isinstance(param.grad, DTensor) and dist.get_rank() == 0:
                    param.grad._local_tensor.add_(1.0)
        check_clip(model, clipper, 0.5)
