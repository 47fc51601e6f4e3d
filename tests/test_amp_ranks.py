"""GradScaler, folding and attach() on many ranks: training runs beside torch's order, and one decision for all."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import distclip
from distclip import GradClipper
from tests.amp_runs import (
    SCALERS,
    Run,
    Trace,
    by_distclip,
    by_torch,
    differences,
    local,
    make_optimizer,
    plant,
    planted,
    same_on_all_ranks,
)
from tests.collectives import recorded_collectives
from tests.layouts import LAYOUTS
from tests.nets import loss_of, make_batch, make_net
from tests.ranks import ranks, run_ranks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Under autocast a difference in the last bit of a float32 parameter becomes one in the last bit of a shorter number.
LIMITS = {
    torch.float32: {"loss": 1e-6, "norm": 3e-5, "param": 3e-5},
    torch.bfloat16: {"loss": 2e-3, "norm": 8e-2, "param": 5e-2},
    torch.float16: {"loss": 1e-3, "norm": 2e-2, "param": 1e-2},
}
FSDP1 = "fsdp1-full_shard-orig"


def close(ours: Trace, theirs: Trace, dtype: torch.dtype) -> None:
    found = differences(ours, theirs)
    assert all(found[what] <= limit for what, limit in LIMITS[dtype].items()), found


def reference_of(run: Run) -> Trace:
    """torch's order on the same layout with the scaler that torch documents for it, wherever that trains right.

    Where torch does not: FSDP2 + TP in float32, one process on the whole batch (shorter numbers round otherwise there,
    hence the same layout with torch's two halves of a clip, one mesh at a time); FSDP1 with fused kernels and FSDP2 +
    TP, a scaler whose flag all ranks share (see ``WorldScaler``). FSDP1 with a scaler that is not its own: its own.
    """
    if run.layout == "fsdp2+tp" and run.dtype == torch.float32:
        return by_torch(run, alone=True)
    if run.scaler is None:
        return by_torch(run)
    if run.layout == "fsdp2+tp" or (run.layout == FSDP1 and run.fused):
        return by_torch(replace(run, scaler="world"))
    return by_torch(replace(run, scaler="sharded" if run.layout == FSDP1 else "torch"))


def scalers_of(run: Run) -> list[str | None]:
    """Those to train with: the one that torch documents, and where gradients overflow also the others."""
    if run.dtype != torch.float16:
        return [None]
    if run.layout == "fsdp2+tp":
        return ["distclip" if run.fused else "torch"]
    usual, *others = ["sharded", "torch", "distclip"] if run.layout == FSDP1 else ["torch", "distclip"]
    return [usual, *(others if run.overflow else [])]


def overflows_of(run: Run) -> list[bool]:
    """Whether to plant them. Sharded runs take long: the 47 other steps of those with overflows must do in bf16."""
    long: dict[torch.dtype, list[str]] = {
        torch.float32: [],
        torch.bfloat16: [FSDP1, "fsdp2", "fsdp2+tp"],
        torch.float16: ["fsdp2+tp"],
    }
    return [True] if run.layout in long[run.dtype] else [False, True]


def check_training(layout: str, dtype: torch.dtype) -> None:
    for fused in (False, True):
        run = Run(layout, dtype, "torch" if dtype == torch.float16 else None, fused)
        for overflow in overflows_of(run):
            run = replace(run, overflow=overflow)
            theirs = reference_of(run)
            assert theirs.stepped.count(False) == (3 if overflow else 0)
            assert theirs.losses[-1] < theirs.losses[0] * 0.8
            for scaler in scalers_of(run):
                ours = by_distclip(replace(run, scaler=scaler))
                same_on_all_ranks(ours)
                close(ours, theirs, dtype)


@pytest.mark.parametrize(
    ("layout", "size", "precision"),
    [
        pytest.param(
            layout,
            size,
            precision,
            marks=[] if size < 2 or (precision == "fp16" and layout == "fsdp2") else [pytest.mark.slow],
        )
        for layout, size in [("single", 1), ("ddp", 2), (FSDP1, 2), ("fsdp2", 2), ("fsdp2+tp", 4)]
        for precision in DTYPES
    ],
)
def test_training_is_that_of_torch(layout: str, size: int, precision: str) -> None:
    run_ranks(check_training, size, layout, DTYPES[precision])


@ranks(4)
@pytest.mark.parametrize("layout", ["hsdp-2x", "tp", pytest.param("fsdp1-hybrid_shard-flat", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_more_layouts_beside_one_process(layout: str, fused: bool) -> None:
    """In float32, where one process on the whole batch rounds alike; the scale doubles and shrinks on the way."""
    if layout == "tp":
        # DTensor's linears want the ranks to divide the width of the network.
        assert LAYOUTS[layout].hidden % dist.get_world_size() == 0
    run = Run(layout, scaler="torch", fused=fused, overflow=True, steps=24)
    ours = by_distclip(run)
    same_on_all_ranks(ours)
    close(ours, by_torch(run, alone=True), run.dtype)


@ranks(2)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2", FSDP1])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_attached(layout: str, fused: bool) -> None:
    run = Run(layout, fused=fused, overflow=True, scaler="world" if layout == FSDP1 else "torch", steps=24)
    theirs = by_torch(run)
    for scaler in ("torch", "distclip"):
        ours = by_distclip(replace(run, scaler=scaler, attach=True))
        same_on_all_ranks(ours)
        close(ours, theirs, run.dtype)


@ranks(2)
@pytest.mark.parametrize("layout", ["fsdp2", FSDP1])
def test_a_scale_too_large_at_first(layout: str) -> None:
    """Gradients overflow by themselves, on the ranks that they please, until the scale has come down."""
    run = Run(layout, torch.float16, "torch", init_scale=2.0**30, steps=24)
    ours = by_distclip(run)
    same_on_all_ranks(ours)
    assert ours.stepped.count(False) > 5
    assert ours.stepped[-4:].count(True) >= 3
    close(ours, reference_of(run), run.dtype)


class Stepper:
    """One rank's part of a model that the test cuts by hand, trained by a plain scaler of torch's."""

    def __init__(self, model: nn.Module, fused: bool = False, **options: Any) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        self.clipper = GradClipper(model, 1.0, optimizer=self.optimizer, scaler=self.scaler, check="never", **options)

    def step(self, overflow_on: int | None) -> tuple[float, bool, float]:
        """Scale, whether parameters changed, norm."""
        self.optimizer.zero_grad()
        before = [param.detach().clone() for param in self.model.parameters()]
        self.scaler.scale(torch.stack([param.square().sum() for param in self.model.parameters()]).sum()).backward()
        if dist.get_rank() == overflow_on:
            plant(self.model)
        norm = self.clipper.clip().total_norm.item()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        changed = any(not torch.equal(old, new) for old, new in zip(before, self.model.parameters(), strict=True))
        return self.scaler.get_scale(), changed, norm


def check_one_decision(stepper: Stepper) -> None:
    """An overflow on each rank in turn: all skip, all halve."""
    for overflow_on in (None, 0, None, 1):
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, stepper.step(overflow_on))
        assert len(set(map(repr, everybody))) == 1, everybody
        scale, changed, norm = everybody[0]
        assert changed is math.isfinite(norm) is (overflow_on is None)
    assert scale == 16.0
    assert not {"grad_scale", "found_inf"} & vars(stepper.optimizer).keys()


@ranks(2)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_pipeline_stages_and_experts_decide_together(fused: bool) -> None:
    torch.manual_seed(dist.get_rank())
    check_one_decision(Stepper(nn.Linear(3, 2 + dist.get_rank()), fused, pipeline_group=dist.group.WORLD))

    model = nn.ModuleDict({"dense": nn.Linear(4, 3), "experts": nn.Linear(3, 2)})
    for param in model["dense"].parameters():
        dist.broadcast(param.detach(), 0)
    distclip.declare(model["experts"], sharded=dist.group.WORLD)
    check_one_decision(Stepper(model, fused))


@ranks(2)
def test_two_optimizers_of_one_model() -> None:
    model = LAYOUTS["fsdp2"].wrap(make_net())
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizers = [make_fused(trained[:3]), torch.optim.SGD(trained[3:], lr=0.1, foreach=False)]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    clipper = GradClipper(model, 1.0, optimizer=optimizers, scaler=scaler)
    for step in range(6):
        overflow = step in (2, 3)
        before = [local(param).clone() for param in trained]
        scaler.scale(loss_of(model, make_batch(seed=step + 10 * dist.get_rank()))).backward()
        with planted(model, overflow):
            pass
        report = clipper.clip()
        assert report.applied == ("skipped" if overflow else "in place")
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        changed = [not torch.equal(old, local(new)) for old, new in zip(before, trained, strict=True) if new.numel()]
        assert not any(changed) if overflow else sum(changed) >= len(changed) - 2  # empty shards
        assert scaler.get_scale() == 64.0 / 2 ** max(0, min(step - 1, 2))


def make_fused(params: Any, fused: bool = True) -> Optimizer:
    return torch.optim.AdamW(params, lr=0.05, eps=1e-3, fused=fused, foreach=None if fused else False)


@ranks(2)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2", FSDP1])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_accumulation(layout: str, fused: bool) -> None:
    """Micro-batches without synchronisation, then one clip; beside one process that sees all of them."""
    model, alone = LAYOUTS[layout].wrap(make_net()), make_net()
    scaler, theirs = (torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2) for _ in range(2))
    optimizer, reference = make_optimizer(model, fused), make_optimizer(alone, fused)
    clipper = GradClipper(model, 1.0, optimizer=optimizer, scaler=scaler)
    rank = dist.get_rank()
    for step in range(5):
        for micro in range(2):
            tokens, targets = make_batch(seed=10 * step + micro)
            set_sync(model, micro == 1)
            with planted(model, step == 2 and micro == 1):
                scaler.scale(loss_of(model, (tokens[rank::2], targets[rank::2]))).backward()
            theirs.scale(loss_of(alone, (tokens, targets))).backward()
        if step == 2:
            plant(alone)
        norm = clipper.clip().total_norm
        theirs.unscale_(reference)
        truth = torch.nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
        for each, own in ((scaler, optimizer), (theirs, reference)):
            each.step(own)
            each.update()
            own.zero_grad()
        assert scaler.get_scale() == theirs.get_scale()
        assert norm.isfinite() == (step != 2)
        if step != 2:
            assert norm.item() == pytest.approx(truth.item(), rel=1e-5)


def set_sync(model: nn.Module, on: bool) -> None:
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)
    elif isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = on
    else:
        # What no_sync() sets on the way in and out.
        for unit in FullyShardedDataParallel.fsdp_modules(model):
            unit._sync_gradients = on  # type: ignore[assignment]


@ranks(2)
@pytest.mark.parametrize("layout", ["fsdp2", FSDP1, "fsdp1-full_shard-flat"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_functions_after_unscale(layout: str, fused: bool) -> None:
    """The drop-in tells distclip's scaler what it found; so it does when called for each part of the model."""
    for reverse in (None, False, True):
        model = LAYOUTS[layout].wrap(make_net())
        optimizer, scaler = make_optimizer(model, fused), distclip.amp.GradScaler("cpu", init_scale=64.0)
        distclip.grad_norm(model)
        params = [param for param in model.parameters() if param.requires_grad]
        parts = [params] if reverse is None else [params[:1], params[1:]][:: -1 if reverse else 1]
        for step in range(4):
            scaler.scale(loss_of(model, make_batch(seed=step + 10 * dist.get_rank()))).backward()
            with planted(model, step == 1):
                pass
            if step:
                with pytest.raises(RuntimeError, match="still multiplied by the loss scale"):
                    distclip.clip_grad_norm_(model, 1.0)
            scaler.unscale_(optimizer)
            before = [local(param).detach().clone() for param in params]
            for part in parts:
                distclip.clip_grad_norm_(part, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            same = all(torch.equal(old, local(new)) for old, new in zip(before, params, strict=True))
            assert same == (step == 1)
            assert scaler.get_scale() == (64.0 if step < 1 else 32.0)


@ranks(4)
@pytest.mark.parametrize("layout", ["ddp", FSDP1, "fsdp2", "hsdp-2x", "fsdp2+tp"])
@pytest.mark.parametrize("scaler", ["torch", "sharded", "distclip"])
def test_no_collective_more(layout: str, scaler: str) -> None:
    made = SCALERS[scaler]("cpu", init_scale=64.0)
    model = LAYOUTS[layout].wrap(make_net(LAYOUTS[layout].hidden))
    optimizer = make_optimizer(model, fused=True)
    clipper = GradClipper(model, 1.0, optimizer=optimizer, scaler=made)
    for step in range(3):
        made.scale(loss_of(model, make_batch(seed=dist.get_rank() // 2 + 10 * step))).backward()
        with planted(model, step == 2 and layout != "ddp"):
            pass
        with recorded_collectives() as names:
            clipper.clip()
            made.step(optimizer)
            made.update()
        optimizer.zero_grad()
        assert step == 0 or names == ["allreduce_"] * LAYOUTS[layout].collectives
    assert made.get_scale() == (64.0 if layout == "ddp" else 32.0)


@ranks(2)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2", FSDP1, "fsdp1-full_shard-flat"])
def test_folding_changes_no_gradient(layout: str) -> None:
    """Beside clipping in place; a step with an inf is left out by the fused step itself, with all its state."""
    ours, theirs = (LAYOUTS[layout].wrap(make_net()) for _ in range(2))
    fused, plain = make_optimizer(ours, fused=True), make_fused([p for p in theirs.parameters() if p.requires_grad])
    clipper = GradClipper(ours, 0.5, optimizer=fused, nonfinite="skip")
    reference = GradClipper(theirs, 0.5, nonfinite="skip")
    for group in plain.param_groups:
        group["lr"] = fused.param_groups[0]["lr"]
    for step in range(5):
        for model in (ours, theirs):
            with planted(model, step == 3):
                loss_of(model, make_batch(seed=step + 10 * dist.get_rank())).backward()
        grads = {name: local(p.grad).clone() for name, p in ours.named_parameters() if p.grad is not None}
        before = state_of(ours, fused)
        assert clipper.clip().applied == "folded"
        reference.clip()
        for name, param in ours.named_parameters():
            if name in grads:
                assert param.grad is not None
                assert torch.equal(local(param.grad), grads[name])
        assert not {"grad_scale", "found_inf"} & vars(fused).keys()
        for optimizer in (fused, plain):
            optimizer.step()
            optimizer.zero_grad()
        assert not {"grad_scale", "found_inf"} & vars(fused).keys()
        assert not fused._optimizer_step_pre_hooks
        assert not fused._optimizer_step_post_hooks
        assert same(before, state_of(ours, fused)) == (step == 3)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(local(mine), local(other), rtol=1e-5, atol=1e-6)


def state_of(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return [local(tensor).detach().clone() for tensor in (*model.parameters(), *state)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@ranks(2)
@pytest.mark.parametrize(
    ("layout", "scaler"), [("ddp", "torch"), ("fsdp2", "torch"), (FSDP1, "torch"), (FSDP1, "sharded")]
)
def test_attached_without_its_scaler(layout: str, scaler: str) -> None:
    model = LAYOUTS[layout].wrap(make_net())
    optimizer, made = make_optimizer(model, fused=False), SCALERS[scaler]("cpu", init_scale=8.0)
    clipper = GradClipper(model, 0.5).attach(optimizer)
    made.scale(loss_of(model, make_batch())).backward()
    with pytest.raises(ValueError, match=r"GradClipper\(model, rule, scaler=scaler\)"):
        made.step(optimizer)
    assert clipper.steps == 0


@ranks(2)
def test_fused_sgd_on_dtensors_is_refused() -> None:
    model = LAYOUTS["fsdp2"].wrap(make_net())
    for make in (torch.optim.SGD, torch.optim.Adagrad):
        optimizer = make([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
        with pytest.raises(ValueError, match="cannot step DTensors"):
            GradClipper(model, 1.0, optimizer=optimizer)
        with pytest.raises(ValueError, match="cannot step DTensors"):
            GradClipper(model, 1.0).attach(optimizer)


@ranks(2)
def test_what_one_rank_cannot_unscale_is_told_on_all() -> None:
    """One rank forgot to update(): it says so, and the other hears that it will not come."""
    model = LAYOUTS["fsdp2"].wrap(make_net())
    optimizer, scaler = make_optimizer(model, fused=False), torch.amp.GradScaler("cpu", init_scale=8.0)
    clipper = GradClipper(model, 0.5, optimizer=optimizer, scaler=scaler)
    for step in range(2):
        scaler.scale(loss_of(model, make_batch(seed=step))).backward()
        if step:
            break
        clipper.clip()
        scaler.step(optimizer)
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            scaler.update()
    expected = "another rank" if dist.get_rank() == 0 else r"after scaler\.step\(\)|in the middle of an accumulation"
    with pytest.raises(RuntimeError, match=expected):
        clipper.clip()


def cuda_step(model: nn.Module, step: int, scaler: torch.amp.GradScaler | None = None) -> None:
    tokens, targets = make_batch(seed=step)
    with torch.autocast("cuda", dtype=torch.float16, enabled=scaler is not None):
        loss = loss_of(model, (tokens.cuda(), targets.cuda()))
    (scaler.scale(loss) if scaler else loss).backward()


@ranks(1, backend="nccl")
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("layout", ["single", "ddp", "fsdp2", FSDP1])
def test_no_wait_for_the_device(layout: str, fused: bool) -> None:
    model = LAYOUTS[layout].wrap(make_net().cuda())
    optimizer = make_fused([p for p in model.parameters() if p.requires_grad], fused)
    clipper = GradClipper(model, 0.5, optimizer=optimizer, nonfinite="skip" if fused else "propagate")
    for step in range(4):
        optimizer.zero_grad()
        cuda_step(model, step)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            report = clipper.clip()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.step()
    assert report.applied == ("folded" if fused else "in place")


@ranks(1, backend="nccl")
def test_a_clip_in_a_cuda_graph() -> None:
    model = make_net().cuda()
    params = [param for param in model.parameters() if param.requires_grad]
    clipper = GradClipper(model, 0.5, check="never")
    cuda_step(model, 0)
    clipper.clip()
    grads = [param.grad for param in params if param.grad is not None]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    for grad in grads:
        grad.add_(1.0)  # or it would be the second clip of the same gradients
    with torch.cuda.graph(graph, stream=stream):
        report = clipper.clip()
    for factor in (3.0, 1e-4):
        values = [torch.randn_like(grad) * factor for grad in grads]
        for grad, value in zip(grads, values, strict=True):
            grad.copy_(value)
        graph.replay()
        truth = torch.stack([value.double().norm() for value in values]).norm().item()
        assert report.total_norm.item() == pytest.approx(truth, rel=1e-6)
        for grad, value in zip(grads, values, strict=True):
            torch.testing.assert_close(grad, value * min(1.0, 0.5 / (truth + 1e-6)))


@ranks(1, backend="nccl")
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", ["torch", "distclip"])
def test_training_with_a_scaler_on_a_gpu(name: str, fused: bool) -> None:
    ours, theirs = make_net().cuda(), make_net().cuda()
    scaler, reference = (SCALERS[kind]("cuda", init_scale=2.0**16, growth_interval=5) for kind in (name, "torch"))
    optimizers = [make_fused(list(model.parameters()), fused) for model in (ours, theirs)]
    clipper = GradClipper(ours, 0.5, optimizer=optimizers[0], scaler=scaler)
    for step in range(20):
        for model, each, optimizer in ((ours, scaler, optimizers[0]), (theirs, reference, optimizers[1])):
            optimizer.zero_grad()
            cuda_step(model, step, each)
            with planted(model, step == 7, alone=True):
                pass
            if model is theirs:
                each.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            else:
                assert clipper.clip().applied == ("folded" if fused else "in place")
            each.step(optimizer)
            each.update()
        assert scaler.get_scale() == reference.get_scale()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)
