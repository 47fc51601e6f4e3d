"""Every rank reads its own part of the batch; the wrappers differ in how much of the model each rank keeps."""

import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from models import BLOCKS
from options import Options
from ranks import Job
from spread import Spread


def single(model: nn.Module, job: Job, options: Options) -> Spread:
    """One process holds it all."""
    return Spread(model)


def ddp(model: nn.Module, job: Job, options: Options) -> Spread:
    """Every rank holds the whole model; gradients are averaged."""
    return Spread(DistributedDataParallel(model))


def fsdp1(model: nn.Module, job: Job, options: Options) -> Spread:
    """Each block is one flat parameter, cut into a shard a rank."""
    low = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy(set(BLOCKS)),
        mixed_precision=low if options.precision == "bf16" else None,
        device_id=job.device,
        use_orig_params=True,
    )
    return Spread(wrapped)


def fsdp2(model: nn.Module, job: Job, options: Options) -> Spread:
    """Each parameter is a DTensor, cut along its first dim into a shard a rank."""
    return Spread(shard_blocks(model, init_device_mesh(job.device.type, (job.world,)), options.precision))


def hsdp(model: nn.Module, job: Job, options: Options) -> Spread:
    """Two replicas, each sharded over half of the ranks as in fsdp2."""
    mesh = init_device_mesh(job.device.type, (2, job.world // 2), mesh_dim_names=("replicate", "shard"))
    return Spread(shard_blocks(model, mesh, options.precision))


def check_single(options: Options, world: int) -> None:
    """Raise ValueError where there is more than one process."""
    if world > 1:
        raise ValueError(f"--parallel single is one process, but {world} were started: choose ddp, fsdp2, ...")


def check_hsdp(options: Options, world: int) -> None:
    """Raise ValueError where the ranks cannot be halved."""
    if world % 2:
        raise ValueError(f"--parallel hsdp makes two replicas and needs an even number of ranks, got {world}")


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
