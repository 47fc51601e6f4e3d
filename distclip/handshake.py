"""What the participants tell each other when a plan is built, before any of them relies on it.

Every rank lists the tensors of which it has a piece as numbers: what the tensor is (a hash of its name and place on
the job), how it looks (a hash of shape and dtype), into how many pieces it is cut, how its gradient is placed. From
that all ranks learn, alike, how many have each tensor, and whether they mean the same. Texts travel only to word an
error.

First every rank tells a hash of its list, then one rank of those with the same list tells the list: a thousand ranks on
ten stages of a pipeline cost ten lists, not a thousand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.groups import comm_device


@dataclass(frozen=True)
class Entry:
    """One tensor, as one rank sees it."""

    identity: str
    """The same on two ranks where they have pieces of the same tensor."""
    looks: str
    """Must then be the same too."""
    cut: int
    """Number of distinct pieces."""
    placed: int = 0
    """How this rank's gradient is placed, as a number; 0 if it has none to tell."""


@dataclass(frozen=True)
class Agreement:
    """What all participants found, for this rank's entries in their order."""

    holders: list[int]
    """How many ranks have a piece of the tensor."""
    slots: list[int]
    """The tensor's place among all tensors of the job, the same on all ranks."""
    slot_count: int
    placed: list[int]
    """How the tensor's gradient is placed, told by whichever ranks have one."""
    facts: Facts
    alike: bool = True
    """Whether all participants listed the same tensors in the same order."""


@dataclass(frozen=True)
class Facts:
    """What holds of any participant; agreed, of all together."""

    reduces: bool
    """Some gradients are not whole on the rank."""
    wide: bool
    """Some parameters are float64 or complex128."""
    narrow: bool
    """Some are of another dtype."""
    accelerated: bool
    """Some are not on the CPU."""


@dataclass(frozen=True)
class Wire:
    """Gathering by sums over one-hot rows: for any backend, without pickles. Collective over ``group``."""

    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
    """None where there is one rank only."""

    def gather(self, row: Tensor, speakers: Sequence[int] | None = None) -> Tensor:
        """Everybody's ``row``, of one length and dtype on all ranks; shape ``(ranks, len(row))``, on the CPU.

        Args:
            row: of this rank.
            speakers: the places among the ranks of those whose rows are wanted, ascending, the same on all ranks; None
                for all.
        """
        if self.group is None:
            return row.cpu().view(1, -1)
        device = comm_device(self.group, accelerated=False)
        speaking = range(len(self.ranks)) if speakers is None else speakers
        table = torch.zeros(len(speaking), row.numel(), dtype=row.dtype, device=device)
        place = self.ranks.index(dist.get_rank())
        if place in speaking:
            table[speaking.index(place)] = row.to(device)
        dist.all_reduce(table, group=self.group)
        return table.cpu()

    def texts(self, text: str) -> list[str]:
        """Everybody's text, in the order of the ranks."""
        encoded = text.encode()
        summary = self.gather(torch.tensor([len(encoded), digest(text)]))
        words = -(-int(summary[:, 0].max()) // 8)
        if not words:
            return [""] * len(summary)
        padded = torch.frombuffer(bytearray(encoded.ljust(8 * words, b"\0")), dtype=torch.int64)
        speakers, which = first_of_each(summary[:, 1])
        rows = self.gather(padded, speakers.tolist()).view(torch.uint8)
        lengths = summary[speakers, 0].tolist()
        said = [bytes(row[:length].tolist()).decode() for length, row in zip(lengths, rows, strict=True)]
        return [said[place] for place in which.tolist()]

    def told(self, text: str) -> str:
        """A line for each distinct text of the ranks, with those that said it."""
        said: dict[str, list[int]] = {}
        for rank, other in zip(self.ranks, self.texts(text), strict=True):
            said.setdefault(other or "nothing of that", []).append(rank)
        return "".join(f"\n  on rank {', '.join(map(str, ranks))}: {text}" for text, ranks in said.items())


def alone(entries: Sequence[Entry], facts: Facts) -> Agreement:
    """The agreement of a rank that needs no other."""
    count = len(entries)
    return Agreement([1] * count, list(range(count)), count, [entry.placed for entry in entries], facts)


def agree(wire: Wire, entries: Sequence[Entry], facts: Facts) -> Agreement:
    """Compare tensors with all participants. Collective.

    Raises:
        RuntimeError: the ranks disagree; on all of them, naming what differs.
    """
    mine = torch.tensor([[digest(e.identity), digest(e.looks), e.cut, e.placed] for e in entries], dtype=torch.int64)
    mine = mine.view(-1, 4)
    summary = wire.gather(torch.tensor([len(mine), digest(str(mine.tolist())), *astuple(facts)]))
    facts = Facts(*summary[:, 2:].any(0).tolist())
    if len(set(summary[:, 1].tolist())) == 1:
        # All lists are this one, so that its rows stand for everybody's.
        places, holders = torch.arange(len(mine)), torch.full((len(mine),), len(wire.ranks))
        _check(wire, entries, mine, holders, places, mine)
        return Agreement(holders.tolist(), places.tolist(), len(mine), mine[:, 3].tolist(), facts)

    # Ranks have different tensors: stages, experts, gradients that some ranks miss.
    speakers, which = first_of_each(summary[:, 1])
    longest = int(summary[:, 0].max())
    padded = torch.zeros(longest, 4, dtype=torch.int64)
    padded[: len(mine)] = mine
    listed = torch.arange(longest) < summary[speakers, :1]
    rows = wire.gather(padded.view(-1), speakers.tolist()).view(-1, longest, 4)[listed]
    copies = which.bincount().view(-1, 1).expand_as(listed)[listed]
    identities, index = rows[:, 0].unique(return_inverse=True)
    holders = torch.zeros_like(identities).index_add_(0, index, copies)
    _check(wire, entries, identities.view(-1, 1), holders, index, rows)
    slots = torch.searchsorted(identities, mine[:, 0].contiguous())
    placed = torch.zeros_like(identities).scatter_reduce(0, index, rows[:, 3], "amax")
    return Agreement(holders[slots].tolist(), slots.tolist(), len(identities), placed[slots].tolist(), facts, False)


def _check(
    wire: Wire, entries: Sequence[Entry], identities: Tensor, holders: Tensor, index: Tensor, rows: Tensor
) -> None:
    """Raise where ranks mean different things by one identity. All ranks check the same numbers."""
    wrong = differing(len(holders), index, rows[:, 1]) | differing(len(holders), index, rows[:, 2])
    # A rank without a gradient says nothing of how it is placed.
    told = rows[:, 3] != 0
    wrong |= differing(len(holders), index[told], rows[told, 3])
    cut = torch.ones_like(holders).scatter_reduce(0, index, rows[:, 2], "amax")
    wrong |= holders % cut != 0
    if wrong.any():
        first = int(identities[int(wrong.nonzero()[0]), 0])
        mine = [f"{e.identity}: {e.looks}, in {e.cut} pieces" for e in entries if digest(e.identity) == first]
        raise RuntimeError(
            f"the ranks that take part in this clip disagree on a tensor:{wire.told('; '.join(mine))}\n"
            "No gradient was changed. Clip the same model on every rank; name pipeline_group= where ranks hold stages, "
            "and declare(..., sharded=group) where they hold different tensors under one name."
        )


def first_of_each(values: Tensor) -> tuple[Tensor, Tensor]:
    """Where each distinct value of a list stands first, ascending; and for each place, which of these has its value."""
    distinct, which = values.unique(return_inverse=True)
    first = torch.full_like(distinct, len(values)).scatter_reduce(0, which, torch.arange(len(values)), "amin")
    order = first.argsort()
    return first[order], order.argsort()[which]


def differing(count: int, index: Tensor, values: Tensor) -> Tensor:
    """For each of ``count`` tensors, whether the values that ``index`` assigns to it are not all equal."""
    limits = torch.iinfo(torch.int64)
    low = torch.full((count,), limits.max).scatter_reduce(0, index, values, "amin")
    high = torch.full((count,), limits.min).scatter_reduce(0, index, values, "amax")
    return low < high


def digest(text: str) -> int:
    """64 bits that stand for a text on the wire."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
