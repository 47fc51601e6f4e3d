"""A trainer in torchtitan's shape, clipped by distclip, with checkpoints that any number of ranks reads.

    NPROC=4 SCRIPT=launch/titan.py launch/torchrun.sh --pp 2 --distclip-rule autoclip=10 --checkpoint runs/titan
    NPROC=2 SCRIPT=launch/titan.py launch/torchrun.sh --distclip-rule autoclip=10 --checkpoint runs/titan --steps 20

The second goes on where the first has stopped, without the pipeline. In torchtitan itself one line is enough, if the
rule is a largest norm (distclip/integrations/torchtitan.py). Here a GradClipper stands in place of its

    grad_norm = dist_utils.clip_grad_norm_(
        [p for m in self.model_parts for p in m.parameters()], max_norm, foreach=True, pp_mesh=pp_mesh, ep_enabled=False
    )

because a rule with a memory, as autoclip, belongs into the checkpoint: a clipper is a Stateful, as the trainer is.
"""

import argparse
import os
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import distclip
import ranks

VOCABULARY, LENGTH, BATCH, MICROBATCHES = 32, 12, 16, 4


@dataclass(frozen=True)
class ParallelDims:
    """How many ranks lie along each axis: stages of a pipeline, and shards of FSDP2."""

    pp: int
    fsdp: int

    def build_mesh(self, device: torch.device) -> DeviceMesh:
        """All ranks; the stages are the first axis."""
        return init_device_mesh(device.type, (self.pp, self.fsdp), mesh_dim_names=("pp", "fsdp"))


class Block(nn.Module):
    """A residual layer over the last axis, with a look at the token before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(2 * width, 3 * width)
        self.down = nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, width] to the same shape."""
        normed = self.norm(x)
        both = torch.cat((normed, normed.roll(1, dims=1)), dim=-1)
        out: Tensor = x + self.down(torch.tanh(self.up(both)))
        return out


def make_model(width: int = 24, depth: int = 4) -> nn.Sequential:
    """The same weights on every rank; slices of it keep the layers' names."""
    torch.manual_seed(0)
    layers = OrderedDict[str, nn.Module](embedding=nn.Embedding(VOCABULARY, width))
    layers |= {f"block{number}": Block(width) for number in range(depth)}
    layers["head"] = nn.Linear(width, VOCABULARY)
    return nn.Sequential(layers)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, the mean over all tokens."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """A step's tokens and targets, of all ranks together: each token's target is the sum of it and the one before."""
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))
    return tokens, (tokens + tokens.roll(1, dims=1)) % VOCABULARY


class Trainer:
    """The model parts of this rank, what trains them, and how far it got. A Stateful."""

    def __init__(self, arguments: argparse.Namespace, job: ranks.Job) -> None:
        self.device = job.device
        self.parallel_dims = ParallelDims(arguments.pp, job.world // arguments.pp)
        self.mesh = self.parallel_dims.build_mesh(job.device)
        self.model_parts = [self.parallelize(make_model())]
        self.schedule = self.pipeline() if arguments.pp > 1 else None
        params = [param for part in self.model_parts for param in part.parameters()]
        self.optimizer = torch.optim.SGD(params, lr=0.5, momentum=0.9, foreach=False)
        clipping = distclip.ClipConfig.load(arguments=arguments, pipeline_group="pp" if self.schedule else None)
        self.clipper = clipping.clipper(self.model_parts, mesh=self.mesh)
        self.step = 0

    def parallelize(self, model: nn.Sequential) -> nn.Module:
        """This rank's stage, each of its layers sharded over the ranks that hold the same one."""
        place, count = self.mesh.get_local_rank("pp"), self.parallel_dims.pp
        part = model[len(model) * place // count : len(model) * (place + 1) // count]
        assert isinstance(part, nn.Sequential)
        part.to(self.device)
        for layer in part:
            fully_shard(layer, mesh=self.mesh["fsdp"])
        fully_shard(part, mesh=self.mesh["fsdp"])
        return part

    def pipeline(self) -> Schedule1F1B:
        """The order in which micro-batches go through the stages."""
        place, group = self.mesh.get_local_rank("pp"), self.mesh.get_group("pp")
        stage = PipelineStage(self.model_parts[0], place, self.parallel_dims.pp, self.device, group=group)
        return Schedule1F1B(stage, MICROBATCHES, loss_fn=loss_of)

    def forward_backward_step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Leave the gradients of the mean loss in .grad; return that loss, on the last stage."""
        if self.schedule is None:
            loss = loss_of(self.model_parts[0](tokens), targets)
            loss.backward()
            return loss.detach()
        place, losses = self.mesh.get_local_rank("pp"), list[Tensor]()
        inputs = (tokens,) if place == 0 else ()
        last = place == self.parallel_dims.pp - 1
        self.schedule.step(*inputs, target=targets if last else None, losses=losses if last else None)
        return torch.stack(losses).mean().detach() if last else torch.zeros((), device=self.device)

    def train_step(self) -> tuple[float, distclip.ClipReport]:
        """One step of all ranks: the mean loss and what the clipper did, the same on each."""
        self.step += 1
        place, count = self.mesh.get_local_rank("fsdp"), self.parallel_dims.fsdp
        tokens, targets = (part.chunk(count)[place].to(self.device) for part in batch_of(self.step))
        loss = self.forward_backward_step(tokens, targets)
        report = self.clipper.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        dist.all_reduce(loss)  # every shard has its own, and of a pipeline the last stage
        return loss.item() / count, report

    def states(self) -> dict[str, Any]:
        """What torch.distributed.checkpoint saves and loads."""
        return {"trainer": self, "clipper": self.clipper}

    def state_dict(self) -> dict[str, Any]:
        """Of model, optimizer and step."""
        model: dict[str, Any] = {}
        optimizer: dict[str, Any] = {}
        for part in self.model_parts:
            of_model, of_optimizer = get_state_dict(part, self.optimizer, options=OPTIONS)
            model, optimizer = model | of_model, optimizer | of_optimizer
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` told, on however many ranks."""
        for part in self.model_parts:
            kept = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
            set_state_dict(part, self.optimizer, **kept, options=OPTIONS)
        self.step = state["step"]


#: Under the parameters' names: numbers would be the same on every stage.
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


def parse() -> argparse.Namespace:
    """The command line; `--distclip-rule` and its like are distclip's own."""
    parser = argparse.ArgumentParser(description="Train a small model in torchtitan's shape with clipped gradients.")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="stages of a pipeline; default: %(default)s")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="up to this one; default: %(default)s")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="go on from it where it is, save to it at the end"
    )
    distclip.ClipConfig.add_arguments(parser)
    arguments = parser.parse_args()
    world = int(os.environ.get("WORLD_SIZE", 1))
    if arguments.pp < 1 or world % arguments.pp:
        parser.error(f"--pp {arguments.pp}: {world} ranks cannot be divided into so many stages")
    return arguments


def main() -> None:
    """Train; rank 0 tells of every step."""
    arguments = parse()
    # torch 2.13 says so of every Linear on the CPU. Nothing here writes into their outputs.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    job = ranks.start("titan")
    trainer = Trainer(arguments, job)
    if arguments.checkpoint and (arguments.checkpoint / ".metadata").exists():
        load(trainer.states(), checkpoint_id=arguments.checkpoint)
    while trainer.step < arguments.steps:
        loss, report = trainer.train_step()
        if job.rank == 0:
            told = report.to_dict()
            numbers = f"norm {told['total_norm']:.9g}, times {told['coefficient']:.9g}"
            print(f"step {trainer.step}: loss {loss:.9g}, {numbers}", flush=True)
    if arguments.checkpoint:
        save(trainer.states(), checkpoint_id=arguments.checkpoint)
    ranks.stop()


if __name__ == "__main__":
    main()
