"""Pipeline parallelism: the ranks hold different layers, and micro-batches go through them one after another."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from data import Batch
from data_parallel import shard_blocks
from models import mean_loss
from options import Options
from ranks import Job
from spread import Place, Spread, require_transformer

#: Embedding and the first half of the blocks; the other half, the last norm and the head.
STAGES = 2


class Pipeline:
    """This rank's stage in the row of stages, and the order in which micro-batches go through."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh, job: Job, microbatches: int) -> None:
        self.group = mesh.get_group("pipeline")
        self.stage = PipelineStage(model, mesh.get_local_rank("pipeline"), STAGES, job.device, group=self.group)
        self.schedule = ScheduleGPipe(self.stage, microbatches, loss_fn=mean_loss)

    def backward(self, batch: Batch) -> Tensor:
        """Leave the gradient of the batch's mean loss in .grad; return that loss, the same on every stage."""
        inputs, targets = batch
        losses: list[Tensor] = []
        if self.stage.is_first:
            self.schedule.step(inputs)
        else:
            self.schedule.step(target=targets, losses=losses)
        # Only the last stage has computed it.
        loss = torch.stack(losses).mean() if losses else torch.zeros((), device=inputs.device)
        dist.broadcast(loss, group=self.group, group_src=STAGES - 1)
        return loss


def pp(model: nn.Module, job: Job, options: Options) -> Spread:
    """One stage a rank."""
    mesh = _mesh(job)
    stage = stage_of(model, mesh)
    return Spread(stage, Pipeline(stage, mesh, job, options.accumulate))


def pp_fsdp2(model: nn.Module, job: Job, options: Options) -> Spread:
    """Each stage is sharded over half of the ranks as in fsdp2."""
    mesh = _mesh(job)
    stage = shard_blocks(stage_of(model, mesh), mesh["shard"], options.precision)
    return Spread(stage, Pipeline(stage, mesh, job, options.accumulate))


def stage_of(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """This rank's slice of the transformer's layers, which keep their names."""
    assert isinstance(model, nn.Sequential)
    stage = mesh.get_local_rank("pipeline")
    return model[len(model) * stage // STAGES : len(model) * (stage + 1) // STAGES]


def place(rank: int, world: int) -> Place:
    """A part for each shard; the stages are the mesh's first axis, so ranks of one stage are neighbours."""
    return Place(rank % (world // STAGES), world // STAGES)


def check_pp(options: Options, world: int) -> None:
    """Raise ValueError where a rank would be without a stage, or a stage without a rank."""
    require_transformer(options)
    if world != STAGES:
        raise ValueError(f"--parallel pp makes {STAGES} stages and needs as many ranks, got {world}; or try pp+fsdp2")


def check_pp_fsdp2(options: Options, world: int) -> None:
    """Raise ValueError where the stages cannot have the same number of ranks."""
    require_transformer(options)
    if world % STAGES:
        raise ValueError(f"--parallel pp+fsdp2 makes {STAGES} stages and needs an even number of ranks, got {world}")


def _mesh(job: Job) -> DeviceMesh:
    shape = (STAGES, job.world // STAGES)
    return init_device_mesh(job.device.type, shape, mesh_dim_names=("pipeline", "shard"))
