"""DTensor parameters: FSDP2, HSDP, the ``replicate`` that makes DTensors, and whatever else distributes tensors.

The parameter's own mesh is asked, never that of an operation's result: DTensor's sharding cache can hand back an
equal-looking mesh whose process groups are others.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from distclip.layout.base import GradLayout, Piece, RankGroup

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    # Nobody can hold a DTensor whose module is not imported, and importing it costs half a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def resolve(param: Tensor) -> GradLayout | None:
    return laid_out(param, kinds(param)) if is_dtensor(param) else None


def kinds(tensor: DTensor) -> str:
    """One letter per mesh axis: R(eplicate), P(artial), A (Partial whose parts are averaged) or S(hard).

    Raises:
        NotImplementedError: the tensor is Partial under another operation than a sum or an average.
    """
    letters = []
    for axis, placement in enumerate(tensor.placements):
        if tensor.device_mesh.size(axis) == 1:
            letters.append("R")  # nothing is cut or left to sum along it
        elif placement.is_partial():
            operation = placement.reduce_op  # type: ignore[attr-defined]
            if operation not in ("sum", "avg"):
                raise NotImplementedError(f"a gradient that is Partial({operation!r}) is no sum of its parts")
            letters.append("P" if operation == "sum" else "A")
        else:
            # _StridedShard (FSDP2 x TP) answers False to is_shard(): what is not replicated is cut.
            letters.append("R" if placement.is_replicate() else "S")
    return "".join(letters)


def encoded(letters: str) -> int:
    """``letters`` as a number above 0."""
    return int("".join(str(1 + "RSPA".index(letter)) for letter in letters))


def decoded(number: int) -> str | None:
    """What ``encoded`` made a number of; None of 0."""
    return "".join("RSPA"[int(digit) - 1] for digit in str(number)) if number else None


def reduced(param: DTensor, letters: str) -> Tensor:
    """``param``'s gradient, placed as ``letters`` say, in the placements of ``param``; zeros where it has none."""
    grad = param.grad
    if grad is None:
        from torch.distributed.tensor import DTensor, Partial, Replicate
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        other = {"R": Replicate(), "P": Partial("sum"), "A": Partial("avg")}
        mesh = param.device_mesh
        placements = [other.get(letter, own) for letter, own in zip(letters, param.placements, strict=True)]
        shape, _ = compute_local_shape_and_global_offset(param.shape, mesh, placements)
        local = param._local_tensor.new_zeros(shape)
        grad = DTensor.from_local(local, mesh, placements, shape=param.shape, stride=param.stride())
    assert is_dtensor(grad)
    return grad.redistribute(placements=param.placements)


def row_index(tensor: DTensor) -> Tensor | None:
    """Which rows (along dim 0) of the whole tensor are in this rank's part; None where all are.

    Raises:
        NotImplementedError: they cannot be told.
    """
    mesh, local = tensor.device_mesh, tensor._local_tensor
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    rows = torch.arange(tensor.shape[0])
    for axis, placement in enumerate(tensor.placements):
        # _StridedShard too has a dim, and its own way of splitting.
        if mesh.size(axis) > 1 and getattr(placement, "dim", None) == 0:
            parts, _ = placement._split_tensor(  # type: ignore[attr-defined]
                rows, mesh.size(axis), with_padding=False, contiguous=False
            )
            rows = parts[coordinate[axis]]
    if len(rows) == tensor.shape[0]:
        return None
    if len(rows) != local.shape[0]:
        raise NotImplementedError(
            f"a tensor of shape {tuple(tensor.shape)} is placed {tensor.placements} on a mesh of {tuple(mesh.shape)}, "
            f"and this rank has {local.shape[0]} rows of it where {len(rows)} were expected: rules of rows cannot serve"
        )
    return rows


def laid_out(param: DTensor, letters: str) -> GradLayout:
    """The layout of a gradient on ``param``'s mesh, placed as ``letters`` (see ``kinds``) say."""
    mesh = param.device_mesh
    if mesh.get_coordinate() is None:
        return GradLayout("DTensor", ())
    axes = [(letter, axis) for axis, letter in enumerate(letters) if mesh.size(axis) > 1]
    found = [(letter, RankGroup.of(mesh.get_group(axis))) for letter, axis in axes]
    return GradLayout(
        "DTensor",
        (Piece(param.shape),),
        sharded=tuple(group for letter, group in found if letter == "S"),
        replicated=tuple(group for letter, group in found if letter == "R"),
        partial=tuple(group for letter, group in found if letter in "PA"),
        partial_scale=1.0 / math.prod(len(group.ranks) for letter, group in found if letter == "A"),
        letters=letters,
        groups=tuple(group for _, group in found),
    )
