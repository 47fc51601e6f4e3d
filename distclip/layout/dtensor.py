"""DTensor parameters: FSDP2, HSDP, the ``replicate`` that makes DTensors, and whatever else distributes tensors.

The parameter's own mesh is asked, never that of an operation's result: DTensor's sharding cache can hand back an
equal-looking mesh whose process groups are others.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

from distclip.layout.base import GradLayout, Piece, RankGroup

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    # Nobody can hold a DTensor whose module is not imported, and importing it costs half a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def resolve(param: Tensor) -> GradLayout | None:
    if not is_dtensor(param):
        return None
    sharded: list[RankGroup] = []
    replicated: list[RankGroup] = []
    for axis, placement in enumerate(param.placements):
        if param.device_mesh.size(axis) > 1:
            group = RankGroup.of(param.device_mesh.get_group(axis))
            # _StridedShard (FSDP2 x TP) answers False to is_shard(): what is not replicated is cut.
            (replicated if placement.is_replicate() else sharded).append(group)
    return GradLayout("DTensor", (Piece(param.shape),), tuple(sharded), tuple(replicated))
