"""DeepSpeed: ZeRO's flat partitions, and the replicas and experts of every stage.

DeepSpeed takes gradients out of ``.grad`` as backward goes. Until its optimizer steps they are averaged, times the loss
scale, and lie

- stage 0: in ``.grad``, then for fp16 and bf16 in the float32 copies of the parameters;
- stages 1 and 2: in the optimizer's list of tensors that make up this rank's partition of a parameter group, then (with
  an offloaded optimizer: from the start) in the flat float32 partition;
- stage 1 with bf16 parameters and float32 accumulation, a pipeline's bf16 stages: whole on every rank, in a buffer;
- stage 3: as for 2, but each parameter is cut by itself, and groups are cut further into sub-groups. A parameter that a
  step does not use keeps there, in DeepSpeed 0.19.8, its gradient of the step before: the optimizer steps with it
  again, so it counts in the norm.

Which ranks have which part only the engine can tell. A module that distclip has seen once teaches it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distclip.layout.base import GradLayout, Piece, RankGroup

Local = Callable[[], Tensor | None]


class Home(NamedTuple):
    """Where an optimizer of DeepSpeed keeps the gradient of one parameter."""

    param: Tensor
    group: int
    """The group (stage 3: sub-group) of parameters that are stepped together."""
    partitioned: bool
    """Whether each replica keeps its own part only."""
    local: Local | None
    """Finds this rank's part; None where that is ``param.grad``. Holds no reference to the parameter."""
    start: int = 0
    """Where this rank's part begins in the flattened parameter."""
    weights: Callable[[Tensor], Tensor | None] | None = None
    """This rank's part of a parameter; None where that is the parameter itself."""


def is_engine(module: object) -> bool:
    """Whether it is what ``deepspeed.initialize`` returned."""
    engine = sys.modules.get("deepspeed.runtime.engine")
    return engine is not None and isinstance(module, engine.DeepSpeedEngine)


def teach(root: nn.Module) -> Iterator[tuple[Tensor, GradLayout]]:
    if is_engine(root):
        engine: Any = root
        found = {id(home.param): home for home in homes(engine.optimizer)}
        guard = partial(_check_unscaled, weakref.ref(engine))
        for param in engine.module.parameters():
            yield param, _layout(engine, param, found.get(id(param)), guard)


def resolve(param: Tensor) -> GradLayout | None:
    # ZeRO marks the parameters that it has partitioned (stage 3) or mapped to partitions.
    if hasattr(param, "ds_id") or hasattr(param, "_hp_mapping"):
        raise RuntimeError(
            "a parameter belongs to a DeepSpeed engine that distclip has never seen, so this rank cannot know where "
            "its gradient is. Let the engine clip: distclip.GradClipper(engine, rule)."
        )
    return None


def homes(optimizer: Any) -> Iterator[Home]:
    """Where the engine's optimizer keeps the gradients that it will step with.

    Raises:
        NotImplementedError: the optimizer is none whose ways are known here.
    """
    kind = type(optimizer).__name__
    if kind in _KEEPERS:
        yield from _KEEPERS[kind](optimizer, weakref.ref(optimizer))
    elif isinstance(optimizer, torch.optim.Optimizer):
        for group, params in enumerate(optimizer.param_groups):
            for param in params["params"]:
                yield Home(param, group, partitioned=False, local=None)
    elif kind not in ("NoneType", "DummyOptim"):
        raise NotImplementedError(
            f"this DeepSpeed engine steps with {kind}, whose gradients distclip cannot find. It knows torch optimizers "
            f"and {', '.join(_KEEPERS)}."
        )


def _in_partition(optimizer: Any, ref: weakref.ref[Any]) -> Iterator[Home]:
    """Stages 1 and 2: a partition is a list of tensors laid end to end; later a flat float32 one."""
    # Not by _hp_mapping: with round_robin_gradients DeepSpeed lays partitions in another order than it says there, and
    # it counts tensors without elements that the list may leave out.
    for group, params in enumerate(optimizer.bit16_groups):
        rank = dist.get_rank(optimizer.real_dp_process_group[group])
        starts = optimizer.grad_partition_insertion_offset[group][rank]
        skipped = optimizer.grad_start_offset[group][rank]
        places: dict[int, int] = {}
        for param in params:
            local: Local = _nothing
            start_in_param = numel = 0
            key = optimizer.get_param_id(param)
            if key in starts and param.numel():
                start, start_in_param = int(starts[key]), int(skipped[key])
                numel = int(min(param.numel() - start_in_param, optimizer.partition_size[group] - start))
                local = partial(_while_alive, ref, _part_1_2, group, places, start, numel)
            weights = partial(_span, start=start_in_param, numel=numel)
            yield Home(param, group, partitioned=True, local=local, start=start_in_param, weights=weights)


def _span(param: Tensor, start: int, numel: int) -> Tensor:
    return param.detach().reshape(-1).narrow(0, start, numel)


def _part_1_2(optimizer: Any, group: int, places: dict[int, int], start: int, numel: int) -> Tensor | None:
    """``places``, filled here, are those in the list by where tensors start in the partition; the same in each step."""
    parts: list[Tensor] | None = optimizer.averaged_gradients.get(group)
    if parts is not None:
        if not places:
            ends = accumulate((part.numel() for part in parts), initial=0)
            places |= {at: place for place, (at, part) in enumerate(zip(ends, parts, strict=False)) if part.numel()}
        return parts[places[start]]
    flat: Tensor | None = optimizer.single_partition_of_fp32_groups[group].grad
    return None if flat is None else flat.narrow(0, start, numel)


def _in_own_partition(optimizer: Any, ref: weakref.ref[Any]) -> Iterator[Home]:
    """Stage 3: as before, but each parameter is cut by itself, the last parts padded."""
    for group, params in enumerate(optimizer.fp16_groups):
        start = 0
        for index, param in enumerate(params):
            size = param.partition_numel()
            before = size * dist.get_rank(param.ds_process_group)
            numel = max(0, min(size, param.ds_numel - before))
            local = partial(_while_alive, ref, _part_3, group, index, start, numel)
            weights = partial(_partition, numel=numel)
            yield Home(param, group, partitioned=True, local=local, start=min(before, param.ds_numel), weights=weights)
            start += size


def _partition(param: Any, numel: int) -> Tensor:
    partition: Tensor = param.ds_tensor
    return partition.view(-1).narrow(0, 0, numel)


def _part_3(optimizer: Any, group: int, index: int, start: int, numel: int) -> Tensor | None:
    parts: list[Tensor] | None = optimizer.averaged_gradients.get(group)
    if parts is not None:
        return parts[index].view(-1).narrow(0, 0, numel)
    flat: Tensor | None = optimizer.fp32_partitioned_groups_flat[group].grad
    return None if flat is None else flat.narrow(0, start, numel)


def _in_accumulator(optimizer: Any, ref: weakref.ref[Any]) -> Iterator[Home]:
    """bf16 parameters with float32 accumulation: whole gradients in a buffer beside the parameters."""
    for group, params in enumerate(optimizer.bf16_groups):
        for index, param in enumerate(params):
            yield Home(param, group, partitioned=False, local=partial(_while_alive, ref, _accumulated, group, index))


def _accumulated(optimizer: Any, group: int, index: int) -> Tensor | None:
    if not optimizer.fp32_groups_has_gradients[group][index]:
        return None
    grad: Tensor = optimizer.fp32_groups_gradients[group][index]
    return grad


def _in_copies(optimizer: Any, ref: weakref.ref[Any]) -> Iterator[Home]:
    """fp16 or bf16 at stage 0: ``.grad``, then float32 copies, of each parameter or of a group laid end to end."""
    for group, params in enumerate(optimizer.fp16_groups):
        start = 0
        for index, param in enumerate(params):
            yield Home(param, group, False, partial(_while_alive, ref, _copied, group, index, start, param.numel()))
            start += param.numel()


def _copied(optimizer: Any, group: int, index: int, start: int, numel: int) -> Tensor | None:
    copy: Tensor | None
    if hasattr(optimizer, "fp32_groups_flat"):
        flat = optimizer.fp32_groups_flat[group].grad
        copy = None if flat is None else flat.narrow(0, start, numel)
    else:
        copy = optimizer.fp32_groups[group][index].grad
    if copy is None:
        copy = optimizer.fp16_groups[group][index].grad
    return copy


def _while_alive(ref: weakref.ref[Any], find: Callable[..., Tensor | None], *place: Any) -> Tensor | None:
    """What ``find(optimizer, *place)`` finds; layouts outlive optimizers."""
    optimizer = ref()
    return None if optimizer is None else find(optimizer, *place)


def _nothing() -> None:
    return None


# By the class of the engine's optimizer.
_KEEPERS: dict[str, Callable[[Any, weakref.ref[Any]], Iterator[Home]]] = {
    "DeepSpeedZeroOptimizer": _in_partition,
    "DeepSpeedZeroOptimizer_Stage3": _in_own_partition,
    "BF16_Optimizer": _in_accumulator,
    "FP16_Optimizer": _in_copies,
    "FP16_UnfusedOptimizer": _in_copies,
}


def _layout(engine: Any, param: Any, home: Home | None, guard: Callable[[], None]) -> GradLayout:
    stage = engine.zero_optimization_stage()
    replicas, experts = _groups(engine, param)
    partitioned = home is not None and home.partitioned
    return GradLayout(
        f"ZeRO-{stage}" if stage else "DeepSpeed",
        (Piece(getattr(param, "ds_shape", param.shape), start=0 if home is None else home.start),),
        sharded=replicas if partitioned else (),
        replicated=() if partitioned else replicas,
        apart=experts,
        # Replicas agree by DeepSpeed's own work, as DDP's do. They are asked only where others must be anyway.
        groups=replicas + experts if partitioned or experts else (),
        # A parameter that the optimizer has not (it is frozen) has no gradient that matters.
        local=_nothing if home is None else home.local,
        weights=None if home is None else home.weights,
        guard=guard,
    )


def _groups(engine: Any, param: Any) -> tuple[tuple[RankGroup, ...], tuple[RankGroup, ...]]:
    """The ranks that average this parameter's gradient, and those that hold other experts in its place."""
    if getattr(param, "allreduce", True):
        return _several(getattr(param, "ds_process_group", None) or engine.seq_data_parallel_group), ()
    groups, name = sys.modules["deepspeed.utils.groups"], param.group_name
    return _several(groups._get_expert_data_parallel_group(name)), _several(groups._get_expert_parallel_group(name))


def _several(group: dist.ProcessGroup) -> tuple[RankGroup, ...]:
    ranks = RankGroup.of(group)
    return (ranks,) if len(ranks.ranks) > 1 else ()


def _check_unscaled(engine_ref: weakref.ref[Any]) -> None:
    """For those that clip without the engine: with it, GradClipper knows scale and moment."""
    engine = engine_ref()
    if engine is None:
        return
    scale = float(getattr(engine.optimizer, "loss_scale", 1.0))
    if scale != 1.0 or not engine.is_gradient_accumulation_boundary():
        state = f"multiplied by the loss scale {scale:g}" if scale != 1.0 else "not all accumulated yet"
        raise RuntimeError(
            f"the gradients of this DeepSpeed engine are {state}. Let the engine clip inside its step(): "
            "distclip.GradClipper(engine, rule)."
        )
