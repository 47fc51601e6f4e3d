"""The model of a case on this rank, laid out and with gradients, as its own layout leaves them after a backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distclip.bench.cases import Case
from distclip.layout.dtensor import is_dtensor

ClipNorm = Callable[[float], object]


@dataclass(frozen=True)
class Spread:
    """A model on this rank."""

    model: nn.Module
    piece: int
    """Which of the distinct pieces this rank holds: replicas have the same number, and the same gradients."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What distclip has to be told besides."""
    torch_s: ClipNorm | None = None
    """torch's documented way of clipping to a norm; None where it has none."""
    way: str = "torch.nn.utils.clip_grad_norm_"
    """Its name."""


class Tensors(nn.Module):
    """Parameters and nothing else. The loss is their sum, of which each rank adds up what it sees."""

    def __init__(self, count: int, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.full((numel,), 0.5, dtype=dtype, device=device) for _ in range(count))

    def forward(self) -> Tensor:
        local = (weight.to_local() if is_dtensor(weight) else weight for weight in self.weights)
        return torch.stack([part.sum() for part in local]).sum()


def spread_of(case: Case, device: torch.device) -> Spread:
    """Build the model, lay it out, run a backward. Collective on all ranks of the job where there are several."""
    count = case.tensors
    if case.layout == "pipeline":
        rank, stages = dist.get_rank(), case.ranks
        count = case.tensors * (rank + 1) // stages - case.tensors * rank // stages
    spread = _LAYOUTS[case.layout](Tensors(count, case.numel, getattr(torch, case.dtype), device))
    with warnings.catch_warnings():
        # On the CPU FSDP1 cannot reduce and copy at the same time, and FSDP2 sees views where nobody writes to them.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        spread.model().backward()
    return spread


def local_grads(model: nn.Module) -> list[Tensor]:
    """What this rank holds of the gradients."""
    grads = (param.grad for param in model.parameters() if param.grad is not None)
    return [local for grad in grads if (local := getattr(grad, "_local_tensor", grad)).numel()]


def _plain(model: nn.Module, piece: int = 0) -> Spread:
    return Spread(model, piece, torch_s=lambda max_norm: nn.utils.clip_grad_norm_(model.parameters(), max_norm))


def _ddp(model: Tensors) -> Spread:
    return _plain(nn.parallel.DistributedDataParallel(model))


def _fsdp1(model: Tensors) -> Spread:
    from torch.distributed.fsdp import FullyShardedDataParallel

    device = model.weights[0].device
    wrapped = FullyShardedDataParallel(model, device_id=device, use_orig_params=True)
    return Spread(wrapped, dist.get_rank(), torch_s=wrapped.clip_grad_norm_, way="FSDP1's model.clip_grad_norm_")


def _fsdp2(model: Tensors, replicas: int = 1) -> Spread:
    from torch.distributed.fsdp import fully_shard

    mesh = _mesh(model, replicas, "replicate", "shard")
    fully_shard(model, mesh=mesh if replicas > 1 else mesh["shard"])
    return _plain(model, dist.get_rank() % (dist.get_world_size() // replicas))


def _tp(model: Tensors) -> Spread:
    mesh = _mesh(model, 1, "data", "tp")["tp"]
    _cut(model, mesh)
    return _plain(model, dist.get_rank())


def _fsdp2_tp(model: Tensors) -> Spread:
    from torch.distributed.fsdp import fully_shard

    mesh = _mesh(model, dist.get_world_size() // 2, "shard", "tp")
    _cut(model, mesh["tp"])
    fully_shard(model, mesh=mesh["shard"])
    return _plain(model, dist.get_rank())


def _pipeline(model: Tensors) -> Spread:
    return Spread(model, dist.get_rank(), {"pipeline_group": dist.group.WORLD}, way="none")


def _mesh(model: Tensors, rows: int, *names: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    shape = (rows, dist.get_world_size() // rows)
    return init_device_mesh(model.weights[0].device.type, shape, mesh_dim_names=names)


def _cut(model: Tensors, mesh: Any) -> None:
    """Make each tensor a DTensor, cut along its only dim. All are full of the same number: nothing is sent."""
    from torch.distributed.tensor import DTensor, Shard

    size = mesh.size()
    for place, weight in enumerate(model.weights):
        local = weight.detach()[: weight.numel() // size].clone()
        model.weights[place] = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False))


_LAYOUTS: dict[str, Callable[[Tensors], Spread]] = {
    "single": _plain,
    "ddp": _ddp,
    "fsdp1": _fsdp1,
    "fsdp2": _fsdp2,
    "hsdp": lambda model: _fsdp2(model, 2),
    "fsdp2+tp": _fsdp2_tp,
    "tp": _tp,
    "pipeline": _pipeline,
}
