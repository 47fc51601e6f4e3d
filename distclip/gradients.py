"""This step's gradients on this rank, as dense local tensors to read and write."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from distclip.layout import GradLayout, Piece
from distclip.layout.dtensor import is_dtensor, kinds, reduced, row_index
from distclip.plan import Plan
from distclip.rules.base import Limits


@dataclass
class LocalGrads:
    """The non-empty pieces of gradients on one device of this rank."""

    pieces: list[Tensor] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """For each piece, the place of its tensor in ``Plan.tensors``."""
    sparse: list[str] = field(default_factory=list)
    """Names of the tensors of which only the stored values are here."""
    rows: list[Tensor | None] = field(default_factory=list)
    """For each piece, which rows of its tensor are in it; None where all are, it is flat, or nobody asks for rows."""
    riding: dict[int, Tensor] = field(default_factory=dict)
    """Parts of Partial gradients by the place of their tensor; they are among the pieces too, to be scaled."""

    def whole(self) -> tuple[list[Tensor], list[int]]:
        """The pieces without those parts, and their places."""
        if not self.riding:
            return self.pieces, self.places
        kept = [index for index, place in enumerate(self.places) if place not in self.riding]
        return [self.pieces[index] for index in kept], [self.places[index] for index in kept]


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
    if plan.straight and only is None and not others:
        usual = _at_once(plan, params)
        if usual is not None:
            return usual
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
                grads.rows.append(_rows_in(plan, index, grad))
                if layout.partial:
                    grads.riding[place + offset] = part
                if grad.is_sparse:
                    grads.sparse.append(name)
        place += len(layout.pieces)
    return result


def _at_once(plan: Plan, params: Sequence[Tensor]) -> dict[torch.device, LocalGrads] | None:
    """As ``found``, for a straight plan, in few looks at each gradient; None where any is not of the usual kind."""
    held: list[Any] = [param.grad for param in params]
    places, placements = list(range(len(held))), plan.placements
    kinds = set(map(type, held))
    if type(None) in kinds:
        places = [place for place, grad in enumerate(held) if grad is not None]
        held, placements = [held[place] for place in places], [placements[place] for place in places]
    if not held:
        return {}
    if len(kinds - {type(None)}) > 1 or is_dtensor(held[0]) != plan.all_dtensors:
        return None
    if plan.all_dtensors:
        if list(map(_PLACEMENTS, held)) != placements:
            return None
        held = list(map(_LOCAL, held))
    if not all(map(Tensor.numel, held)):
        kept = [index for index, grad in enumerate(held) if grad.numel()]
        held, places = [held[index] for index in kept], [places[index] for index in kept]
    if not held:
        return {}
    if len(set(map(Tensor.get_device, held))) > 1 or set(map(_LAYOUT, held)) != {torch.strided}:
        return None
    return {held[0].device: LocalGrads(held, places, rows=[None] * len(held))}


_PLACEMENTS, _LOCAL, _LAYOUT = attrgetter("_spec.placements"), attrgetter("_local_tensor"), attrgetter("layout")


def weights(plan: Plan, params: Sequence[Tensor]) -> dict[torch.device, LocalGrads]:
    """This rank's parts of the trained parameters themselves, as ``found`` gives those of their gradients."""
    result: dict[torch.device, LocalGrads] = defaultdict(LocalGrads)
    place = 0
    for index, (layout, param) in enumerate(zip(plan.layouts, params, strict=True)):
        if param.requires_grad:
            local: Tensor | None = param._local_tensor if is_dtensor(param) else param.detach()
            if layout.weights is not None:
                local = layout.weights(param)
            if local is not None:
                for offset, part in parts_of(local, layout.pieces):
                    held = result[part.device]
                    held.pieces.append(part)
                    held.places.append(place + offset)
                    held.rows.append(_rows_in(plan, index, param))
        place += len(layout.pieces)
    return result


def _rows_in(plan: Plan, index: int, tensor: Tensor) -> Tensor | None:
    """Which rows of a DTensor (a parameter or its gradient) this rank has."""
    if not plan.by_rows or not is_dtensor(tensor) or tensor.ndim < 2:
        return None
    key = (index, tensor.placements)
    if key not in plan.rows:
        plan.rows[key] = row_index(tensor)
    return plan.rows[key]


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


def check_limits(plan: Plan, grads: dict[torch.device, LocalGrads], limits: Limits) -> None:
    """Raise TypeError, naming the parameter, where its elements cannot be limited."""
    for local in grads.values():
        sparse = set(local.sparse)
        for piece, place in zip(local.pieces, local.places, strict=True):
            bounds, name = plan.limit_of(place, limits), plan.tensors[place]
            if bounds is None:
                continue
            if piece.is_complex():
                raise TypeError(f"the gradient of {name} is complex: its elements have no order to clip by")
            if name in sparse and not bounds[0] <= 0 <= bounds[1]:
                raise TypeError(
                    f"the gradient of {name} is sparse, but clip_value bounds {bounds} leave out 0, which all elements "
                    "that are not stored have"
                )


def check_rows(plan: Plan, grads: dict[torch.device, LocalGrads], means: bool) -> None:
    """Raise TypeError, naming the parameter, where a gradient has no rows that a rule could look at."""
    joined = [name for name, layout in zip(plan.names, plan.layouts, strict=True) if layout.joined]
    if joined:
        raise TypeError(f"{joined[0]} is declared joined=True: nobody knows its rows, which this rule looks at")
    for local in grads.values():
        if local.sparse:
            raise TypeError(f"the gradient of {local.sparse[0]} is sparse: this rule looks at the rows of dense ones")
        for piece, place in zip(local.pieces, local.places, strict=True):
            if means and piece.is_complex():
                raise TypeError(f"the gradient of {plan.tensors[place]} is complex: this rule takes means of real ones")


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
