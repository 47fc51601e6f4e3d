"""What PyTorch cannot know and the user declares: plain tensors that differ from rank to rank, or that are tied."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distclip.hints import shown
from distclip.layout.base import GradLayout, RankGroup
from distclip.layout.memory import Memory

Group = dist.ProcessGroup | DeviceMesh


@dataclass(frozen=True)
class Declaration:
    """What a user said of one parameter. Groups are compared by their ranks."""

    sharded: RankGroup | None = None
    replicated: RankGroup | None = None
    joined: bool = False
    tie: int | None = None


_declared: Memory[Declaration] = Memory()
_version = 0


def version() -> int:
    """Counts the changes of what is declared."""
    return _version


def record(tensors: Iterable[Tensor], sharded: RankGroup | None, replicated: RankGroup | None, joined: bool) -> None:
    """Keep a declaration for as long as its parameters live."""
    global _version
    _version += 1
    tied = [d.tie for d in _declared.values() if d.tie is not None and d.replicated == replicated]
    first = max(tied, default=-1) + 1
    for place, tensor in enumerate(tensors):
        tie = None if replicated is None else first + place
        _declared[tensor] = Declaration(sharded, replicated, joined, tie)


def forget(tensors: Iterable[Tensor]) -> None:
    global _version
    for tensor in tensors:
        if _declared.pop(tensor) is not None:
            _version += 1


def declared_of(param: Tensor) -> Declaration | None:
    return _declared.get(param)


def carry_over(old: Tensor, new: Tensor) -> None:
    """Let what was declared of a parameter hold of the one that took its place, unless that has its own."""
    global _version
    declaration = declared_of(old)
    if declaration is not None and declared_of(new) is None:
        _declared[new] = declaration
        _version += 1


def apply(param: Tensor, layout: GradLayout) -> GradLayout:
    """``layout`` and what was declared of its parameter besides.

    Raises:
        ValueError: the declaration contradicts the layout.
    """
    declaration = declared_of(param)
    if declaration is None:
        return layout
    check(layout, declaration.sharded, declaration.replicated)
    if declaration.sharded is not None:
        if declaration.joined:
            layout = replace(layout, sharded=(*layout.sharded, declaration.sharded), joined=True)
        else:
            layout = replace(layout, apart=(*layout.apart, declaration.sharded))
    if declaration.replicated is not None:
        layout = replace(layout, replicated=(*layout.replicated, declaration.replicated), tie=declaration.tie)
    named = [group for group in (declaration.sharded, declaration.replicated) if group is not None]
    return replace(layout, groups=(*layout.groups, *named))


def check(layout: GradLayout, sharded: RankGroup | None, replicated: RankGroup | None) -> None:
    """Raise ValueError where a declaration contradicts what the parameter's own system knows."""
    for group, said, other, otherwise in (
        (sharded, "sharded", layout.replicated, "holds the same piece on those ranks"),
        (sharded, "sharded", layout.sharded, "shards it over those ranks itself"),
        (replicated, "replicated", layout.sharded, "shards it over those ranks"),
    ):
        if group is not None and group in other:
            raise ValueError(
                f"declare({said}=ranks {group.ranks}) contradicts the parameter's layout: {layout.system} {otherwise}. "
                "Declare only what no wrapper and no DeviceMesh shows."
            )


def as_rank_group(name: str, group: object) -> RankGroup | None:
    """A ProcessGroup or a 1-D DeviceMesh as a RankGroup; None where it has a single rank, or none was given.

    Raises:
        TypeError: ``group`` is neither.
        ValueError: a mesh of more dimensions, or a group that the calling rank is not in.
    """
    if group is None:
        return None
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"{name} must be a ProcessGroup or a 1-D DeviceMesh, got a mesh of shape {tuple(group.mesh.shape)}: "
                f"take one axis of it, mesh[{(group.mesh_dim_names or ('axis',))[0]!r}]"
            )
        if group.get_coordinate() is None:
            raise ValueError(f"{name}: rank {dist.get_rank()} is not in {group}")
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        if (
            isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER
        ):  # what new_group returns to ranks outside
            raise ValueError(f"{name}: rank {dist.get_rank()} is not in the group; pass None there")
        raise TypeError(
            f"{name} must be a ProcessGroup or a 1-D DeviceMesh, got {type(group).__name__}: {shown(group, 80)}"
        )
    found = RankGroup.of(group)
    return found if len(found.ranks) > 1 else None
