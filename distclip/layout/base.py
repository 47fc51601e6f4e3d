"""What distclip knows of where a gradient lives.

Why replicas and shards count differently. Let P be the ranks that take part in a clip. A tensor's gradient is cut into
D distinct pieces along its *sharded* groups, and n of the ranks of P have a piece of it; so each piece is held by n / D
ranks. Each rank adds ``sum(|g|**p) * D / n`` of its own piece, and one SUM over P counts every element of the model
exactly once, whatever mixture of groups the parameters of one model live on. (Reducing over one group after another
instead counts a tensor once more for each group that does not shard it.) Which ranks have a piece of the same tensor is
agreed when the plan is built: tensors of one name are one tensor, unless they lie *apart*, on the stages of a pipeline
or declared as experts are. Everything above this package is written against that one answer and never names a
parallelism.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_ranks_of: weakref.WeakKeyDictionary[dist.ProcessGroup, tuple[int, ...]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class RankGroup:
    """Some ranks of the job, and the process group over which they talk. Equal where the ranks are equal."""

    ranks: tuple[int, ...]
    """Global ranks, ascending; the calling rank is one of them."""
    group: dist.ProcessGroup = field(compare=False, repr=False)

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> RankGroup:
        """The ranks of ``group``, which the calling rank belongs to."""
        # Listing a thousand ranks anew for each of a thousand parameters takes longer than all else of a plan.
        if group not in _ranks_of:
            _ranks_of[group] = tuple(sorted(dist.get_process_group_ranks(group)))
        return cls(_ranks_of[group], group)

    def __deepcopy__(self, memo: Any) -> RankGroup:
        return self  # torch cannot copy a process group, and a copied clipper talks to the same ranks

    def order(self, rank: int) -> int:
        """The place of a global rank in the group, in the group's own order."""
        return dist.get_group_rank(self.group, rank)


@dataclass(frozen=True)
class Piece:
    """The part of one tensor of the model that lies in this rank's local gradient."""

    shape: torch.Size
    """Shape of the whole tensor, as one process would hold it."""
    name: str | None = None
    """Name of the tensor, relative to its parameter's module, where a parameter packs several tensors (FSDP1)."""
    span: tuple[int, int] | None = None
    """Offset and length in the flattened local gradient; None where the local gradient is this piece alone."""
    start: int = 0
    """Where a piece that is flat begins in the flattened tensor (what is cut as a matrix tells its rows by itself)."""


@dataclass(frozen=True)
class GradLayout:
    """Where one parameter's gradient lives. Holds no reference to the parameter, so that it may be kept by it."""

    system: str
    """Who laid it out, in the words of PyTorch: ``plain``, ``DDP``, ``FSDP1``, ``DTensor`` ..."""
    pieces: tuple[Piece, ...]
    sharded: tuple[RankGroup, ...] = ()
    """Groups along which the gradient is cut into distinct pieces."""
    replicated: tuple[RankGroup, ...] = ()
    """Groups whose ranks hold the same piece."""
    partial: tuple[RankGroup, ...] = ()
    """Groups over which the gradient is still to be summed (a DTensor's Partial)."""
    partial_scale: float = 1.0
    """Factor that turns that sum into the gradient (Partial parts may be meant to be averaged)."""
    letters: str | None = None
    """For a DTensor, how its gradient is placed on each axis of its mesh (see ``dtensor.kinds``)."""
    as_parameter: bool = True
    """Whether that is how the parameter is placed."""
    apart: tuple[RankGroup, ...] = ()
    """Groups whose ranks hold different tensors under the same name (plain experts)."""
    groups: tuple[RankGroup, ...] = ()
    """Those of the above that connect ranks which take part in one norm. DDP's replicas agree already: none."""
    joined: bool = False
    """Whether the pieces are one tensor by declaration alone, so that nobody knows its whole shape."""
    tie: int | None = None
    """Ordinal among the tensors declared replicated: such a tensor may bear another name on each stage."""
    local: Callable[[], Tensor | None] | None = field(default=None, compare=False, repr=False)
    """Finds this rank's part of the gradient where its system keeps it; None where that is ``.grad``."""
    weights: Callable[[Tensor], Tensor | None] | None = field(default=None, compare=False, repr=False)
    """Finds in the parameter what of it belongs to this rank's part of the gradient; None where that is all of it."""
    guard: Callable[[], None] | None = field(default=None, compare=False, repr=False)
    """Raises or warns where the gradients are not reduced over the ranks yet (inside ``no_sync``, say)."""

    @property
    def distinct(self) -> int:
        """Number of distinct pieces into which the sharded groups cut the gradient."""
        return math.prod(len(group.ranks) for group in self.sharded)

    @property
    def needs_reduction(self) -> bool:
        """Whether a rank's own gradient is not all of it."""
        return self.distinct > 1 or bool(self.partial or self.apart)


@dataclass(frozen=True)
class Resolver:
    """One system's knowledge, in a file of its own: either function, or both."""

    teach: Callable[[nn.Module], Iterable[tuple[Tensor, GradLayout]]] = lambda _: ()
    """The layouts that only the modules below a root can tell (a wrapper's process group, its flat parameters)."""
    resolve: Callable[[Tensor], GradLayout | None] = lambda _: None
    """The layout that the parameter itself tells; None if it is not this system's."""
