"""Where the ranks' gradients are not what the layouts say. All ranks look at the same table and find the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distclip.audit.holdings import Flag, Table
from distclip.handshake import differing

# The quick check takes replicas for different where their norms differ by so much of the larger one, and by so much
# of the norm of all gradients: rounding does less.
QUICK_RELATIVE = 1e-3
QUICK_OF_TOTAL = 1e-6

Differ = Callable[[Table, Tensor, int], Tensor]
"""Of rows, the replicas that each is one of (0 to a count), and that count: for each, whether they differ."""


@dataclass(frozen=True)
class Suspect:
    """Tensors with which something may be wrong."""

    kind: str
    identities: tuple[int, ...]
    clusters: tuple[tuple[int, ...], ...]
    """The ranks concerned; those that agree with each other together."""
    closeness: float = 0.0
    """For replicas that differ, by how much of the larger one their norms do."""

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({rank for cluster in self.clusters for rank in cluster}))


def suspects(table: Table, differ: Differ) -> list[Suspect]:
    """Everything that looks wrong in the table."""
    shapes = _other_looks(table)
    misfits = {identity for suspect in shapes for identity in suspect.identities}
    known = torch.tensor([identity not in misfits for identity in table["identity"].tolist()], dtype=torch.bool)
    rest = table.where(known)
    grads = rest.where(rest.has(Flag.GRADIENT))
    return [
        *shapes,
        *_left_out(table),
        *_different_replicas(grads, differ),
        *_missing(rest),
        *_equal_pieces(grads),
        *_equal_places(grads),
        *_counted_twice(grads),
    ]


def compared(table: Table) -> set[int]:
    """The tensors of which several ranks hold the same piece, with a gradient that is not 0."""
    grads = table.where(table.has(Flag.GRADIENT) & (table["power"] != 0))
    index, count = _groups(grads, "identity", "piece", "part")
    several = torch.bincount(index, minlength=count) > 1
    return set(grads["identity"][several[index]].tolist())


def bits_differ(table: Table, index: Tensor, count: int) -> Tensor:
    return differing(count, index, table["bits"])


def norms_differ(table: Table, index: Tensor, count: int) -> Tensor:
    """By more than rounding explains. Norms that are not finite are the clip's own matter."""
    low, high = _range(table["power"].sqrt(), index, count)
    total = total_norm(table.where(table["power"].isfinite()))
    margin = torch.maximum(high * QUICK_RELATIVE, total * QUICK_OF_TOTAL)
    return high.isfinite() & (high - low > margin)


def total_norm(table: Table, partial: dict[tuple[int, int], float] | None = None) -> Tensor:
    """The norm of all tensors of the table together: each distinct piece once, in float64, 0-d.

    Args:
        partial: for Partial gradients, by identity and piece, the sum of squares of what the parts add up to; without
            it they are left out.
    """
    whole = table.where(~table.has(Flag.PARTIAL) & table.has(Flag.GRADIENT))
    index, count = _groups(whole, "identity", "piece")
    # Of replicas, the one on the lowest rank: rows are in the order of the ranks.
    first = torch.full((count,), len(whole)).scatter_reduce(0, index, torch.arange(len(whole)), "amin")
    return (whole["power"][first].sum() + sum((partial or {}).values())).sqrt()


def _groups(table: Table, *columns: str) -> tuple[Tensor, int]:
    """For each row, the number of those with the same values in ``columns``; and how many such there are."""
    if not len(table):
        return torch.zeros(0, dtype=torch.int64), 0
    rows = torch.stack([table[column] for column in columns], 1)
    distinct, index = rows.unique(dim=0, return_inverse=True)
    return index, len(distinct)


def _range(values: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    start = values.new_zeros(count)
    low = start.scatter_reduce(0, index, values, "amin", include_self=False)
    return low, start.scatter_reduce(0, index, values, "amax", include_self=False)


def _clusters(table: Table, by: str) -> tuple[tuple[int, ...], ...]:
    """The ranks of the rows, those with the same value in a column together."""
    found: dict[object, set[int]] = {}
    for rank, value in zip(table.ranks.tolist(), table[by].tolist(), strict=True):
        found.setdefault(value, set()).add(rank)
    return tuple(sorted(tuple(sorted(ranks)) for ranks in found.values()))


def _flagged(kind: str, table: Table, index: Tensor, flags: Tensor, by: str) -> list[Suspect]:
    found = []
    for number in flags.nonzero().flatten().tolist():
        rows = table.where(index == number)
        identities = tuple(dict.fromkeys(rows["identity"].tolist()))
        low, high = float(rows["power"].min()) ** 0.5, float(rows["power"].max()) ** 0.5
        closeness = (high - low) / high if high > 0 else 0.0
        found.append(Suspect(kind, identities, _clusters(rows, by), closeness))
    return found


def _other_looks(table: Table) -> list[Suspect]:
    """Tensors of one name whose shapes or dtypes differ."""
    index, count = _groups(table, "identity")
    return _flagged("shapes", table, index, differing(count, index, table["looks"]), "looks")


def _left_out(table: Table) -> list[Suspect]:
    """Tensors that do not count in the norm of some asked rank."""
    components = set(table.components.values())
    if len(components) == 1:
        return []
    component = torch.tensor([table.components[rank] for rank in table.ranks.tolist()], dtype=torch.int64)
    index, count = _groups(table, "identity")
    pairs = torch.stack((index, component), 1).unique(dim=0)
    found = []
    for number in (torch.bincount(pairs[:, 0], minlength=count) < len(components)).nonzero().flatten().tolist():
        rows = table.where(index == number)
        seen = set(component[index == number].tolist())
        outside = tuple(rank for rank, other in table.components.items() if other not in seen)
        holding = tuple(sorted(set(rows.ranks.tolist())))
        found.append(Suspect("left-out", (int(rows["identity"][0]),), (holding, outside)))
    return found


def _different_replicas(grads: Table, differ: Differ) -> list[Suspect]:
    index, count = _groups(grads, "identity", "piece", "part")
    return _flagged("replicas", grads, index, differ(grads, index, count), "bits")


def _missing(table: Table) -> list[Suspect]:
    """Replicas of which some have a gradient that matters, and others none; in this order."""
    everywhere = table.where(table.has(Flag.EVERYWHERE))
    index, count = _groups(everywhere, "identity", "piece")
    given = everywhere.has(Flag.GRADIENT)
    matters = given & (everywhere["power"].sqrt() > total_norm(table) * QUICK_OF_TOTAL)
    some = torch.bincount(index[matters], minlength=count) > 0
    lacking = torch.bincount(index[~given], minlength=count) > 0
    found = []
    for number in (some & lacking).nonzero().flatten().tolist():
        mine = index == number
        having, without = (tuple(everywhere.ranks[mine & side].tolist()) for side in (given, ~given))
        found.append(Suspect("missing", (int(everywhere["identity"][mine][0]),), (having, without)))
    return found


def _nonzero(grads: Table) -> Table:
    # Where a loss scale was too large, all elements are inf or NaN: equal, and that says nothing.
    return grads.where((grads["power"] != 0) & grads["power"].isfinite() & ~grads.has(Flag.PARTIAL))


def _equal_pieces(grads: Table) -> list[Suspect]:
    """Pieces of one tensor, said to be distinct, that are all equal."""
    rows = _nonzero(grads)
    index, count = _groups(rows, "identity")
    equal = differing(count, index, rows["piece"]) & ~differing(count, index, rows["bits"])
    return _flagged("equal-pieces", rows, index, equal, "piece")


def _equal_places(grads: Table) -> list[Suspect]:
    """Tensors declared to be others on each rank that are all equal."""
    rows = _nonzero(grads)
    rows = rows.where(rows.has(Flag.APART))
    index, count = _groups(rows, "family", "piece")
    equal = differing(count, index, rows["spot"]) & ~differing(count, index, rows["bits"])
    return _flagged("equal-places", rows, index, equal, "spot")


def _counted_twice(grads: Table) -> list[Suspect]:
    """Matrices of other names on other stages, or at other places, whose gradients are equal."""
    rows = _nonzero(grads)
    rows = rows.where(rows.has(Flag.MATRIX))
    index, count = _groups(rows, "bits")
    twice = differing(count, index, rows["spot"]) & differing(count, index, rows["family"])
    found = _flagged("counted-twice", rows, index, twice, "identity")
    # Every piece of a tensor that is cut tells the same.
    return list({frozenset(suspect.identities): suspect for suspect in found}.values())
