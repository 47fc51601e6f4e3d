"""The communication hook that tells ``Overlap`` of each bucket that DistributedDataParallel has averaged.

It averages as DDP does without one. (No postponed annotations: DDP compares those of a hook with types.)
"""

import weakref
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # torch lists no names of its C++ part
from torch.nn.parallel import DistributedDataParallel


class Buckets:
    """What the hook of one DDP module has to know."""

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self.group: dist.ProcessGroup | None = ddp.process_group
        self.overlap: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a DDP module runs on the default group, and has no clipper.
        return {"group": None, "overlap": None}


def watch(ddp: DistributedDataParallel, overlap: Any) -> bool:
    """Have the buckets of this module measured from the next backward on; False where that cannot be done.

    It cannot where the user's own hook averages, where DDP leaves some gradients as they are (unused parameters, which
    it looks for), and where gradients are sparse, or of another dtype on the way.
    """
    state = next((state for _, state in ddp._comm_hooks if isinstance(state, Buckets)), None)
    if state is None:
        others = ddp._comm_hooks or ddp.mixed_precision is not None or ddp._use_python_reducer
        skips = ddp.find_unused_parameters or ddp.static_graph or ddp._delay_all_reduce_params
        if others or skips or any(_is_sparse(module) for module in ddp.modules()):
            return False
        state = Buckets(ddp)
        ddp.register_comm_hook(state, _average)
    state.overlap = weakref.ref(overlap)
    return True


def _is_sparse(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse


def _average(state: Buckets, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    overlap = state.overlap and state.overlap()
    places = [] if overlap is None else overlap.places_of(bucket.parameters())
    buffer, size = bucket.buffer(), dist.get_world_size(state.group)
    # As DDP itself multiplies. (A gradient that lies in the bucket from the step before it divides, which rounds
    # otherwise where the number of ranks is no power of two.)
    buffer.mul_(1.0 / size)
    work = dist.all_reduce(buffer, group=state.group, async_op=True)
    future: torch.futures.Future[list[Tensor]] = work.get_future()
    if overlap is None:
        return future.then(_first)
    return future.then(partial(_tell, state, bucket.gradients(), places, bucket.is_last()))


def _first(future: torch.futures.Future[list[Tensor]]) -> Tensor:
    return future.value()[0]


def _tell(
    state: Buckets, grads: list[Tensor], places: list[int], last: bool, future: torch.futures.Future[list[Tensor]]
) -> Tensor:
    overlap = state.overlap()
    if overlap is not None:
        overlap.arrived(state, grads, places, last)
    return _first(future)
