"""What a way of spreading a model hands to the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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

    @property
    def pipeline_group(self) -> dist.ProcessGroup | None:
        """One rank of each stage, this one included."""
        return self.pipeline.group if self.pipeline else None


def require_transformer(options: Options) -> None:
    """Raise ValueError for a model that has no blocks to cut."""
    if options.model != "transformer":
        raise ValueError(f"--parallel {options.parallel} goes with --model transformer, got --model {options.model}")
