"""Which ranks take part in a clip, and the process group over which their one all-reduce runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from distclip.groups import comm_device, made_group
from distclip.layout import RankGroup


@dataclass(frozen=True)
class Participants:
    """The ranks whose gradients make up one norm."""

    ranks: tuple[int, ...] = (0,)
    index: int = 0
    """Place of the calling rank among them."""
    group: dist.ProcessGroup | None = None
    """Where they reduce; None where nothing is sharded, so that no communication is needed."""
    _world: weakref.ref[dist.ProcessGroup] | None = None

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def is_current(self) -> bool:
        """False once ``torch.distributed`` was torn down (and perhaps started anew) since."""
        return self._world is None or (dist.is_initialized() and self._world() is dist.group.WORLD)


def connect(groups: Iterable[RankGroup], device: torch.device) -> Participants:
    """Find all ranks that are connected, directly or through others, by the groups that layouts name.

    A rank knows its own groups only. HSDP on 2 x 2 ranks tells rank 0 of {0, 1} and {0, 2}; that rank 3 takes part it
    learns from them. Collective over ``groups`` (a few hundred bytes each) where there are any; every rank of a group
    must call it. Ranks that no group connects are never waited for.

    Args:
        groups: the groups of this rank's layouts.
        device: where this rank's gradients live; where its backend allows, a group communicates there.
    """
    # One group per set of ranks, chosen and ordered alike by all its members: crossing groups in different orders
    # would deadlock.
    unique: dict[tuple[int, ...], RankGroup] = {}
    for group in sorted(groups, key=lambda g: (g.ranks, g.group.group_name)):
        unique.setdefault(group.ranks, group)
    if not unique:
        return Participants()
    ranks = _closure(list(unique.values()), device)
    world = dist.group.WORLD
    assert world is not None
    if len(ranks) == dist.get_world_size():
        reduce_group = world
    elif ranks in unique:
        reduce_group = unique[ranks].group
    else:
        reduce_group = made_group(ranks)
    return Participants(ranks, ranks.index(dist.get_rank()), reduce_group, weakref.ref(world))


def _closure(groups: list[RankGroup], device: torch.device) -> tuple[int, ...]:
    """All ranks connected by groups: flood what every rank knows until nobody can learn more."""
    # Row 0: ranks known to take part. Row 1: ranks whose own groups are in row 0 already.
    facts = torch.zeros(2, dist.get_world_size(), dtype=torch.uint8)
    facts[0, [rank for group in groups for rank in group.ranks]] = 1
    facts[1, dist.get_rank()] = 1
    pending = groups
    while pending:
        unfinished = []
        for group in pending:
            on_wire = facts.to(comm_device(group.group, device))
            dist.all_reduce(on_wire, op=dist.ReduceOp.MAX, group=group.group)
            facts = on_wire.cpu()
            # All members see the same facts here, so that all leave this group in the same sweep; what is complete in
            # one group its members carry to their others.
            if not torch.equal(facts[0], facts[1]):
                unfinished.append(group)
        pending = unfinished
    return tuple(facts[0].nonzero().flatten().tolist())
