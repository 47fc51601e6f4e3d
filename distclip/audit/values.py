"""Gathering the gradients themselves, block by block: where numbers that stand for them are not enough."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from distclip.audit.holdings import BLOCK, Flag, Holding, Table
from distclip.handshake import Wire, digest


def gathered(wire: Wire, holdings: Sequence[Holding], identities: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
    """Everybody's elements of some tensors. Collective; the tensors are the same on all ranks.

    Yields:
        A tensor's identity and a block, float64, shape ``(ranks, elements)``; zeros of ranks that have none. Parts of
        Partial gradients are scaled so that they add up to the gradient.
    """
    mine = {digest(holding.identity): holding for holding in holdings}
    wanted = sorted(identities)
    sizes = [mine[identity].elements().numel() if identity in mine else 0 for identity in wanted]
    longest = wire.gather(torch.tensor(sizes)).amax(0).tolist() if wanted else []
    step = max(1, BLOCK // len(wire.ranks))
    for identity, size in zip(wanted, longest, strict=True):
        whole = torch.zeros(size, dtype=torch.float64)
        if identity in mine:
            elements = mine[identity].elements()
            whole[: elements.numel()] = elements * mine[identity].held.layout.partial_scale
        for block in whole.split(step):
            yield identity, wire.gather(block)


def difference(wire: Wire, holdings: Sequence[Holding], table: Table, identities: Iterable[int]) -> dict[int, float]:
    """By how much replicas differ, in parts of the tensor's largest element. Collective."""
    spread: dict[int, float] = {}
    largest: dict[int, float] = {}
    for identity, block in gathered(wire, holdings, identities):
        for alike in _replicas(wire, table, identity).values():
            rows = block[alike]
            apart = float((rows.amax(0) - rows.amin(0)).amax())
            spread[identity] = max(spread.get(identity, 0.0), apart)
            largest[identity] = max(largest.get(identity, 0.0), float(rows.abs().amax()))
    return {identity: spread[identity] / largest[identity] if largest[identity] else 0.0 for identity in spread}


def partial_powers(wire: Wire, holdings: Sequence[Holding], table: Table) -> dict[tuple[int, int], float]:
    """By identity and piece, the sum of squares of what the parts of a Partial gradient add up to. Collective."""
    powers: dict[tuple[int, int], float] = {}
    partial = set(table["identity"][table.has(Flag.PARTIAL)].tolist())
    for identity, block in gathered(wire, holdings, partial):
        sums: dict[int, Tensor] = {}
        for (piece, _), alike in _replicas(wire, table, identity).items():
            sums[piece] = sums.get(piece, torch.zeros(())) + block[alike[0]]
        for piece, values in sums.items():
            powers[identity, piece] = powers.get((identity, piece), 0.0) + float(values.square().sum())
    return powers


def _replicas(wire: Wire, table: Table, identity: int) -> dict[tuple[int, int], list[int]]:
    """The ranks, by their place on the wire, that have a gradient of the same piece and part."""
    rows = table.where((table["identity"] == identity) & table.has(Flag.GRADIENT))
    found: dict[tuple[int, int], list[int]] = {}
    for rank, piece, part in zip(rows.ranks.tolist(), rows["piece"].tolist(), rows["part"].tolist(), strict=True):
        found.setdefault((piece, part), []).append(wire.ranks.index(rank))
    return found
