"""What this rank holds of the model's gradients, and what it tells the others of it: numbers, one row a tensor."""

from __future__ import annotations

import ctypes
import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntFlag
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.gradients import grad_of, parts_of
from distclip.handshake import Wire, digest
from distclip.kernels import kernels_for
from distclip.kernels.common import real
from distclip.layout import GradLayout, RankGroup
from distclip.layout.dtensor import is_dtensor
from distclip.plan import Held, identity_of, looks_of, tensors_of

# Elements looked at together: what bounds the extra memory.
BLOCK = 1 << 20


class Flag(IntFlag):
    """What is true of one rank's piece."""

    GRADIENT = 1
    """It has a gradient, with at least one element."""
    PARTIAL = 2
    """That is a part of a sum."""
    EVERYWHERE = 4
    """Every rank that holds it should have a gradient where one of them has: plain tensors and DDP's."""
    APART = 8
    """It is declared to be a tensor of its own on each rank of a group."""
    MATRIX = 16
    """Its tensor has two dimensions or more."""


class Row(NamedTuple):
    """What goes over the wire of one piece; texts as their digests."""

    identity: int
    """Equal where ranks have pieces of one tensor (see ``plan.identity_of``)."""
    family: int
    """Equal, besides, where a tensor is declared to be another one on each rank."""
    spot: int
    """Equal where ranks are at the same stage of the pipeline and at the same place of declared groups."""
    piece: int
    """Equal where ranks have the same piece of the tensor."""
    part: int
    """Equal where that is the same part of a sum (Partial)."""
    looks: int
    bits: int
    """Equal where the gradients are, bit by bit."""
    power: int
    """The bits of the float64 ``sum(|g|**2)``."""
    flags: int


@dataclass(frozen=True)
class Holding:
    """One tensor of which this rank has a piece."""

    held: Held
    identity: str
    family: str
    spot: str
    values: Tensor | None
    """Its gradient, dense (of a sparse one the stored values); None without one, or without elements."""
    indices: Tensor | None = None
    """Where those of a sparse gradient are."""

    @property
    def place(self) -> str:
        """Which piece this is, by its place in each group that cuts the tensor."""
        layout = self.held.layout
        places = [group.order(dist.get_rank()) for group in layout.sharded]
        if layout.tie is not None and layout.sharded and self.values is not None:
            # Pipeline stages that share a tensor may cut it elsewhere (DeepSpeed's ZeRO 1).
            places += [self.held.piece.start, self.values.numel()]
        return str(places)

    def elements(self) -> Tensor:
        """The gradient as float64 in one dimension, complex numbers as pairs, on the CPU; of none, none."""
        if self.values is None:
            return torch.zeros(0, dtype=torch.float64)
        values = self.values
        if self.indices is not None:
            shape = self.held.piece.shape
            values = torch.sparse_coo_tensor(self.indices, values, shape, check_invariants=False).to_dense()
        return real(values).reshape(-1).cpu().double()

    def row(self, bits: int, power: float) -> Row:
        layout = self.held.layout
        flags = Flag(0)
        for flag, holds in (
            (Flag.GRADIENT, self.values is not None),
            (Flag.PARTIAL, bool(layout.partial)),
            (Flag.EVERYWHERE, layout.system in ("plain", "DDP") and not layout.apart),
            (Flag.APART, bool(layout.apart)),
            (Flag.MATRIX, len(self.held.piece.shape) > 1),
        ):
            flags |= flag if holds else Flag(0)
        return Row(
            identity=digest(self.identity),
            family=digest(self.family),
            spot=digest(self.spot),
            piece=digest(self.place),
            part=digest(str([group.order(dist.get_rank()) for group in layout.partial])),
            looks=digest(looks_of(self.held)),
            bits=bits,
            power=_bits_of_float(power),
            flags=int(flags),
        )


def _bits_of_float(value: float) -> int:
    return int(struct.unpack("q", struct.pack("d", value))[0])


def holdings_of(
    names: Sequence[str],
    params: Sequence[Tensor],
    layouts: Sequence[GradLayout],
    pipeline: RankGroup | None,
    blind: bool = False,
) -> list[Holding]:
    """This rank's pieces, in the order of its parameters. Local; reads no gradient and changes none.

    Args:
        blind: take all parameters for ones without gradient: theirs are not reduced yet, and of other shapes.
    """
    found: list[Holding] = []
    parts: dict[int, Tensor] = {}
    indices, place = None, 0
    last: Tensor | None = None
    for held in tensors_of(names, params, layouts):
        if held.param is not last:
            last, place = held.param, 0
            values, indices = (None, None) if blind else _local(held.param, held.layout)
            parts = {} if values is None else dict(parts_of(values, held.layout.pieces))
        together = held._replace(layout=replace(held.layout, apart=()))
        groups = ([pipeline] if pipeline else []) + list(held.layout.apart)
        spot = str([group.order(dist.get_rank()) for group in groups])
        identity, family = identity_of(held, pipeline), identity_of(together, pipeline)
        found.append(Holding(held, identity, family, spot, parts.get(place), indices))
        place += 1
    return found


def _local(param: Tensor, layout: GradLayout) -> tuple[Tensor | None, Tensor | None]:
    """What of the gradient lies here, and where its elements are if it is sparse."""
    grad = grad_of(param, layout)
    if grad is None or grad.layout not in (torch.strided, torch.sparse_coo):
        return None, None
    if is_dtensor(grad):
        return grad._local_tensor, None
    if grad.layout == torch.sparse_coo:
        grad = grad.coalesce()
        return grad._values(), grad._indices()
    return grad, None


def quick_rows(holdings: Sequence[Holding]) -> list[Row]:
    """The rows by one read of the gradients; equal sums of squares stand for equal bits."""
    powers = [0.0] * len(holdings)
    devices: dict[torch.device, list[int]] = {}
    for place, holding in enumerate(holdings):
        if holding.values is not None:
            devices.setdefault(holding.values.device, []).append(place)
    for device, places in devices.items():
        tensors = [values for place in places if (values := holdings[place].values) is not None]
        for place, power in zip(places, kernels_for(device).power_sums(tensors, 2.0).tolist(), strict=True):
            powers[place] = power
    return [holding.row(_bits_of_float(power), power) for holding, power in zip(holdings, powers, strict=True)]


def thorough_rows(holdings: Sequence[Holding]) -> list[Row]:
    """The rows by all bits, and by sums that torch's plain float64 arithmetic makes, not distclip's kernels."""
    rows = []
    for holding in holdings:
        if holding.values is None:
            rows.append(holding.row(0, 0.0))
            continue
        power = math_power(holding.values)
        tensors = [holding.values] if holding.indices is None else [holding.values, holding.indices]
        rows.append(holding.row(bits_of(*tensors), power))
    return rows


def math_power(values: Tensor) -> float:
    """``sum(|g|**2)`` in float64."""
    blocks = real(values).reshape(-1).split(BLOCK)
    return float(sum(block.double().square().sum().item() for block in blocks))


def bits_of(*tensors: Tensor) -> int:
    """A number that is the same for tensors of the same elements in the same order, bit by bit."""
    hasher = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        for block in real(tensor.detach()).reshape(-1).split(BLOCK):
            here = block.cpu().contiguous()
            # hashlib reads the memory itself; NumPy, which torch does not insist on, is not needed.
            hasher.update((ctypes.c_char * here.nbytes).from_address(here.data_ptr()))
    return int.from_bytes(hasher.digest(), "big", signed=True)


def is_patterned(holding: Holding) -> bool:
    """Whether a gradient repeats itself along some axis, so that equal ones prove nothing.

    ``loss = model(x).sum()`` gives every row of the last layer the same gradient, on whatever rank.
    """
    values, layout = holding.values, holding.held.layout
    if values is None or values.numel() == 1:
        return True
    rest = holding.held.piece.shape[1:].numel()
    if values.ndim == 1 and rest > 1 and values.numel() % rest == 0:
        values = values.view(-1, rest)  # some rows of a flattened matrix
    # Of a piece that is a single row nobody can tell.
    axes = [axis for axis in range(values.ndim) if values.size(axis) > 1 or layout.sharded]
    return any(bool((values == values.narrow(axis, 0, 1)).all()) for axis in axes)


@dataclass(frozen=True)
class Table:
    """The rows of all asked ranks, a column each; int64 but for ``power``. The same on all of them."""

    columns: dict[str, Tensor]
    ranks: Tensor
    """Whose row it is."""
    components: dict[int, int]
    """For each asked rank, a number that is the same on those whose gradients make up one norm."""

    def __getitem__(self, column: str) -> Tensor:
        return self.columns[column]

    def has(self, flag: Flag) -> Tensor:
        """Which rows have it; bool."""
        return (self.columns["flags"] & int(flag)) != 0

    def where(self, rows: Tensor) -> Table:
        return Table({name: column[rows] for name, column in self.columns.items()}, self.ranks[rows], self.components)

    def __len__(self) -> int:
        return self.ranks.numel()


def tell(wire: Wire, rows: Sequence[Row], component: Sequence[int], most: int | None = None) -> Table:
    """Give all asked ranks everybody's rows. Collective.

    Args:
        component: the ranks whose gradients make up one norm with this rank's.
        most: about how many rows of all ranks there may be; of more, those of some tensors stand for all.
    """
    width = len(Row._fields)
    mine = torch.tensor(rows, dtype=torch.int64).view(-1, width)
    summary = wire.gather(torch.tensor([len(mine), digest(str(mine.tolist())), digest(str(tuple(component)))]))
    lengths = summary[:, 0]
    longest = int(lengths.max())
    if most is not None and len(wire.ranks) * longest > most:
        every = -(-len(wire.ranks) * longest // most)
        return tell(wire, [row for row in rows if row.family % every == 0], component)  # equal on all ranks
    if len(set(summary[:, 1].tolist())) == 1:
        everybody = mine.expand(len(wire.ranks), longest, width)
    else:
        padded = torch.zeros(longest, width, dtype=torch.int64)
        padded[: len(mine)] = mine
        everybody = wire.gather(padded.view(-1)).view(-1, longest, width)
    listed = torch.arange(longest) < lengths.view(-1, 1)
    ranks = torch.tensor(wire.ranks).view(-1, 1).expand_as(listed)[listed]
    columns = dict(zip(Row._fields, everybody[listed].unbind(1), strict=True))
    columns["power"] = columns["power"].contiguous().view(torch.float64)
    return Table(columns, ranks, dict(zip(wire.ranks, summary[:, 2].tolist(), strict=True)))
