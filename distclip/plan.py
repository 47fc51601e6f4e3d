"""The shared plan: what follows from the parameters alone, whichever gradients happen to exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distclip.kernels.common import WIDE
from distclip.layout import GradLayout, layout_of
from distclip.participants import Participants, connect


@dataclass(frozen=True)
class Plan:
    """The same order and sizes on every participant. Holds no reference to the parameters."""

    names: tuple[str, ...]
    """The parameters."""
    layouts: tuple[GradLayout, ...]
    tensors: tuple[str, ...]
    """The model's tensors: more than parameters where one of these packs several (FSDP1)."""
    shares: Tensor
    """For each tensor, one over the number of participants that hold the same piece of it as this rank; float64."""
    participants: Participants
    guards: frozenset[Callable[[], None]]
    """Each raises, or warns, where a wrapper has not reduced its gradients over the ranks yet."""
    device: torch.device
    """Where norms are returned if this rank has no gradient."""
    float64: bool
    """Whether every parameter is float64, and so are the norms."""
    wide: bool
    """Whether any is, so that the powers of its gradients may leave float64."""


def make_plan(names: Sequence[str], params: Sequence[Tensor]) -> Plan:
    """Build the plan. Collective over the groups that the layouts name (see ``participants.connect``).

    Raises:
        RuntimeError: a parameter's layout cannot be known, or its groups do not divide the participants evenly.
    """
    layouts = tuple(layout_of(param) for param in params)
    device = params[0].device if params else torch.device("cpu")
    participants = connect((group for layout in layouts for group in layout.groups), device)
    wide = [param.dtype in WIDE for param in params]
    tensors, shares = [], []
    for name, layout in zip(names, layouts, strict=True):
        share = _share(name, layout, participants)
        for piece in layout.pieces:
            tensors.append(name if piece.name is None else _sibling(name, piece.name))
            shares.append(share)
    return Plan(
        names=tuple(names),
        layouts=layouts,
        tensors=tuple(tensors),
        shares=torch.tensor(shares, dtype=torch.float64),
        participants=participants,
        guards=frozenset(layout.guard for layout in layouts if layout.guard is not None),
        device=device,
        float64=bool(wide) and all(wide),
        wide=any(wide),
    )


def _share(name: str, layout: GradLayout, participants: Participants) -> float:
    if len(participants) == 1:
        return 1.0
    if len(participants) % layout.distinct:
        raise RuntimeError(
            f"{name} is cut into {layout.distinct} pieces over ranks {[group.ranks for group in layout.sharded]}, "
            f"which the ranks that take part in this clip, {participants.ranks}, cannot hold equally often. Clip "
            "models on unrelated groups separately."
        )
    return layout.distinct / len(participants)


def _sibling(name: str, other: str) -> str:
    """``other`` in place of the last component of ``name``."""
    parent, _, _ = name.rpartition(".")
    return f"{parent}.{other}" if parent else other
