"""DeepSpeed's PipelineEngine: which ranks hold the stages, and which weights these share.

``train_batch()`` ends in the same method as ``step()``, so that all else is as for other engines. Only two things are
of the pipeline alone: the norm goes over all stages, and a weight that a ``TiedLayerSpec`` puts on several of them,
whose gradients DeepSpeed adds up before the step, counts once.

DeepSpeed 0.19.8 itself does so with ZeRO 1 and with bf16. With float32 at stage 0 its ``gradient_clipping`` lets steps
be too long (two stages: by 17 to 25 %), and with float16 there a tied weight counts on every stage.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from typing import Any

import torch.distributed as dist
from torch import Tensor

from distclip.declare import declare
from distclip.layout import learn
from distclip.layout.declared import Group, as_rank_group, declared_of


def is_pipeline(engine: object) -> bool:
    """Whether the engine is one that ``deepspeed.initialize`` made of a PipelineModule."""
    module = sys.modules.get("deepspeed.runtime.pipe.engine")
    return module is not None and isinstance(engine, module.PipelineEngine)


def stages_of(engine: Any, given: Group | None) -> Group | None:
    """The ranks that hold the stages of the pipeline that this rank is in; of another engine, what was ``given``.

    Raises:
        ValueError: ``given`` are other ranks.
    """
    if not is_pipeline(engine):
        return given
    own: dist.ProcessGroup = engine.grid.get_pipe_parallel_group()
    asked, known = as_rank_group("pipeline_group", given), as_rank_group("pipeline_group", own)
    if given is not None and asked != known:
        raise ValueError(
            f"pipeline_group has ranks {asked.ranks if asked else 'of one process'}, but the stages of this "
            f"PipelineEngine lie on ranks {tuple(dist.get_process_group_ranks(own))}: leave pipeline_group out"
        )
    return own


def declare_ties(engine: Any) -> None:
    """Let the weights that stages share count once. The same on every stage that has them; local."""
    if not is_pipeline(engine):
        return
    learn(engine)
    tied: dict[dist.ProcessGroup, list[Tensor]] = defaultdict(list)
    for weight, group in engine.module.get_tied_weights_and_groups():
        # One that the user has declared keeps what was said; a group of one rank ties nothing.
        if declared_of(weight) is None and dist.get_world_size(group) > 1:
            tied[group].append(weight)
    for group, weights in tied.items():
        declare(weights, replicated=group)


def refused(engine: Any) -> dict[str, bool]:
    """Ways of working that are not known to be right, and whether this engine works so."""
    if not is_pipeline(engine):
        return {}
    low = type(engine.optimizer).__name__ in ("FP16_Optimizer", "FP16_UnfusedOptimizer")
    return {
        "tensor parallel stages (an axis 'model' in the PipelineModule's topology)": engine.grid.model_parallel_size
        > 1,
        "pipeline stages in float16 at stage 0, whose loss only the last stage scales: set zero_optimization.stage to "
        "1": low,
        "pipeline stages under torch_autocast in float16, whose scaler knows its own stage alone": (
            engine.torch_autocast_z0_gradscaler is not None
        ),
    }
