"""What a way of spreading a model hands to the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from options import Options

if TYPE_CHECKING:
    from pipeline import Pipeline


@dataclass(frozen=True)
class Place:
    """Every batch is cut into `count` parts, and this rank reads the one of number `index`."""

    index: int
    count: int


@dataclass(frozen=True)
class Spread:
    """A model spread over the ranks: what this rank holds, and what it shares with whom."""

    model: nn.Module
    """This rank's model, wrapped. Its parameters have the names that they have in the whole model."""
    pipeline: Pipeline | None = None
    """How to train it if `model` is one stage of a pipeline."""
    experts: Sequence[nn.Parameter] = ()
    """Plain tensors that no other rank holds, ..."""
    expert_group: dist.ProcessGroup | None = None
    """... and the ranks that hold the others."""
    engine: Any = None
    """A DeepSpeed engine, if that steps by itself."""

    @property
    def pipeline_group(self) -> dist.ProcessGroup | None:
        """One rank of each stage, this one included."""
        return self.pipeline.group if self.pipeline else None


def make_optimizer(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """SGD with momentum on all parameters of this rank.

    Not Adam: it divides by the gradients' own size, so clipping, right or wrong, would hardly show. Not foreach: under
    tensor parallelism the parameters lie on several meshes, which torch's foreach refuses.
    """
    return torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9, foreach=False)


def require_transformer(options: Options) -> None:
    """Raise ValueError for a model that has no blocks to cut."""
    if options.model != "transformer":
        raise ValueError(f"--parallel {options.parallel} goes with --model transformer, got --model {options.model}")
