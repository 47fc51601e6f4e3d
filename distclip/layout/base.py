"""What distclip knows of where a gradient lives.

Why replicas and shards count differently. Let P be the ranks that take part in a clip. A parameter's gradient is cut
into distinct pieces along its *sharded* groups; every other axis of P repeats them. With D = the product of the sharded
groups' sizes, each piece is held by |P| / D ranks. Each rank therefore adds ``sum(|g|**p) * D / |P|`` of its own
piece, and one SUM over P counts every element of the model exactly once, whatever mixture of groups the parameters of
one model live on. (Reducing over one group after another instead counts a tensor once more for each group that does not
shard it.) Everything above this package is written against that one answer and never names a parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class RankGroup:
    """Some ranks of the job, and the process group over which they talk. Equal where the ranks are equal."""

    ranks: tuple[int, ...]
    """Global ranks, ascending; the calling rank is one of them."""
    group: dist.ProcessGroup = field(compare=False, repr=False)

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> RankGroup:
        return cls(tuple(sorted(dist.get_process_group_ranks(group))), group)


@dataclass(frozen=True)
class Piece:
    """The part of one tensor of the model that lies in this rank's local gradient."""

    shape: torch.Size
    """Shape of the whole tensor, as one process would hold it."""
    name: str | None = None
    """Name of the tensor, relative to its parameter's module, where a parameter packs several tensors (FSDP1)."""
    span: tuple[int, int] | None = None
    """Offset and length in the flattened local gradient; None where the local gradient is this piece alone."""


@dataclass(frozen=True)
class GradLayout:
    """Where one parameter's gradient lives. Holds no reference to the parameter, so that it may be kept by it."""

    system: str
    """Who laid it out, in the words of PyTorch: ``plain``, ``DDP``, ``FSDP1``, ``DTensor`` ..."""
    pieces: tuple[Piece, ...]
    sharded: tuple[RankGroup, ...] = ()
    """Groups along which the pieces are distinct."""
    replicated: tuple[RankGroup, ...] = ()
    """Groups whose ranks hold the same piece."""
    guard: Callable[[], None] | None = field(default=None, compare=False, repr=False)
    """Raises or warns where the gradients are not reduced over the ranks yet (inside ``no_sync``, say)."""

    @property
    def distinct(self) -> int:
        """Number of distinct pieces into which the sharded groups cut the gradient."""
        return math.prod(len(group.ranks) for group in self.sharded)

    @property
    def groups(self) -> tuple[RankGroup, ...]:
        """Groups that take part in a clip. Where nothing is sharded the replicas agree already: none."""
        return (*self.sharded, *self.replicated) if self.distinct > 1 else ()


@dataclass(frozen=True)
class Resolver:
    """One system's knowledge, in a file of its own: either function, or both."""

    teach: Callable[[nn.Module], Iterable[tuple[Tensor, GradLayout]]] = lambda _: ()
    """The layouts that only the modules below a root can tell (a wrapper's process group, its flat parameters)."""
    resolve: Callable[[Tensor], GradLayout | None] = lambda _: None
    """The layout that the parameter itself tells; None if it is not this system's."""
