"""This step's gradients on this rank, as dense local tensors to read and write."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distclip.layout import Piece
from distclip.layout.dtensor import is_dtensor
from distclip.plan import Plan


@dataclass
class LocalGrads:
    """The non-empty pieces of gradients on one device of this rank."""

    pieces: list[Tensor] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """For each piece, the place of its tensor in ``Plan.tensors``."""
    sparse: list[str] = field(default_factory=list)
    """Names of the tensors of which only the stored values are here."""


def local_grads(plan: Plan, params: Sequence[Tensor]) -> dict[torch.device, LocalGrads]:
    """Gather what this rank holds, by device. Never communicates, so ranks may differ in which gradients exist.

    An uncoalesced sparse gradient is coalesced on the way: how it is stored changes, what it is does not.

    Raises:
        TypeError: a gradient is neither dense nor COO-sparse.
        RuntimeError: a gradient is laid out otherwise than its parameter.
    """
    found: dict[torch.device, LocalGrads] = defaultdict(LocalGrads)
    place = 0
    for name, layout, param in zip(plan.names, plan.layouts, params, strict=True):
        if param.grad is not None:
            local = _local(name, param, param.grad)
            for offset, part in _parts(local, layout.pieces):
                grads = found[part.device]
                grads.pieces.append(part)
                grads.places.append(place + offset)
                if param.grad.is_sparse:
                    grads.sparse.append(name)
        place += len(layout.pieces)
    return found


def check_limits(plan: Plan, grads: dict[torch.device, LocalGrads], bounds: tuple[float, float]) -> None:
    """Raise TypeError, naming the parameter, where its elements cannot be limited to ``bounds``."""
    low, high = bounds
    for local in grads.values():
        for piece, place in zip(local.pieces, local.places, strict=True):
            if piece.is_complex():
                raise TypeError(
                    f"the gradient of {plan.tensors[place]} is complex: its elements have no order to clip by"
                )
        if local.sparse and not low <= 0 <= high:
            raise TypeError(
                f"the gradient of {local.sparse[0]} is sparse, but clip_value bounds {bounds} leave out 0, which all "
                "elements that are not stored have"
            )


def _parts(local: Tensor, pieces: tuple[Piece, ...]) -> Iterator[tuple[int, Tensor]]:
    for offset, piece in enumerate(pieces):
        part = local if piece.span is None else local.view(-1).narrow(0, *piece.span)
        if part.numel():
            yield offset, part


def _local(name: str, param: Tensor, grad: Tensor) -> Tensor:
    """The dense tensor of this rank behind a gradient."""
    if is_dtensor(param):
        if not is_dtensor(grad) or grad.placements != param.placements:
            placed = f"placed {grad.placements}" if is_dtensor(grad) else "a plain tensor"
            raise RuntimeError(
                f"the gradient of {name} is {placed}, its parameter placed {param.placements}. distclip cannot reduce "
                "such a gradient yet: redistribute it to its parameter's placements before clipping."
            )
        return grad._local_tensor
    if grad.layout == torch.strided:
        return grad
    if grad.layout == torch.sparse_coo:
        # Uncoalesced, an element of the gradient is the sum of several stored values.
        if not grad.is_coalesced():
            param.grad = grad = grad.coalesce()
        return grad._values()
    raise TypeError(f"the gradient of {name} has layout {grad.layout}: only strided and sparse_coo can be clipped")
