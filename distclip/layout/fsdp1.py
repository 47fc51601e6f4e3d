"""FullyShardedDataParallel (FSDP1): flat parameters, each a row of tensors laid end to end and cut over the ranks.

The parameters do not know their process group, only the wrapper does. A module that distclip has seen once teaches it;
parameters of a wrapper never seen are an error, because their norm would be this rank's share alone.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from distclip.layout.base import GradLayout, Piece, RankGroup

if TYPE_CHECKING:
    from torch.distributed.fsdp import FullyShardedDataParallel


class NeverSeen(RuntimeError):
    """Parameters of a wrapper that distclip does not know."""


def teach(root: nn.Module) -> Iterator[tuple[Tensor, GradLayout]]:
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None:
        return
    for wrapper in root.modules():
        if isinstance(wrapper, module.FullyShardedDataParallel) and wrapper._handle is not None:
            yield from _layouts(wrapper, wrapper._handle)


def resolve(param: Tensor) -> GradLayout | None:
    # FSDP1 marks its flat parameters and, under use_orig_params, the original ones.
    if getattr(param, "_fsdp_flattened", False):
        raise NeverSeen(
            "a parameter belongs to a FullyShardedDataParallel model that distclip has never seen, so this rank "
            "cannot know who holds the rest of its gradient. Pass the model instead of its parameters, once is "
            "enough: distclip.clip_grad_norm_(model, ...) or distclip.GradClipper(model)."
        )
    return None


def _layouts(wrapper: FullyShardedDataParallel, handle: Any) -> Iterator[tuple[Tensor, GradLayout]]:
    flat_param = handle.flat_param
    ranks = (RankGroup.of(handle.process_group),)
    nodes = (RankGroup.of(wrapper._inter_node_pg),) if getattr(wrapper, "_inter_node_pg", None) is not None else ()
    sharded, replicated = (ranks, nodes) if handle.uses_sharded_strategy else ((), ranks + nodes)
    guard = partial(_check_reduced, weakref.ref(wrapper), weakref.ref(handle))
    # Under NO_SHARD gradients are averaged as DDP does it: nobody needs to be asked.
    groups = sharded + replicated if sharded else ()
    layout = GradLayout("FSDP1", (), sharded, replicated, groups=groups, guard=guard)
    if flat_param._params is None:
        yield flat_param, replace(layout, pieces=tuple(_flat_pieces(flat_param)))
        return
    columns = (flat_param._params, flat_param._shapes, flat_param._shard_param_infos)
    for param, shape, info in zip(*columns, strict=True):
        yield param, replace(layout, pieces=(Piece(shape, start=info.intra_param_start_idx or 0),))


def _flat_pieces(flat_param: Any) -> Iterator[Piece]:
    """One piece a tensor, those of which this rank holds nothing included: every rank must list the same tensors."""
    columns = (flat_param._fqns, flat_param._shapes, flat_param._shard_param_infos)
    for name, shape, info in zip(*columns, strict=True):
        span = (info.offset_in_shard, info.numel_in_shard) if info.in_shard else (0, 0)
        yield Piece(shape, name, span, info.intra_param_start_idx or 0)


def _check_reduced(
    wrapper_ref: weakref.ref[FullyShardedDataParallel],
    handle_ref: weakref.ref[Any],
) -> None:
    wrapper, handle = wrapper_ref(), handle_ref()
    if wrapper is None or handle is None:
        return
    grad = handle.flat_param.grad
    unsharded = handle.uses_sharded_strategy and grad is not None and grad.size() != handle.flat_param._sharded_size
    if unsharded or not wrapper._sync_gradients:
        raise RuntimeError(
            "FSDP1 has not reduced these gradients over the ranks: clip() ran under no_sync() or between accumulation "
            "steps. Run the last micro-batch outside no_sync(), and clip after its backward()."
        )
