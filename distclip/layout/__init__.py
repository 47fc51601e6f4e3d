"""Where each gradient lives: one answer per parameter, whatever laid it out.

A new system is a new file with ``teach`` or ``resolve``, and a line in RESOLVERS.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from operator import attrgetter

from torch import Tensor, nn

from distclip.layout import ddp, declared, dtensor, fsdp1, fsdp2, plain, zero
from distclip.layout.base import GradLayout, Piece, RankGroup, Resolver
from distclip.layout.memory import Memory

__all__ = ["GradLayout", "Piece", "RankGroup", "layout_of", "learn", "own_layout_of", "traits"]

# The first to answer is believed: the systems that cut a tensor before those that only replicate it.
RESOLVERS = (
    Resolver(teach=zero.teach, resolve=zero.resolve),
    Resolver(teach=fsdp1.teach, resolve=fsdp1.resolve),
    Resolver(teach=fsdp2.teach),
    Resolver(resolve=dtensor.resolve),
    Resolver(teach=ddp.teach),
    Resolver(resolve=plain.resolve),
)

_DTYPE = attrgetter("dtype")
# What modules taught, for as long as their parameters live. By resolver, so that a wrapper put on later wins over what
# was learned of the same parameters before.
_learned: list[Memory[GradLayout]] = [Memory() for _ in RESOLVERS]


def learn(root: nn.Module) -> None:
    """Remember what the modules of ``root`` tell of their parameters."""
    for resolver, learned in zip(RESOLVERS, _learned, strict=True):
        for param, layout in resolver.teach(root):
            learned[param] = layout


def own_layout_of(param: Tensor) -> GradLayout:
    """The layout that a parameter's system gives it, whatever was declared besides.

    Raises:
        RuntimeError: the parameter belongs to a wrapper that distclip has never seen (FSDP1).
    """
    for resolver, learned in zip(RESOLVERS, _learned, strict=True):
        layout = learned.get(param) or resolver.resolve(param)
        if layout is not None:
            return layout
    raise AssertionError("the plain resolver answers for every tensor")


def layout_of(param: Tensor, kinds: str | None = None) -> GradLayout:
    """The layout of a parameter's gradient.

    Args:
        param: the parameter.
        kinds: for a DTensor, how the ranks agreed that its gradient is placed, where that is not as the parameter is.

    Raises:
        RuntimeError: as for ``own_layout_of``.
        ValueError: what was declared contradicts what its system knows.
    """
    layout = own_layout_of(param)
    if kinds is not None and dtensor.is_dtensor(param):
        # The guard is the wrapper's; all else the placement decides.
        layout = replace(dtensor.laid_out(param, kinds), guard=layout.guard, as_parameter=kinds == layout.letters)
    return declared.apply(param, layout)


def traits(params: Iterable[Tensor]) -> list[object]:
    """What of a parameter decides its layout and may change while it stays the same object: ``Module.to`` changes its
    dtype, FSDP1 takes it over."""
    known = list(params)
    # In C as far as it goes: every clip asks.
    return [*map(_DTYPE, known), *("_fsdp_flattened" in attributes for attributes in map(vars, known))]
