"""How --parallel spreads one model over the ranks. A new way is one function and one line in WRAPPERS."""

import gc
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from models import BLOCKS


@dataclass(frozen=True)
class Job:
    """This process's place among the ranks, and its device."""

    rank: int
    world: int
    device: torch.device


def check_ranks(parallel: str, world: int) -> None:
    """Raise ValueError where `world` ranks cannot be used in this way."""
    if parallel == "single" and world > 1:
        raise ValueError(f"--parallel single is one process, but {world} were started: choose ddp, fsdp2, ...")
    if parallel == "hsdp" and world % 2:
        raise ValueError(f"--parallel hsdp makes two replicas and needs an even number of ranks, got {world}")


def start(parallel: str) -> Job:
    """Join the ranks that torchrun started (or be the only one): NCCL where each rank has a GPU, else gloo."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", world))
    # Two ranks cannot share a GPU under NCCL, so too few GPUs means that all ranks run on the CPU.
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= local_world
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # let fp32 mean fp32: an LSTM in TF32 is right to 1e-3 only
    if parallel != "single":
        backend = "nccl" if on_gpu else "gloo"
        # Without torchrun there is no rendezvous in the environment; a job of one rank needs none.
        store = None if "RANK" in os.environ else dist.HashStore()  # type: ignore[attr-defined]  # not in __all__
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, device_id=device if on_gpu else None)
    return Job(rank, world, device)


def stop() -> None:
    """Leave the ranks, all together; what follows runs on this process alone."""
    if dist.is_initialized():
        # A gloo thread (torch 2.13) lets go of a collective's tensors a moment after it is done, and aborts the process
        # if Python exits in that moment. Destroying the group waits for its threads, but only if no model holds the
        # group any more; wrapped models sit in reference cycles. Else the barrier, which has no tensors, gives it time.
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def single(model: nn.Module, job: Job, precision: str) -> nn.Module:
    """One process holds it all."""
    return model


def ddp(model: nn.Module, job: Job, precision: str) -> nn.Module:
    """Every rank holds the whole model; gradients are averaged."""
    return DistributedDataParallel(model)


def fsdp1(model: nn.Module, job: Job, precision: str) -> nn.Module:
    """Each block is one flat parameter, cut into a shard a rank."""
    low = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy(set(BLOCKS)),
        mixed_precision=low if precision == "bf16" else None,
        device_id=job.device,
        use_orig_params=True,
    )


def fsdp2(model: nn.Module, job: Job, precision: str) -> nn.Module:
    """Each parameter is a DTensor, cut along its first dim into a shard a rank."""
    return shard_blocks(model, init_device_mesh(job.device.type, (job.world,)), precision)


def hsdp(model: nn.Module, job: Job, precision: str) -> nn.Module:
    """Two replicas, each sharded over half of the ranks as in fsdp2."""
    mesh = init_device_mesh(job.device.type, (2, job.world // 2), mesh_dim_names=("replicate", "shard"))
    return shard_blocks(model, mesh, precision)


def shard_blocks(model: nn.Module, mesh: DeviceMesh, precision: str) -> nn.Module:
    """FSDP2 on every block and on what remains. Gradients are reduced in fp32 under bf16 too."""
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = low if precision == "bf16" else MixedPrecisionPolicy()
    # torch 2.13 says so of every Linear and LSTM on the CPU. Nothing here writes into their outputs.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in model.modules():
        if isinstance(module, BLOCKS):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


WRAPPERS: dict[str, Callable[[nn.Module, Job, str], nn.Module]] = {
    "single": single,
    "ddp": ddp,
    "fsdp1": fsdp1,
    "fsdp2": fsdp2,
    "hsdp": hsdp,
}


def share(batch: tuple[Tensor, Tensor], job: Job, accumulate: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's part of a global batch (inputs, targets), as `accumulate` micro-batches on its device."""
    parts = (tensor.to(job.device).chunk(job.world * accumulate) for tensor in batch)
    return list(zip(*parts, strict=True))[job.rank * accumulate : (job.rank + 1) * accumulate]


def autocast(model: nn.Module, job: Job, precision: str) -> AbstractContextManager[None]:
    """For the forward pass under bf16: autocast, unless FSDP casts the parameters by itself."""
    casts_by_itself = isinstance(model, FullyShardedDataParallel | FSDPModule)
    enabled = precision == "bf16" and not casts_by_itself
    return torch.autocast(job.device.type, dtype=torch.bfloat16, enabled=enabled)


def accumulating(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around the backward pass of a micro-batch: only the step's last one makes the ranks exchange gradients."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel | FullyShardedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def global_mean(value: Tensor, job: Job) -> float:
    """The mean over the ranks of a 0-d tensor, the same on each."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value.item() / job.world


def full_parameters(model: nn.Module, job: Job) -> dict[str, Tensor]:
    """The whole model's parameters under their plain names; complete on rank 0 at least. All ranks must call."""
    # On the CPU there is nothing to offload, and FSDP1 (torch 2.13) crashes when asked to.
    options = StateDictOptions(full_state_dict=True, cpu_offload=job.device.type != "cpu")
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))
