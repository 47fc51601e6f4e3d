"""DistributedDataParallel: plain tensors whose gradients DDP has averaged, so every replica holds the same ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distclip.layout.base import GradLayout, Piece, RankGroup
from distclip.warning import warn


def teach(root: nn.Module) -> Iterator[tuple[Tensor, GradLayout]]:
    for module in root.modules():
        if isinstance(module, DistributedDataParallel):
            replicas = (RankGroup.of(module.process_group),)
            guard = partial(_warn_if_not_averaged, weakref.ref(module))
            for name, param in module.module.named_parameters():
                if name in module.parameters_to_ignore:
                    continue
                yield param, GradLayout("DDP", (Piece(param.shape),), replicated=replicas, guard=guard)


def _warn_if_not_averaged(module: weakref.ref[DistributedDataParallel]) -> None:
    ddp = module()
    # forward() clears require_forward_param_sync when it ran under no_sync(): the backward that followed kept its
    # gradients to itself.
    if ddp is not None and not (ddp.require_backward_grad_sync and ddp.require_forward_param_sync):
        warn(
            "DDP has not averaged these gradients over the ranks: the last forward ran under no_sync() or no_grad(). "
            "Norm and clipping differ from rank to rank. Clip after the last micro-batch, whose forward and backward "
            "run outside no_sync().",
        )
