"""Which ranks take part in a clip, and the process group over which their one all-reduce runs."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from distclip.groups import comm_device, made_group
from distclip.handshake import Wire, digest
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


def connect(groups: Iterable[RankGroup], settings: str = "") -> Participants:
    """Find all ranks that are connected, directly or through others, by the groups that layouts and arguments name.

    A rank knows its own groups only. HSDP on 2 x 2 ranks tells rank 0 of {0, 1} and {0, 2}; that rank 3 takes part it
    learns from them. Collective over ``groups`` (a few hundred bytes each) where there are any; every rank of a group
    must call it. Ranks that no group connects are never waited for.

    Args:
        groups: the groups of this rank's layouts and arguments.
        settings: what must be the same text on all ranks.

    Raises:
        RuntimeError: the ranks' settings differ; on all ranks, naming them.
    """
    # One group per set of ranks, chosen and ordered alike by all its members: crossing groups in different orders
    # would deadlock.
    unique: dict[tuple[int, ...], RankGroup] = {}
    # Every parameter names its groups, but there are few: by identity first, tuples of all ranks compare slowly.
    named = {id(group.group): group for group in groups}.values()
    for group in sorted(named, key=lambda g: (g.ranks, g.group.group_name)):
        unique.setdefault(group.ranks, group)
    if not unique:
        return Participants()
    world = dist.group.WORLD
    assert world is not None
    everybody = tuple(range(dist.get_world_size()))
    if everybody in unique:
        # Ranks may know different groups of the whole job; this one they all know.
        unique[everybody] = RankGroup(everybody, world)
    ranks = _closure(list(unique.values()), settings)
    if len(ranks) == dist.get_world_size():
        reduce_group = world
    elif ranks in unique:
        reduce_group = unique[ranks].group
    else:
        reduce_group = made_group(ranks)
    return Participants(ranks, ranks.index(dist.get_rank()), reduce_group, weakref.ref(world))


def _closure(groups: list[RankGroup], settings: str) -> tuple[int, ...]:
    """All ranks connected by groups: flood what every rank knows until nobody can learn more."""
    alarm = _Alarm(groups)
    # Row 0: ranks known to take part. Row 1: ranks whose own groups are in row 0 already.
    facts = torch.zeros(2, dist.get_world_size(), dtype=torch.uint8)
    facts[0, [rank for group in groups for rank in group.ranks]] = 1
    facts[1, dist.get_rank()] = 1
    # The largest of a byte and of its complement are the two ends of what the ranks said.
    own = torch.tensor(list(digest(settings).to_bytes(8, "big", signed=True)), dtype=torch.uint8)
    ends = torch.cat((own, 255 - own))
    pending = groups
    while pending:
        unfinished = []
        for group in pending:
            on_wire = torch.cat((facts.view(-1), ends)).to(comm_device(group.group, accelerated=False))
            alarm.all_reduce_max(on_wire, group)
            facts = on_wire[: facts.numel()].cpu().view_as(facts)
            if not torch.equal(on_wire[facts.numel() :].cpu(), ends):
                alarm.raise_disagreement(group, settings)
            # All members see the same facts here, so that all leave this group in the same sweep; what is complete in
            # one group its members carry to their others.
            if not torch.equal(facts[0], facts[1]):
                unfinished.append(group)
        pending = unfinished
    return tuple(facts[0].nonzero().flatten().tolist())


_handshakes: Counter[tuple[int, ...]] = Counter()


class _Alarm:
    """Tells ranks that wait in one group of what went wrong in another.

    A rank that forgot a group never comes there. Its peers in that group would wait for it until the timeout, although
    others have found the difference long since; these leave word in the job's store, and who waits looks there.
    """

    def __init__(self, groups: list[RankGroup]) -> None:
        self.store = distributed_c10d._get_default_store()
        self.keys = []
        for group in groups:
            _handshakes[group.ranks] += 1
            # Thousands of ranks by name would make a key of 100 kB.
            self.keys.append(f"distclip/{digest(str(group.ranks))}/{_handshakes[group.ranks]}")

    def all_reduce_max(self, tensor: Tensor, group: RankGroup) -> None:
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group.group, async_op=True)
        assert work is not None
        pause = 1e-4
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
            if pause > 0.1:
                self._raise_if_rung()
        work.wait()

    def raise_disagreement(self, group: RankGroup, settings: str) -> None:
        told = Wire(group.ranks, group.group).told(settings)
        message = (
            f"the ranks that take part in this clip disagree on how to clip:{told}\n"
            "Give every rank the same rule and arguments."
        )
        self._ring(message)
        raise RuntimeError(message)

    def _ring(self, message: str) -> None:
        for key in self.keys:
            self.store.set(key, message)

    def _raise_if_rung(self) -> None:
        for key in self.keys:
            if self.store.check([key]):
                message = self.store.get(key).decode()
                self._ring(message)
                raise RuntimeError(message)
