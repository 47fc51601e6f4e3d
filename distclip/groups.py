"""Process groups: on which device one communicates, and how to make one that only its members know of."""

from __future__ import annotations

import hashlib
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
        # Every key of the group in the job's store begins with its name: thousands of ranks would make it long.
        which = hashlib.blake2b(str(ranks).encode(), digest_size=8).hexdigest()
        with _named(f"distclip:{len(ranks)} ranks:{which}"):
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


def comm_device(group: dist.ProcessGroup, *, accelerated: bool) -> torch.device:
    """A device whose tensors ``group`` reduces: the accelerator or the CPU as wanted, else the one that it serves.

    ``accelerated`` must be the same on all ranks: a group may have a backend for each kind of device.
    """
    served = {device.type for device in group._device_types}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    usable = accelerator is not None and accelerator.type in served
    if accelerator is not None and usable and (accelerated or "cpu" not in served):
        return torch.device(accelerator.type, torch.accelerator.current_device_index())
    return torch.device("cpu")
