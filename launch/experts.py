"""Mixture of experts: each block has many perceptrons and each token uses one. Under --parallel ep they lie apart."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.nn.parallel import DistributedDataParallel

from options import Options
from ranks import Job
from spread import Spread, require_transformer


class Experts(nn.Module):
    """Each token goes through one expert; how much that adds to the stream is learned, which one it is is not.

    A learned choice jumps. Where two experts are rated almost equal, a rounding error of 1e-7 sends a token elsewhere,
    and after 40 steps --compare cannot tell that from a wrong norm. So a hash of the position chooses, as in "Hash
    Layers" (arXiv 2106.04426) one of the character does; some experts get more tokens than others, as they do anyway.
    """

    def __init__(self, width: int, experts: list[nn.Module]) -> None:
        super().__init__()
        self.count = len(experts)
        self.router = nn.Linear(width, self.count, bias=False)
        # A dict, not a list: a rank that holds experts 2 and 3 calls them so.
        self.experts = nn.ModuleDict({str(number): expert for number, expert in enumerate(experts)})
        self.group: dist.ProcessGroup | None = None

    def forward(self, stream: Tensor) -> Tensor:
        """[batch, length, width] to the same shape."""
        positions = torch.arange(stream.shape[1], device=stream.device).repeat(stream.shape[0])
        chosen = positions * 37 % 101 % self.count
        tokens = stream.flatten(0, 1)
        weights = self.router(tokens).softmax(-1).gather(1, chosen[:, None])
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=self.count)
        outputs = self._run_afar(tokens[order], counts, self.group) if self.group else self._run(tokens[order], counts)
        mixed: Tensor = outputs[order.argsort()] * weights
        return mixed.view_as(stream)

    def keep_own(self, group: dist.ProcessGroup) -> None:
        """Drop the experts of the other ranks of `group`; from now on, tokens travel to the rank that holds theirs."""
        self.group = group
        own = self.count // dist.get_world_size(group)
        first = own * dist.get_rank(group)
        self.experts = nn.ModuleDict({name: self.experts[name] for name in map(str, range(first, first + own))})

    def _run(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Tokens that stand in the order of their experts through the experts of this rank."""
        # An expert without tokens runs too: then every rank's backward has the same collectives in the same order.
        parts = tokens.split(counts.tolist())
        return torch.cat([expert(part) for expert, part in zip(self.experts.values(), parts, strict=True)])

    def _run_afar(self, tokens: Tensor, counts: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The same for tokens of all experts: those of each rank go there, and what becomes of them comes back."""
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=group)
        world = dist.get_world_size(group)
        sent, received = (some.view(world, -1).sum(1).tolist() for some in (counts, arriving))
        arrived = all_to_all_single_autograd(tokens, received, sent, group)
        # They stand in the order of (rank that sent them, expert); the experts want them by expert alone.
        own = len(self.experts)
        expert_of_token = torch.arange(own, device=tokens.device).repeat(world).repeat_interleave(arriving)
        order = expert_of_token.argsort(stable=True)
        outputs = self._run(arrived[order], arriving.view(world, own).sum(0))
        return all_to_all_single_autograd(outputs[order.argsort()], sent, received, group)


def ep(model: nn.Module, job: Job, options: Options) -> Spread:
    """Each rank keeps its share of the experts of every block; all else is as in ddp."""
    # Not the group of all ranks, over which DDP averages: its collectives must not come between those of the tokens.
    group = dist.new_group()
    for module in model.modules():
        if isinstance(module, Experts):
            module.keep_own(group)
    own = {name: parameter for name, parameter in model.named_parameters() if ".experts." in name}
    for parameter in own.values():
        # The tokens of all ranks have added up here, each weighing as in the mean over its rank's part of the batch.
        parameter.register_hook(lambda grad: grad / job.world)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, own)
    return Spread(DistributedDataParallel(model), experts=tuple(own.values()), expert_group=group)


def check_ep(options: Options, world: int) -> None:
    """Raise ValueError where the experts cannot be dealt out evenly."""
    require_transformer(options)
    if options.experts % world:
        raise ValueError(
            f"--parallel ep deals out --experts {options.experts} evenly: {world} ranks do not divide them"
        )
