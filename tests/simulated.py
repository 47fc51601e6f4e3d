"""A simulated job of hundreds of ranks: one thread a rank in this process, which all run the real distclip.

Each rank has a world of its own with torch's fake process groups, over which nothing is sent. What goes over the wire
is added up here instead, between the threads, so that every rank hears what the others really said. Only one thread
runs at a time: each hands on the baton when it waits for others.
"""

import itertools
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # DTensor imports it at its first operation: once, before there are threads
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # makes the backend known
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement
from torch.testing._internal.distributed.multi_threaded_pg import _install_threaded_pg, _uninstall_threaded_pg

_PATIENCE = 60.0
_STACK = 1 << 20


class _Sum:
    """One all-reduce, as far as its ranks have come to it."""

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.told = 0
        self.done = threading.Event()


class _Done:
    """The handle of a collective that is over."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> bool:
        return True


class _Wire:
    """Stands for ``dist.all_reduce``."""

    def __init__(self) -> None:
        self.baton = threading.Lock()
        self.sums: dict[tuple[tuple[int, ...], int], _Sum] = defaultdict(_Sum)
        self.turns: dict[tuple[int, ...], list[int]] = {}
        self.sent: dict[int, list[int]] = defaultdict(list)
        self.failure: str | None = None

    def all_reduce(
        self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> _Done | None:
        ranks = tuple(dist.get_process_group_ranks(group))
        me = dist.get_rank()
        turns = self.turns.setdefault(ranks, [0] * dist.get_world_size())
        here = self.sums[ranks, turns[me]]
        turns[me] += 1
        self.sent[me].append(tensor.nbytes)
        if here.value is None:
            here.value = tensor.clone()
        else:
            assert here.value.shape == tensor.shape, "ranks reduce buffers of different sizes"
            here.value = here.value.add_(tensor) if op == dist.ReduceOp.SUM else torch.maximum(here.value, tensor)
        here.told += 1
        if here.told == len(ranks):
            here.done.set()
        else:
            self.baton.release()
            heard = here.done.wait(_PATIENCE)
            self.baton.acquire()
            if self.failure or not heard:
                raise TimeoutError(f"waited in vain for {len(ranks) - here.told} of {len(ranks)} ranks")
        tensor.copy_(here.value)
        return _Done() if async_op else None

    def fail(self, why: str) -> None:
        self.failure = self.failure or why
        for each in list(self.sums.values()):
            each.done.set()


@contextmanager
def _threads_with_own_worlds(wire: _Wire) -> Iterator[None]:
    _install_threaded_pg()
    c10d: Any = torch._C._distributed_c10d  # whose stubs leave this out
    c10d._set_thread_isolation_mode(True)
    before = threading.stack_size(_STACK)
    try:
        with mock.patch.object(dist, "all_reduce", wire.all_reduce):
            yield
    finally:
        threading.stack_size(before)
        c10d._set_thread_isolation_mode(False)
        _uninstall_threaded_pg()


def simulate(world_size: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``body(*args)`` on each of so many ranks; the only collective that works there is all_reduce.

    Returns:
        What each rank returned, in rank order.

    Raises:
        AssertionError: a rank failed; with its traceback.
    """
    wire = _Wire()
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        with wire.baton:
            if wire.failure:
                return
            try:
                store = dist.HashStore()  # type: ignore[attr-defined]  # not in __all__
                dist.init_process_group("fake", rank=rank, world_size=world_size, store=store)
                results[rank] = body(*args)
            except Exception:
                wire.fail(f"rank {rank} of {world_size}:\n{traceback.format_exc()}")

    with _threads_with_own_worlds(wire):
        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if wire.failure:
        raise AssertionError(wire.failure)
    return results


def sent() -> list[int]:
    """The bytes of each collective that this rank has begun so far."""
    wire = dist.all_reduce.__self__  # type: ignore[attr-defined]  # that of ``_Wire``
    assert isinstance(wire, _Wire)
    return wire.sent[dist.get_rank()]


def mesh_of(*shape: int) -> DeviceMesh:
    """All ranks as a mesh of this shape. Every rank makes its own groups alone: all of them take minutes."""
    grid = torch.arange(dist.get_world_size()).view(shape)
    if len(shape) == 1:
        assert dist.group.WORLD is not None
        return DeviceMesh.from_group(dist.group.WORLD, "cpu")
    here = [int(place) for place in (grid == dist.get_rank()).nonzero()[0]]
    groups = []
    for axis in range(len(shape)):
        line: tuple[Any, ...] = tuple(slice(None) if other == axis else place for other, place in enumerate(here))
        groups.append(dist.new_group(grid[line].tolist(), use_local_synchronization=True))
    names = tuple(itertools.islice("abcdef", len(shape)))
    return DeviceMesh.from_group(groups, "cpu", mesh=grid, mesh_dim_names=names)


def placed(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A tensor that every rank has whole, cut for this rank without a word to the others."""
    shape, offsets = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    local = whole
    for axis, (size, offset) in enumerate(zip(shape, offsets, strict=True)):
        local = local.narrow(axis, min(offset, local.shape[axis]), size)
    return DTensor.from_local(
        local.clone(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
