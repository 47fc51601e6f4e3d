"""Training side by side: torch's documented order of a mixed-precision step, and distclip's, on the same layout."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import distclip
from distclip import GradClipper
from tests import oracle
from tests.layouts import LAYOUTS, Layout
from tests.nets import loss_of, make_batch, make_net

STEPS = 50
OVERFLOWS = (4, 20, 21)
"""Steps at which one element of one rank's gradients becomes inf."""
MAX_NORM = 2.0


class WorldScaler(torch.amp.GradScaler):
    """torch's, and its overflow flag, reduced over the world. FSDP1's own gives fused Adam a flag of shape (1,), which
    fails; under FSDP2 + TP torch's flag is reduced over the mesh of the first gradient only, and ranks part ways."""

    def unscale_(self, optimizer: Optimizer) -> None:
        super().unscale_(optimizer)
        for flag in self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
            # Not their sum: fused kernels skip for a flag of 1 only.
            dist.all_reduce(flag, dist.ReduceOp.MAX)


SCALERS: dict[str, Any] = {
    "torch": torch.amp.GradScaler,
    "sharded": ShardedGradScaler,
    "distclip": distclip.amp.GradScaler,
    "world": WorldScaler,
}


@dataclass(frozen=True)
class Run:
    """How to train."""

    layout: str
    dtype: torch.dtype = torch.float32
    """Of autocast; none for float32."""
    scaler: str | None = None
    fused: bool = False
    """AdamW with its fused kernels; else SGD with momentum, one tensor after the other."""
    overflow: bool = False
    attach: bool = False
    init_scale: float = 64.0
    steps: int = STEPS

    def make_scaler(self) -> torch.amp.GradScaler | None:
        if self.scaler is None:
            return None
        made: torch.amp.GradScaler = SCALERS[self.scaler]("cpu", init_scale=self.init_scale, growth_interval=8)
        return made


@dataclass
class Trace:
    """What came of it on this rank: one entry a step, but for ``params``, which are whole, at the end."""

    losses: list[float] = field(default_factory=list)
    """Mean over the job."""
    scales: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    stepped: list[bool] = field(default_factory=list)
    """Whether a parameter changed on this rank."""
    params: dict[str, Tensor] = field(default_factory=dict)


def by_distclip(run: Run) -> Trace:
    """``clip()``, or ``attach``, with scaler and optimizer given, and no ``unscale_``."""
    layout = LAYOUTS[run.layout]
    model = layout.wrap(make_net(layout.hidden))
    optimizer, scaler = make_optimizer(model, run.fused), run.make_scaler()
    # A scaler of torch's must be given; distclip's finds the attached clipper by itself.
    given = None if run.attach and run.scaler == "distclip" else scaler
    nonfinite: Any = "propagate" if scaler else "skip"
    clipper = GradClipper(model, MAX_NORM, optimizer=optimizer, scaler=given, nonfinite=nonfinite)
    if run.attach:
        clipper.attach(optimizer)
    trace = Trace()
    for step in range(run.steps):
        batch = part_of_batch(layout, step)
        with one_step(trace, model, optimizer, scaler):
            trace.losses.append(backward(run, model, batch, step, scaler))
            if not run.attach:
                clipper.clip()
            scaler.step(optimizer) if scaler else optimizer.step()
            if scaler:
                scaler.update()
        assert clipper.report is not None
        trace.norms.append(clipper.report.total_norm.item())
        assert clipper.report.skipped.item() is clipper.report.nonfinite.item() is not trace.stepped[-1]
    assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()
    clipper.detach()
    assert "step" not in vars(optimizer) | vars(scaler or nn.Module())
    trace.params = whole_params(model)
    return trace


def by_torch(run: Run, alone: bool = False) -> Trace:
    """torch's order: ``unscale_``, clip, ``step``, ``update``; without scaler the step is left out by hand.

    Args:
        alone: by one process on the whole batch, where torch cannot train the layout right.
    """
    layout = LAYOUTS["single" if alone else run.layout]
    model = layout.wrap(make_net(LAYOUTS[run.layout].hidden))
    optimizer, scaler = make_optimizer(model, run.fused), run.make_scaler()
    trace = Trace()
    for step in range(run.steps):
        batch = make_batch(seed=step) if alone else part_of_batch(layout, step)
        with one_step(trace, model, optimizer, scaler):
            trace.losses.append(backward(run, model, batch, step, scaler, alone))
            if scaler:
                scaler.unscale_(optimizer)
            norm = torchs_clip(model)
            trace.norms.append(norm.item())
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            elif norm.isfinite():
                optimizer.step()
    trace.params = whole_params(model)
    return trace


def torchs_clip(model: nn.Module) -> Tensor:
    """FSDP1 has a method for it: torch's function would take each rank's shards for all there is. On several meshes
    (FSDP2 + TP) torch's function fails, but its first half works on one mesh at a time."""
    if isinstance(model, FullyShardedDataParallel):
        total: Tensor = model.clip_grad_norm_(MAX_NORM)
        return total
    by_mesh: dict[Any, list[Tensor]] = {}
    for param in model.parameters():
        if param.grad is not None:
            by_mesh.setdefault(getattr(param, "device_mesh", None), []).append(param.grad)
    norms = [torch.nn.utils.get_total_norm(grads) for grads in by_mesh.values()]
    norm: Tensor = torch.stack([each.full_tensor() if isinstance(each, DTensor) else each for each in norms]).norm()
    coefficient = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
    for grad in (grad for grads in by_mesh.values() for grad in grads):
        local(grad).mul_(coefficient)
    return norm


def make_optimizer(model: nn.Module, fused: bool) -> Optimizer:
    """Fused kernels take one mesh at a time, so each has a group of its own; FSDP2 + TP has two."""
    groups: dict[Any, list[Tensor]] = {}
    for param in model.parameters():
        if param.requires_grad:
            groups.setdefault(getattr(param, "device_mesh", None), []).append(param)
    params = [{"params": group} for group in groups.values()]
    if fused:
        return torch.optim.AdamW(params, lr=0.01, eps=1e-3, fused=True)
    return torch.optim.SGD(params, lr=0.02, momentum=0.9, foreach=False)


def part_of_batch(layout: Layout, step: int) -> tuple[Tensor, Tensor]:
    """This rank's; ranks of one tensor-parallel group see the same."""
    alike = layout.tp if layout.tp > 0 else dist.get_world_size()
    mine = slice(dist.get_rank() // alike, None, dist.get_world_size() // alike)
    tokens, targets = make_batch(seed=step)
    return tokens[mine], targets[mine]


def backward(
    run: Run,
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    step: int,
    scaler: torch.amp.GradScaler | None,
    alone: bool = False,
) -> float:
    """Scaled gradients of one batch, with an inf at the steps where the run wants one; returns the job's loss."""
    with nullcontext() if run.dtype == torch.float32 else torch.autocast("cpu", dtype=run.dtype):
        loss = loss_of(model, batch)
    with planted(model, run.overflow and step in OVERFLOWS, alone):
        (scaler.scale(loss) if scaler else loss).backward()
    mean = loss.detach().clone()
    if not alone:
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean.item()


@contextmanager
def planted(model: nn.Module, overflow: bool, alone: bool = False) -> Iterator[None]:
    """Put inf into one gradient element of the last rank. Under DDP before the ranks' are averaged."""
    here = overflow and (alone or dist.get_rank() == dist.get_world_size() - 1)
    first = next(param for param in model.parameters() if param.requires_grad)
    if not isinstance(model, DistributedDataParallel):
        yield
        if here:
            plant(model)
    else:
        hook = first.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), math.inf)) if here else None
        yield
        if hook:
            hook.remove()


def plant(model: nn.Module) -> None:
    grads = (local(param.grad) for param in model.parameters() if param.grad is not None)
    next(grad for grad in grads if grad.numel()).view(-1)[0] = math.inf


def local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


@contextmanager
def one_step(
    trace: Trace, model: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler | None
) -> Iterator[None]:
    before = [local(param).detach().clone() for param in model.parameters()]
    yield
    pairs = zip(before, model.parameters(), strict=True)
    trace.stepped.append(not all(torch.equal(old, local(param)) for old, param in pairs))
    trace.scales.append(scaler.get_scale() if scaler else 1.0)
    optimizer.zero_grad()


def whole_params(model: nn.Module) -> dict[str, Tensor]:
    """By the names of the unwrapped network; collective."""
    summoned: Any = nullcontext()
    if isinstance(model, FullyShardedDataParallel):
        summoned = FullyShardedDataParallel.summon_full_params(model, writeback=False)
    with summoned:
        return {
            oracle.clean(name): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in model.named_parameters()
        }


def same_on_all_ranks(trace: Trace) -> None:
    """The same bits: scales, decisions, norms and parameters; collective."""
    mine = (trace.scales, trace.stepped, list(map(repr, trace.norms)), {n: p.tolist() for n, p in trace.params.items()})
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    for other in everybody:
        assert other == mine


def differences(ours: Trace, theirs: Trace) -> dict[str, float]:
    """The largest relative difference of losses, of finite norms, and of parameters (to the largest of its tensor)."""
    assert ours.scales == theirs.scales
    assert ours.stepped == theirs.stepped
    assert [math.isfinite(norm) for norm in ours.norms] == [math.isfinite(norm) for norm in theirs.norms]
    assert ours.params.keys() == theirs.params.keys()
    finite = [(a, b) for a, b in zip(ours.norms, theirs.norms, strict=True) if math.isfinite(a)]
    return {
        "loss": max(abs(a - b) / b for a, b in zip(ours.losses, theirs.losses, strict=True)),
        "norm": max(abs(a - b) / b for a, b in finite),
        "param": max(
            float((ours.params[n] - p).abs().max() / p.abs().max()) for n, p in theirs.params.items() if p.any()
        ),
    }
