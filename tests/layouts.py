"""The table of layouts: each row wraps the network of `nets.py` on the calling rank and runs one backward."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate import replicate as replicate_plain
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffload,
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.nn.parallel import DistributedDataParallel

from tests.nets import Net, loss_of, make_batch, make_net

Wrap = Callable[[Net], nn.Module]


@dataclass(frozen=True)
class Layout:
    """One way to spread the network over the ranks. Pickles by name, so that it can be a test's argument."""

    name: str
    wrap: Wrap = field(repr=False, compare=False)
    world_sizes: tuple[int, ...] = (2, 4)
    collectives: int = 1
    """All-reduces that one clip costs."""
    dtype: torch.dtype = torch.float32
    """Of the gradients with the lowest precision."""
    hidden: int = 7
    """Of the network: DTensor's colwise and rowwise linears want it to divide evenly."""
    tp: int = 1
    """Neighbouring ranks that see the same data; -1 for all."""
    partial: bool = False
    """Whether some gradients are Partial: a rule that limits elements reduces them first, one collective each."""
    accumulate: bool = False
    """Whether a first micro-batch runs without synchronisation."""

    def __reduce__(self) -> tuple[Any, ...]:
        return named, (self.name,)


def backward(layout: Layout, model: nn.Module, device: str = "cpu") -> None:
    """Run this rank's part of the batch; afterwards the gradients are those of the mean over all ranks."""
    tokens, targets = (part.to(device) for part in make_batch(8 if not layout.accumulate else 16))
    alike = layout.tp if layout.tp > 0 else dist.get_world_size()
    mine = slice(dist.get_rank() // alike, None, dist.get_world_size() // alike)
    tokens, targets = tokens[mine], targets[mine]
    if layout.accumulate:
        half = len(tokens) // 2
        _without_sync(model, lambda: loss_of(model, (tokens[:half], targets[:half])).backward())
        tokens, targets = tokens[half:], targets[half:]
    loss_of(model, (tokens, targets)).backward()
    _average_ignored(model)


def _without_sync(model: nn.Module, run: Callable[[], None]) -> None:
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        run()
        model.set_requires_gradient_sync(True)
    else:
        assert isinstance(model, DistributedDataParallel | FullyShardedDataParallel)
        with model.no_sync():
            run()


def _average_ignored(model: nn.Module) -> None:
    """What users must do with parameters that they keep out of FSDP."""
    if not any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules()):
        return
    for param in model.parameters():
        plain = not isinstance(param, DTensor) and not hasattr(param, "_fsdp_flattened")
        if plain and param.grad is not None:
            dist.all_reduce(param.grad)
            param.grad /= dist.get_world_size()


def _ddp(net: Net) -> nn.Module:
    return DistributedDataParallel(net)


def _replicate(net: Net) -> nn.Module:
    return replicate_plain(net)


def _replicate_dtensor(net: Net) -> nn.Module:
    module = pytest.importorskip("torch.distributed._composable.replicate_with_fsdp")  # newer than torch 2.8
    mesh = init_device_mesh(net.scale.device.type, (dist.get_world_size(),))
    for block in net.blocks:
        module.replicate(block, mesh=mesh)
    module.replicate(net, mesh=mesh)
    return net


def _fsdp1(net: Net, *, blocks: dict[str, Any] | None = None, ignore: bool = False, **options: Any) -> nn.Module:
    """Each block a unit of its own, below the root. `blocks`: options of theirs that differ from the root's."""
    options = {"device_id": net.scale.device, "use_orig_params": True, **options}
    if ignore:
        options["ignored_states"] = [net.scale, *net.first.norm.parameters()]
    for place, block in enumerate(net.blocks):
        net.blocks[place] = FullyShardedDataParallel(block, **{**options, **(blocks or {})})
    if not options["use_orig_params"]:
        # One flat parameter cannot hold frozen and trained tensors.
        net.frozen = FullyShardedDataParallel(net.frozen, **options)  # type: ignore[assignment]
    return FullyShardedDataParallel(net, **options)


def _fsdp1_hybrid(net: Net, strategy: str = "HYBRID_SHARD", **options: Any) -> nn.Module:
    mesh = init_device_mesh(
        net.scale.device.type, (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard")
    )
    return _fsdp1(net, sharding_strategy=ShardingStrategy[strategy], device_mesh=mesh, **options)


def _fsdp1_cpu_offload(net: Net) -> nn.Module:
    if not torch.accelerator.is_available():
        # FSDP1's offloading takes an accelerator for granted. The rank's process ends with the test.
        torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
        torch.cpu.Stream.synchronize = lambda _: None  # type: ignore[attr-defined]
    return _fsdp1(net, cpu_offload=CPUOffload(offload_params=True))


def _fsdp1_mixed_dtypes(net: Net) -> nn.Module:
    net.blocks[0].double()
    _cast_around(net.blocks[0], torch.float64)
    return _fsdp1(net)


def _cast_around(module: nn.Module, dtype: torch.dtype) -> None:
    module.register_forward_pre_hook(lambda _, args: tuple(arg.to(dtype) for arg in args))
    module.register_forward_hook(lambda _, __, out: out.float())


def _fsdp2(net: Net, *, shape: tuple[int, ...] | None = None, ignore: bool = False, **options: Any) -> nn.Module:
    """`shape`: of the mesh, (replicate, shard) for HSDP; -1 for what is left of the job."""
    size = dist.get_world_size()
    shape = tuple(size // 2 if axis == -1 else axis for axis in shape) if shape else (size,)
    mesh = init_device_mesh(net.scale.device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    ignored = {net.scale, *net.first.norm.parameters()} if ignore else set()
    for block in net.blocks:
        fully_shard(block, mesh=mesh, ignored_params=ignored & set(block.parameters()), **options)
    fully_shard(net, mesh=mesh, ignored_params=ignored, **options)
    return net


def _fsdp2_context_parallel(net: Net) -> nn.Module:
    """Parameters sharded over data and context parallel ranks alike, by a flattened mesh."""
    shape = (2, dist.get_world_size() // 2)
    mesh = init_device_mesh(net.scale.device.type, shape, mesh_dim_names=("dp", "cp"))
    flat = mesh["dp", "cp"]._flatten("dp_cp")
    for block in net.blocks:
        fully_shard(block, mesh=flat)
    fully_shard(net, mesh=flat)
    return net


def _fsdp2_mixed_dtypes(net: Net) -> nn.Module:
    net.blocks[0].double()
    _cast_around(net.blocks[0], torch.float64)
    return _fsdp2(net)


def _tensor_parallel(net: Net, mesh: DeviceMesh, sequence: bool = False) -> Net:
    """Colwise and rowwise linears, vocabulary-parallel embedding and head; norms plain, or sequence parallel."""
    along = Shard(1) if sequence else Replicate()
    plan: dict[str, ParallelStyle] = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=along),
        "head": ColwiseParallel(input_layouts=along, output_layouts=Replicate()),
    }
    for place in range(len(net.blocks)):
        plan[f"blocks.{place}.up"] = ColwiseParallel(input_layouts=along)
        plan[f"blocks.{place}.down"] = RowwiseParallel(output_layouts=along)
        if sequence:
            plan[f"blocks.{place}.norm"] = SequenceParallel()
    parallelize_module(net, mesh, plan)
    net.head.weight = net.embed.weight
    return net


def _tp(net: Net, sequence: bool = False) -> nn.Module:
    mesh = init_device_mesh(net.scale.device.type, (dist.get_world_size(),), mesh_dim_names=("tp",))
    return _tensor_parallel(net, mesh, sequence)


def _fsdp2_tp(net: Net, shape: tuple[int, ...] = (-1, 2), sequence: bool = False) -> nn.Module:
    """(shard, tp), or (replicate, shard, tp) for HSDP. The frozen, norm and scale parameters stay out of `tp`."""
    shape = tuple(dist.get_world_size() // 2 if axis == -1 else axis for axis in shape)
    names = ("replicate", "shard", "tp")[-len(shape) :]
    mesh = init_device_mesh(net.scale.device.type, shape, mesh_dim_names=names)
    _tensor_parallel(net, mesh["tp"], sequence)
    data = mesh[names[:-1]] if len(names) > 2 else mesh["shard"]
    for block in net.blocks:
        fully_shard(block, mesh=data)
    fully_shard(net, mesh=data)
    return net


def _low_precision(net: Net, wrap: Wrap, dtype: torch.dtype) -> nn.Module:
    return wrap(net.to(dtype))


def _fsdp1_rows() -> list[Layout]:
    rows = []
    for strategy in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"):
        for orig in (True, False):
            name = f"fsdp1-{strategy.lower()}-{'orig' if orig else 'flat'}"
            wrap = partial(_fsdp1, sharding_strategy=ShardingStrategy[strategy], use_orig_params=orig)
            rows.append(Layout(name, wrap, collectives=int(strategy != "NO_SHARD")))
    for strategy in ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"):
        for orig in (True, False):
            name = f"fsdp1-{strategy.lower().strip('_')}-{'orig' if orig else 'flat'}"
            rows.append(Layout(name, partial(_fsdp1_hybrid, strategy=strategy, use_orig_params=orig), (4,)))
    no_shard = {"sharding_strategy": ShardingStrategy.NO_SHARD}
    reduce_bf16 = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    kept_bf16 = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, keep_low_precision_grads=True)
    return [
        *rows,
        Layout("fsdp1-nested-strategies", partial(_fsdp1, blocks=no_shard)),
        Layout("fsdp1-ignored", partial(_fsdp1, ignore=True)),
        Layout("fsdp1-mixed-dtypes", _fsdp1_mixed_dtypes),
        Layout("fsdp1-cpu-offload", _fsdp1_cpu_offload),
        Layout("fsdp1-mixed-precision", partial(_fsdp1, mixed_precision=reduce_bf16)),
        # torch 2.13 cannot keep low-precision gradients of tied weights under use_orig_params.
        Layout(
            "fsdp1-bf16-grads",
            partial(_fsdp1, mixed_precision=kept_bf16, use_orig_params=False),
            dtype=torch.bfloat16,
        ),
        Layout("fsdp1-accumulate", _fsdp1, accumulate=True),
    ]


def _fsdp2_rows() -> list[Layout]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=False)
    bf16 = partial(_low_precision, wrap=_fsdp2, dtype=torch.bfloat16)
    return [
        Layout("fsdp2", _fsdp2),
        Layout("fsdp2-keep-unsharded", partial(_fsdp2, reshard_after_forward=False)),
        Layout("fsdp2-mixed-precision", partial(_fsdp2, mp_policy=policy)),
        Layout("fsdp2-bf16", bf16, dtype=torch.bfloat16),
        Layout("fsdp2-mixed-dtypes", _fsdp2_mixed_dtypes),
        Layout("fsdp2-ignored", partial(_fsdp2, ignore=True)),
        Layout("fsdp2-cpu-offload", partial(_fsdp2, offload_policy=offload)),
        Layout("fsdp2-accumulate", _fsdp2, accumulate=True),
        Layout("fsdp2-context-parallel", _fsdp2_context_parallel, (4,)),
        Layout("hsdp-2x", partial(_fsdp2, shape=(2, -1)), (4,)),
        Layout("hsdp-only-replicas", partial(_fsdp2, shape=(2, 1)), (2,), collectives=0),
        Layout("hsdp-only-shards", partial(_fsdp2, shape=(1, 2)), (2,)),
    ]


def _mesh_rows() -> list[Layout]:
    return [
        Layout("tp", _tp, tp=-1, hidden=8),
        Layout("tp-sequence", partial(_tp, sequence=True), (2,), tp=-1, hidden=8, partial=True),
        Layout("fsdp2+tp", _fsdp2_tp, (4,), tp=2, hidden=8),
        Layout("fsdp2+tp-sequence", partial(_fsdp2_tp, sequence=True), (4,), tp=2, hidden=8),
        Layout("hsdp+tp", partial(_fsdp2_tp, shape=(2, 2, 2)), (8,), tp=2, hidden=8),
    ]


LAYOUTS = {
    layout.name: layout
    for layout in [
        Layout("single", lambda net: net, (1,), collectives=0),
        Layout("ddp", _ddp, collectives=0),
        Layout("ddp-accumulate", _ddp, collectives=0, accumulate=True),
        Layout("replicate", _replicate, (2,), collectives=0),
        Layout("replicate-dtensor", _replicate_dtensor, collectives=0),
        *_fsdp1_rows(),
        *_fsdp2_rows(),
        *_mesh_rows(),
    ]
}


def named(name: str) -> Layout:
    return LAYOUTS[name]


def build(layout: Layout, device: str = "cpu") -> nn.Module:
    """The wrapped network, with this rank's gradients in place."""
    model = layout.wrap(make_net(layout.hidden).to(device))
    backward(layout, model, device)
    return model


VARIANTS = frozenset(
    name
    for name in LAYOUTS
    if any(part in name for part in ("grad_op", "no_shard", "zero2", "keep", "offload", "only", "accumulate", "nested"))
)
"""Layouts that lie as another one does: what looks at layouts from far away does so at these among the slow tests."""


def marks_of(layout: Layout, *, repeated: bool = True) -> list[pytest.MarkDecorator]:
    """For a case that others repeat on the layouts of which this one is a variant."""
    return [pytest.mark.slow] if repeated and layout.name in VARIANTS else []


each_layout = pytest.mark.parametrize(
    "layout", [pytest.param(layout, id=layout.name, marks=marks_of(layout)) for layout in LAYOUTS.values()]
)
"""Runs a test with each layout, the variants if slow tests are run."""

_CASES = [
    pytest.param(
        layout, size, "cpu", id=f"{layout.name}-{size}", marks=marks_of(layout, repeated=size != layout.world_sizes[0])
    )
    for layout in LAYOUTS.values()
    for size in layout.world_sizes
] + [
    # One rank has the GPU and NCCL for itself; two share it and talk over gloo.
    pytest.param(LAYOUTS[name], size, "cuda", id=f"{name}-{size}-cuda", marks=pytest.mark.gpu)
    for name in ("single", "ddp", "fsdp1-full_shard-orig", "fsdp1-full_shard-flat", "fsdp2", "fsdp2-bf16")
    for size in (1, 2)
]
every_layout = pytest.mark.parametrize(("layout", "size", "device"), _CASES)
"""Runs a test with each layout on each number of ranks that it is for, and some on a GPU."""
