"""``declare``: what only the user knows of a parameter's layout."""

from __future__ import annotations

from distclip import layout
from distclip.layout import declared
from distclip.layout.declared import Group, as_rank_group
from distclip.parameters import Parameters, split


def declare(
    parameters: Parameters, *, sharded: Group | None = None, replicated: Group | None = None, joined: bool = False
) -> None:
    """Tell distclip how parameters lie that no wrapper and no DTensor describes. Local: no communication.

    Holds for as long as the parameters live: copies are not declared, nor are parameters that take their place
    (``load_state_dict(assign=True)``, ``fully_shard``) unless a GradClipper sees the exchange. Call it on every rank of
    the group, before the first clip of the model (a later call makes the next clip agree anew).

    Args:
        parameters: a module (or several), a tensor, or an iterable of tensors.
        sharded: the ranks of this group (or 1-D mesh) hold different tensors under these names, as experts do.
        replicated: the ranks of this group hold the same tensor, each perhaps under a name of its own, as pipeline
            stages do that share an embedding. It counts once. Declare several in the same order on all stages.
        joined: with ``sharded``, the tensors are pieces of one (Megatron-style shards), so that its norm per tensor is
            that of all pieces together; by default each is a tensor by itself.

    Raises:
        ValueError: neither or both of the groups with the same ranks; a contradiction to what a wrapper or DeviceMesh
            shows, or to an earlier declaration; a group that the calling rank is not in.
        TypeError: ``parameters`` or a group is of another type.

    Example:
        ``declare(model.experts, sharded=expert_group)``, ``declare(model.embed.weight, replicated=embedding_group)``
    """
    groups = as_rank_group("sharded", sharded), as_rank_group("replicated", replicated)
    if sharded is None and replicated is None:
        raise ValueError("declare() needs sharded= or replicated=, got neither")
    if joined and sharded is None:
        raise ValueError("joined=True tells how sharded= is meant, got no sharded=")
    if groups[0] is not None and groups[0] == groups[1]:
        raise ValueError(
            f"sharded= and replicated= name the same ranks {groups[0].ranks}: a tensor is one or the other"
        )
    _, tensors = split(parameters)
    for tensor in tensors:
        known = declared.declared_of(tensor)
        if known is not None and (known.sharded, known.replicated, known.joined) != (*groups, joined):
            raise ValueError(
                f"a parameter of shape {tuple(tensor.shape)} is declared otherwise already ({known}): call "
                "undeclare() on it first"
            )
        declared.check(layout.own_layout_of(tensor), *groups)
    new = [tensor for tensor in tensors if declared.declared_of(tensor) is None]
    if new:
        declared.record(new, *groups, joined)


def undeclare(parameters: Parameters) -> None:
    """Take back what ``declare`` said of these parameters; nothing happens to those never declared."""
    declared.forget(split(parameters)[1])
