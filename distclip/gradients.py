"""This step's gradients on this rank, as dense local tensors to read and write."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distclip.layout import GradLayout, Piece
from distclip.layout.dtensor import is_dtensor, kinds, reduced
from distclip.plan import Plan


@dataclass
class LocalGrads:
    """The non-empty pieces of gradients on one device of this rank."""

    pieces: list[Tensor] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """For each piece, the place of its tensor in ``Plan.tensors``."""
    sparse: list[str] = field(default_factory=list)
    """Names of the tensors of which only the stored values are here."""
    riding: dict[int, Tensor] = field(default_factory=dict)
    """Parts of Partial gradients by the place of their tensor; they are among the pieces too, to be scaled."""


def local_grads(plan: Plan, params: Sequence[Tensor]) -> dict[torch.device, LocalGrads]:
    """Gather what this rank holds, by device. Ranks may differ in which gradients exist: what communicates here, if
    anything does, follows from the plan.

    An uncoalesced sparse gradient is coalesced on the way: how it is stored changes, what it is does not.

    Raises:
        TypeError: a gradient is neither dense nor COO-sparse.
        RuntimeError: a gradient is laid out otherwise than its parameter.
    """
    for guard in plan.guards:
        guard()
    return found(plan, params, settled(plan, params))


def found(
    plan: Plan, params: Sequence[Tensor], others: Mapping[int, Tensor] | None = None, only: Container[int] | None = None
) -> dict[torch.device, LocalGrads]:
    """As ``local_grads``, but nothing is asked, nothing reduced.

    Args:
        others: by place of the parameter, what stands for a gradient that this rank has not.
        only: places of the parameters to look at; None for all.
    """
    result: dict[torch.device, LocalGrads] = defaultdict(LocalGrads)
    place = 0
    for index, (name, layout, param) in enumerate(zip(plan.names, plan.layouts, params, strict=True)):
        grad = grad_of(param, layout) if only is None or index in only else None
        if others and index in others:
            grad = others[index]
        if grad is not None:
            local = _local(name, param, grad, layout)
            for offset, part in parts_of(local, layout.pieces):
                grads = result[part.device]
                grads.pieces.append(part)
                grads.places.append(place + offset)
                if layout.partial:
                    grads.riding[place + offset] = part
                if grad.is_sparse:
                    grads.sparse.append(name)
        place += len(layout.pieces)
    return result


def grad_of(param: Tensor, layout: GradLayout) -> Tensor | None:
    """What this rank has of a parameter's gradient, wherever its system keeps it."""
    return param.grad if layout.local is None else layout.local()


def settled(plan: Plan, params: Sequence[Tensor]) -> dict[int, Tensor]:
    """Reduce the Partial gradients that the norm's all-reduce cannot carry. Collective, one each, where there are any.

    A gradient becomes what it stands for, placed as its parameter is.

    Returns:
        By place of the parameter, what a rank without the gradient got of it: it counts in the norm.
    """
    result = {}
    for place, letters in plan.settled.items():
        param = params[place]
        assert is_dtensor(param)
        grad = reduced(param, letters)
        if param.grad is not None:
            param.grad = grad
        else:
            result[place] = grad
    return result


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


def version_of(grad: Tensor) -> int:
    """A number that grows with each write to the gradient in place; -1 where nobody counts."""
    # Writing to a DTensor's local tensor does not show in the DTensor's own version.
    local = getattr(grad, "_local_tensor", grad)
    return -1 if local.is_inference() else int(local._version)


def parts_of(local: Tensor, pieces: tuple[Piece, ...]) -> Iterator[tuple[int, Tensor]]:
    """The place of each piece that this rank has something of, and its elements in the ``local`` gradient."""
    for offset, piece in enumerate(pieces):
        part = local if piece.span is None else local.view(-1).narrow(0, *piece.span)
        if part.numel():
            yield offset, part


def _local(name: str, param: Tensor, grad: Tensor, layout: GradLayout) -> Tensor:
    """The dense tensor of this rank behind a gradient."""
    if is_dtensor(param):
        if not is_dtensor(grad):
            raise RuntimeError(f"the gradient of {name} is a plain tensor, its parameter a DTensor: expected a DTensor")
        # Comparing with the parameter is the fast way to the usual answer.
        usual = layout.as_parameter and grad.placements == param.placements
        if not usual and kinds(grad) != layout.letters:
            raise RuntimeError(
                f"the gradient of {name} is placed {grad.placements}, otherwise than the ranks agreed at the first "
                f"clip ({layout.letters}, one letter a mesh axis). Give it the same placements in every step."
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
