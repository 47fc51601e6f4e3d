"""How --parallel spreads one model over the ranks. A new way is one function and one line in WAYS."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import data_parallel
import experts
import pipeline
import tensor_parallel
import zero
from data import Batch
from exchange import exchanged
from options import Options
from ranks import Job
from spread import Place, Spread


def _any_ranks(options: Options, world: int) -> None:
    """For ways that need nothing in particular."""


@dataclass(frozen=True)
class Way:
    """One way of spreading a model."""

    spread: Callable[[nn.Module, Job, Options], Spread]
    check: Callable[[Options, int], None] = _any_ranks
    """Raises ValueError where these options on that many ranks cannot work."""
    place: Callable[[int, int], Place] = Place
    """Which part of a batch a rank reads, from (rank, world). The ranks that share one replica's work read the same."""


WAYS: dict[str, Way] = {
    "single": Way(data_parallel.single, data_parallel.check_single),
    "ddp": Way(data_parallel.ddp),
    "fsdp1": Way(data_parallel.fsdp1),
    "fsdp2": Way(data_parallel.fsdp2),
    "hsdp": Way(data_parallel.hsdp, data_parallel.check_hsdp),
    "tp": Way(tensor_parallel.tp, tensor_parallel.check_tp, tensor_parallel.place_tp),
    "fsdp2+tp": Way(tensor_parallel.fsdp2_tp, tensor_parallel.check_fsdp2_tp, tensor_parallel.place_in_groups),
    "hsdp+tp": Way(tensor_parallel.hsdp_tp, tensor_parallel.check_hsdp_tp, tensor_parallel.place_in_groups),
    "pp": Way(pipeline.pp, pipeline.check_pp, pipeline.place),
    "pp+fsdp2": Way(pipeline.pp_fsdp2, pipeline.check_pp_fsdp2, pipeline.place),
    "ep": Way(experts.ep, experts.check_ep),
    "zero1": Way(partial(zero.zero, 1), zero.check),
    "zero2": Way(partial(zero.zero, 2), zero.check),
    "zero3": Way(partial(zero.zero, 3), zero.check),
}


def share(batch: Batch, place: Place, device: torch.device) -> Batch:
    """The part of a global batch (inputs, targets) that is read at this place."""
    inputs, targets = (tensor.chunk(place.count)[place.index].to(device) for tensor in batch)
    return inputs, targets


def microbatches(batch: Batch, count: int) -> list[Batch]:
    """A rank's part in `count` equal pieces."""
    inputs, targets = (tensor.chunk(count) for tensor in batch)
    return list(zip(inputs, targets, strict=True))


def autocast(model: nn.Module, job: Job, precision: str) -> AbstractContextManager[None]:
    """For the forward pass under bf16: autocast, unless FSDP or ZeRO casts the parameters by itself."""
    casts_by_itself = isinstance(model, FullyShardedDataParallel | FSDPModule) or zero.is_engine(model)
    enabled = precision == "bf16" and not casts_by_itself
    return torch.autocast(job.device.type, dtype=torch.bfloat16, enabled=enabled)


def accumulating(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around the backward pass of a micro-batch: only the step's last one makes the ranks exchange gradients."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel | FullyShardedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def full_parameters(spread: Spread) -> dict[str, Tensor]:
    """The whole model's parameters on the CPU, under their plain names. All ranks must call."""
    if spread.engine:
        return zero.full_parameters(spread.engine)
    state = cast(dict[str, Tensor], get_model_state_dict(spread.model, options=StateDictOptions(full_state_dict=True)))
    here = {name: tensor.cpu() for name, tensor in state.items()}
    group = spread.pipeline_group or spread.expert_group
    if group is None:
        return here
    return {name: tensor for part in exchanged(here, group) for name, tensor in part.items()}
