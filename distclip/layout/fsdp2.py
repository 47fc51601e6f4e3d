"""FSDP2 (``fully_shard``, and ``replicate`` in its DTensor form): DTensors whose gradients may not be reduced yet."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from distclip.layout import dtensor
from distclip.layout.base import GradLayout


def teach(root: nn.Module) -> Iterator[tuple[Tensor, GradLayout]]:
    if "torch.distributed.fsdp" not in sys.modules:
        return
    for module in root.modules():
        for group in _param_groups(module):
            guard = partial(_check_reduced, weakref.ref(group))
            for fsdp_param in group.fsdp_params:
                param = fsdp_param.sharded_param
                layout = dtensor.resolve(param)
                assert layout is not None
                yield param, replace(layout, guard=guard)


def sharded_parameters(root: nn.Module) -> dict[int, Tensor]:
    """By id of an unsharded parameter, which modules may hold still after backward, the one with the gradient."""
    if "torch.distributed.fsdp" not in sys.modules:
        return {}
    params = (param for module in root.modules() for group in _param_groups(module) for param in group.fsdp_params)
    return {id(p._unsharded_param): p.sharded_param for p in params if getattr(p, "_unsharded_param", None) is not None}


def _param_groups(module: nn.Module) -> list[Any]:
    from torch.distributed._composable_state import _get_module_state
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    state = _get_module_state(module)
    if not isinstance(state, FSDPState):
        return []
    # torch up to 2.11 has one group per module, later ones a list.
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group] if state._fsdp_param_group else []
    return list(groups)


def _holds_unsharded(fsdp_param: Any) -> bool:
    # The unsharded parameter is made at the first forward.
    unsharded = getattr(fsdp_param, "_unsharded_param", None)
    return fsdp_param.unsharded_accumulated_grad is not None or (unsharded is not None and unsharded.grad is not None)


def _check_reduced(group_ref: weakref.ref[Any]) -> None:
    group = group_ref()
    if group is None:
        return
    if group._partial_reduce_output is not None or any(map(_holds_unsharded, group.fsdp_params)):
        raise RuntimeError(
            "FSDP2 still holds gradients that are not reduced over the ranks: clip() ran between accumulation steps. "
            "Call set_requires_gradient_sync(True) (and set_requires_all_reduce(True) under HSDP) before the last "
            "micro-batch, and clip after its backward()."
        )
