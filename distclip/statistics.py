"""Statistics of single tensors and rows, from what this rank has of them. Nothing here communicates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from distclip.gradients import LocalGrads, weights
from distclip.kernels import kernels_for
from distclip.plan import Plan
from distclip.rows import Rows, rows_of, squares


def extremes_of(plan: Plan, grads: dict[torch.device, LocalGrads], wire: torch.device) -> Tensor:
    """The largest of -g and of g in this rank's part of each tensor of the job, shape ``(tensors, 2)``."""
    ends = torch.full((plan.slot_count, 2), -math.inf, dtype=torch.float64, device=wire)
    slots = plan.slots_on(wire)
    for device, local in grads.items():
        # Each tensor has one piece on a rank.
        ends[slots[plan.index(local.places, wire)]] = kernels_for(device).extremes(local.pieces).to(wire)
    return ends


def rows_in(plan: Plan, local: LocalGrads) -> Iterator[tuple[int, Rows]]:
    """All rows of the pieces on one device, each with the place of its tensor, in blocks of bounded size."""
    for piece, place, index in zip(local.pieces, local.places, local.rows, strict=True):
        for found in rows_of(piece, plan.pieces[place], index):
            for block in found.blocks():
                yield place, block


def rows_sums(
    plan: Plan,
    grads: dict[torch.device, LocalGrads],
    wire: torch.device,
    statistic: Callable[[Rows], Tensor],
    shares: Tensor,
) -> Tensor:
    """This rank's share of a sum over each row of the job; float64, shape ``(units,)``."""
    assert plan.described is not None
    result = torch.zeros(plan.described.unit_count, dtype=torch.float64, device=wire)
    firsts, slots, factors = plan.described.first_units, plan.slots.tolist(), shares.tolist()
    for local in grads.values():
        for place, rows in rows_in(plan, local):
            units = rows.moved(firsts[slots[place]])
            if isinstance(units, Tensor):
                units = units.to(wire)
            result[units] += statistic(rows).to(wire) * factors[place]
    return result


def rows_of_weights(plan: Plan, params: Sequence[Tensor], wire: torch.device) -> Tensor:
    """This rank's share of the sum of squares of each row of parameters."""
    # A rank that only tells the others of its trouble has none to show.
    held = weights(plan, params) if params else {}
    return rows_sums(plan, held, wire, squares, plan.weight_shares)
