"""Process groups: on which device one communicates, and how to make one that only its members know of."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_made: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]] = (
    weakref.WeakKeyDictionary()
)


def made_group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """A group of ``ranks``, made once while the default group lives. Collective over its members, and nobody else.

    ``new_group(use_local_synchronization=True)`` promises that, but names the group by how many groups each rank is in:
    where members differ in that they wait for each other under different names, for ever (pytorch issue 173608). And
    where the default group was bound to a device, it splits that group's communicator, for which NCCL wants all ranks.
    So the members agree on a name of ours here, and nothing is split.
    """
    world = dist.group.WORLD
    assert world is not None
    made = _made.setdefault(world, {})
    if ranks not in made:
        with _named("distclip:" + ",".join(map(str, ranks))):
            made[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return made[ranks]


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Make torch call the next group ``name``, and connect it from scratch."""
    overrides = {"_process_group_name": lambda *_, **__: name, "_get_split_source": lambda *_, **__: None}
    originals = {key: getattr(distributed_c10d, key) for key in overrides if hasattr(distributed_c10d, key)}
    for key in originals:
        setattr(distributed_c10d, key, overrides[key])
    try:
        yield
    finally:
        for key, original in originals.items():
            setattr(distributed_c10d, key, original)


def comm_device(group: dist.ProcessGroup, preferred: torch.device) -> torch.device:
    """The device whose tensors ``group`` reduces: ``preferred`` if its backend serves that, else one that it does."""
    supported = {device.type for device in group._device_types}
    if preferred.type in supported:
        return preferred
    if "cpu" in supported:
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
