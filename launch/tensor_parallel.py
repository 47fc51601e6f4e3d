"""Tensor parallelism: the ranks of a group hold a part of every large matrix and work on the same examples together.

Attention and perceptron are cut in pairs: the first matrix by its outputs (heads, hidden units), the second by its
inputs, so that one all-reduce a pair is enough. Embedding and head are cut by the characters. What is left (norms,
positions) is plain and the same on every rank of the group: it sees the same activations, so its gradients are equal.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from data_parallel import shard_blocks
from models import HEADS
from options import Options
from ranks import Job
from spread import Place, Spread, require_transformer

#: Ranks in each tensor-parallel group where FSDP2 shards over the others.
GROUP = 2


def tp(model: nn.Module, job: Job, options: Options) -> Spread:
    """One group of all ranks."""
    return Spread(cut(model, init_device_mesh(job.device.type, (job.world,))))


def fsdp2_tp(model: nn.Module, job: Job, options: Options) -> Spread:
    """Groups of two ranks that cut the matrices; each part is sharded over the groups as in fsdp2."""
    shape = (job.world // GROUP, GROUP)
    mesh = init_device_mesh(job.device.type, shape, mesh_dim_names=("shard", "tp"))
    return Spread(shard_blocks(cut(model, mesh["tp"]), mesh["shard"], options.precision))


def hsdp_tp(model: nn.Module, job: Job, options: Options) -> Spread:
    """Two replicas, each spread over half of the ranks as in fsdp2+tp."""
    shape = (2, job.world // (2 * GROUP), GROUP)
    mesh = init_device_mesh(job.device.type, shape, mesh_dim_names=("replicate", "shard", "tp"))
    return Spread(shard_blocks(cut(model, mesh["tp"]), mesh["replicate", "shard"], options.precision))


def cut(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Make DTensors of the matrices, each cut over the mesh. Activations stay plain tensors between the pairs."""
    plan: dict[str, ParallelStyle] = {
        "embedding.characters": RowwiseParallel(input_layouts=Replicate()),
        "block*.queries_keys_values": ColwiseParallel(),
        "block*.attention_out": RowwiseParallel(),
        "block*.perceptron.0": ColwiseParallel(),
        "block*.perceptron.2": RowwiseParallel(),
        "prediction.head": ColwiseParallel(output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


def place_tp(rank: int, world: int) -> Place:
    """All ranks read the whole batch."""
    return Place(0, 1)


def place_in_groups(rank: int, world: int) -> Place:
    """A part for each group, whose ranks are neighbours: "tp" is the mesh's last axis."""
    return Place(rank // GROUP, world // GROUP)


def check_tp(options: Options, world: int) -> None:
    """Raise ValueError where the attention heads cannot be dealt out evenly."""
    _require_dense(options)
    if HEADS % world:
        raise ValueError(f"--parallel tp needs a number of ranks that divides the {HEADS} attention heads, got {world}")


def check_fsdp2_tp(options: Options, world: int) -> None:
    """Raise ValueError where the ranks cannot be paired."""
    _require_dense(options)
    if world % GROUP:
        raise ValueError(f"--parallel fsdp2+tp makes groups of {GROUP} and needs an even number of ranks, got {world}")


def check_hsdp_tp(options: Options, world: int) -> None:
    """Raise ValueError where there cannot be two replicas of paired ranks."""
    _require_dense(options)
    if world % (2 * GROUP):
        raise ValueError(
            f"--parallel hsdp+tp makes two replicas of groups of {GROUP} and needs a multiple of {2 * GROUP} ranks, "
            f"got {world}"
        )


def _require_dense(options: Options) -> None:
    require_transformer(options)
    if options.experts:
        raise ValueError(f"--parallel {options.parallel} cannot cut experts: leave out --experts, or choose ep")
