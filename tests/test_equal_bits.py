"""The same bits on every rank, step after step, and the same norms on 1, 2 and 4 ranks.

Each case trains for some steps, optimizer included. After every one the ranks compare what they were told (norm,
coefficient, threshold, norms of single tensors) and every piece of a parameter that more than one of them holds, bit
by bit; and each step's norm is that of one process training on the same global batch.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import ClipByNorm, ClipReport, GradClipper
from distclip.kernels.common import summed
from tests.bits import Place, assert_same_bits, assert_same_replicas, digest
from tests.layouts import LAYOUTS, Layout, backward, marks_of
from tests.nets import loss_of, make_batch, make_net
from tests.ranks import run_ranks
from tests.test_declare import Experts, random
from tests.test_pipeline import batch, make_layers
from tests.test_pipeline import loss_of as loss_of_logits

STEPS = 3


def clippers(model: Any, pipeline_group: Any = None) -> Iterator[GradClipper]:
    """One coefficient for all gradients, then one for each tensor; both thresholds below all networks' norms."""
    yield GradClipper(model, 1.0, pipeline_group=pipeline_group)
    # Otherwise a report names the tensors of its own rank alone.
    yield GradClipper(model, ClipByNorm(0.1), pipeline_group=pipeline_group, details_every=1)


def told(report: ClipReport) -> dict[str, Tensor | None]:
    fields = ("total_norm", "coefficient", "threshold", "clipped", "nonfinite", "skipped", "clipped_norm")
    return {name: getattr(report, name) for name in fields} | (report.per_tensor or {})


def sgd(modules: list[nn.Module]) -> torch.optim.Optimizer:
    trained = [param for module in modules for param in module.parameters() if param.requires_grad]
    # foreach takes one kind of tensor, and some models mix DTensors and plain ones.
    return torch.optim.SGD(trained, lr=0.01, momentum=0.9, foreach=False)


def train(
    modules: list[nn.Module],
    run_backward: Callable[[int], None],
    place: Place = lambda _: (),
    pipeline_group: Any = None,
) -> tuple[list[float], int]:
    """Some steps by each rule, compared over the ranks after every one if there are several.

    Returns:
        The norm of each step, and how many pieces of parameters more than one rank holds.
    """
    optimizer, shared = sgd(modules), 0
    norms: list[float] = []
    for clipper in clippers(modules, pipeline_group):
        for _ in range(STEPS):
            optimizer.zero_grad()
            run_backward(len(norms))
            report = clipper.clip()
            assert report.clipped
            optimizer.step()
            norms.append(report.total_norm.item())
            if dist.is_initialized():
                assert_same_bits(told(report))
                shared = assert_same_replicas(modules, place)
    return norms, shared


def train_layout(layout: Layout) -> tuple[list[float], int]:
    model = layout.wrap(make_net(layout.hidden))
    return train([model], lambda _: backward(layout, model))


@functools.cache
def layout_alone(hidden: int, accumulate: bool) -> list[float]:
    """The norms of one process that trains the network of the table."""
    model = make_net(hidden)
    # Accumulation sums two micro-batches, each a mean over half of the batch.
    examples, factor = (16, 2) if accumulate else (8, 1)
    return train([model], lambda _: (factor * loss_of(model, make_batch(examples))).backward())[0]


def replicates(layout: Layout) -> bool:
    """Whether some piece of a parameter is on more than one rank."""
    if layout.name in ("single", "hsdp-only-shards"):
        return False
    kinds = ("ignored", "hsdp", "hybrid", "tp", "nested")
    return layout.collectives == 0 or any(kind in layout.name for kind in kinds)


def differs_from_one(layout: Layout) -> bool:
    """Whether gradients are rounded otherwise than one process would round them, or are other ones."""
    # Without an accelerator torch 2.13 adds FSDP1's offloaded gradients to those of the steps before, zeroed or not.
    return layout.dtype != torch.float32 or "precision" in layout.name or layout.name == "fsdp1-cpu-offload"


# Four ranks repeat what two have shown, but for the layouts that most people use.
USUAL = ("ddp", "fsdp2")
CASES = [
    pytest.param(
        layout,
        size,
        id=f"{layout.name}-{size}",
        marks=marks_of(layout)
        or [pytest.mark.slow] * (size > 4 or (size != layout.world_sizes[0] and layout.name not in USUAL)),
    )
    for layout in LAYOUTS.values()
    for size in layout.world_sizes
]


@pytest.mark.parametrize(("layout", "size"), CASES)
def test_layouts(layout: Layout, size: int) -> None:
    results = run_ranks(train_layout, size, layout)
    norms, shared = results[0]
    assert (shared > 0) == replicates(layout)
    assert all(other == norms for other, _ in results)
    if not differs_from_one(layout):
        assert norms == pytest.approx(layout_alone(layout.hidden, layout.accumulate), rel=1e-6)


def flipped(layout: Layout) -> None:
    model = layout.wrap(make_net(layout.hidden))
    assert_same_replicas([model])
    assert_same_bits({"norm": torch.ones(())})
    if dist.get_rank() == dist.get_world_size() - 1:
        with torch.no_grad():
            for module in model.modules():
                for param in module.parameters(recurse=False):
                    getattr(param, "_local_tensor", param).view(torch.int32).bitwise_xor_(1)
    with pytest.raises(AssertionError, match="differ in the bits of"):
        assert_same_replicas([model])
    with pytest.raises(AssertionError, match=r"rank \d and rank \d differ in the bits of norm"):
        assert_same_bits({"norm": torch.tensor(-0.0 if dist.get_rank() else 0.0), "other": None})


@pytest.mark.parametrize("name", ["ddp", "hsdp-2x", "fsdp1-hybrid_shard-flat", "tp"])
def test_a_single_bit_is_seen(name: str) -> None:
    """What the tests above compare can differ: one bit of one rank's replicas does here."""
    run_ranks(flipped, LAYOUTS[name].world_sizes[0], LAYOUTS[name])


@functools.cache
def pipeline_alone(tied: bool) -> list[float]:
    layers = make_layers(tied)
    if tied:
        layers[3].head.weight = layers[0].embed.weight  # type: ignore[union-attr]
    model, (tokens, targets) = nn.Sequential(*layers), batch()
    return train([model], lambda _: loss_of_logits(model(tokens), targets).backward())[0]


def wrapped(stage: nn.Module, kind: str, data: DeviceMesh) -> nn.Module:
    if kind == "fsdp2":
        fully_shard(stage, mesh=data)
    return DistributedDataParallel(stage, process_group=data.get_group()) if kind == "ddp" else stage


def train_pipeline(kind: str, shape: tuple[int, int]) -> tuple[list[float], int]:
    """Stages on the first axis of the mesh, data parallel by ``kind`` on the second; torch's own schedules."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("pp", "dp"))
    rank, pp, dp = mesh.get_local_rank("pp"), mesh["pp"], mesh.get_local_rank("dp")
    parts = [[0], [1], [2], [3]] if kind == "interleaved" or shape[0] == 4 else [[0, 1], [2, 3]]
    places = range(rank, len(parts), shape[0])
    layers = make_layers(kind == "tied")
    modules = [wrapped(nn.Sequential(*(layers[at] for at in parts[place])), kind, mesh["dp"]) for place in places]
    group = pp.get_group()
    stages = [
        PipelineStage(module, place, len(parts), torch.device("cpu"), group=group)
        for module, place in zip(modules, places, strict=True)
    ]
    schedule: Any = (
        ScheduleInterleaved1F1B([*stages], 4, loss_fn=loss_of_logits)
        if kind == "interleaved"
        else Schedule1F1B(stages[0], 4, loss_fn=loss_of_logits)
    )
    tokens, targets = (whole[dp :: shape[1]] for whole in batch())
    tied = None
    if kind == "tied":
        tied = modules[0].get_parameter("0.embed.weight" if rank == 0 else "1.head.weight")
        distclip.declare(tied, replicated=pp)

    def run_backward(_: int) -> None:
        schedule.step(*([tokens] if rank == 0 else []), **({"target": targets} if rank == shape[0] - 1 else {}))
        if tied is not None:
            dist.all_reduce(tied.grad, group=group)

    return train(modules, run_backward, lambda _: rank, pp)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("plain", (2, 1)),
        ("interleaved", (2, 1)),
        ("tied", (2, 1)),
        pytest.param("plain", (4, 1), marks=pytest.mark.slow),
        ("ddp", (2, 2)),
        ("fsdp2", (2, 2)),
    ],
)
def test_pipelines(kind: str, shape: tuple[int, int]) -> None:
    results = run_ranks(train_pipeline, shape[0] * shape[1], kind, shape)
    norms, shared = results[0]
    assert (shared > 0) == (kind == "ddp")
    assert all(other == norms for other, _ in results)
    assert norms == pytest.approx(pipeline_alone(kind == "tied"), rel=1e-6)


EXPERTS = 4


def train_experts(kind: str) -> tuple[list[float], int]:
    """Four experts over all ranks beside dense weights; gradients as a whole job's would be, whatever its size."""
    started = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if started else (0, 1)
    each = EXPERTS // size
    model = Experts(each)
    model.stacked = nn.Parameter(torch.zeros(EXPERTS, 6, 2))
    for place, expert in enumerate(model.experts):
        for param in expert.parameters():
            param.data = random(100 * (each * rank + place) + param.ndim, *param.shape)
    for seed, param in enumerate((*model.dense.parameters(), model.stacked)):
        param.data = random(seed, *param.shape)
    if started:
        distclip.declare(model.experts, sharded=dist.group.WORLD)
        grid = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("ep", "efsdp"))
        model.stacked = nn.Parameter(distribute_tensor(model.stacked.data, grid, [Shard(0), Shard(1)]))
        if kind == "fsdp2":
            fully_shard(model.dense)

    def give_grads(step: int) -> None:
        for name, param in model.named_parameters():
            own = 1000 * (each * rank + int(name.split(".")[1])) if name.startswith("experts") else 0
            grad = random(own + 10 * step + param.ndim, *param.shape)
            if isinstance(param, DTensor):
                param.grad = distribute_tensor(grad, param.device_mesh, param.placements) + param.detach()
            else:
                param.grad = grad + param.detach()

    return train([model], give_grads, lambda name: rank if name.startswith("experts") else None)


@functools.cache
def experts_alone() -> list[float]:
    return train_experts("plain")[0]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["plain", "fsdp2"])
def test_experts(kind: str, size: int) -> None:
    """Plain experts, and stacked ones on a mesh of their own, beside dense weights that are plain or sharded."""
    results = run_ranks(train_experts, size, kind)
    norms, shared = results[0]
    assert (shared > 0) == (kind == "plain")
    assert all(other == norms for other, _ in results)
    assert norms == pytest.approx(experts_alone(), rel=1e-6)


@contextlib.contextmanager
def threads_set(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measured(threads: int, grad: Tensor, rule: distclip.Rule) -> list[str]:
    """The bits of norm and coefficient, and of what becomes of the gradient, with so many threads."""
    params = nn.ParameterList([nn.Parameter(torch.zeros_like(grad))])
    params[0].grad = grad.clone()
    with threads_set(threads):
        report = GradClipper(params, rule).clip()
    return [digest(value) for value in (report.total_norm, report.coefficient, params[0].grad)]


# Longer than what torch sums in one thread: one gradient, or a row of it.
LONG = {"elements": (300_001,), "rows": (3, 100_003), "one row": (1, 250_003)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ("elements", distclip.ClipByGlobalNorm(1e-3)),
        ("elements", distclip.ClipByGlobalNorm(1e-3, norm_type=1.0)),
        ("elements", distclip.ClipByGlobalNorm(1e-3, norm_type=3.5)),
        ("rows", distclip.CentralizeGradient()),
        ("rows", distclip.AdaptiveGradientClipping(0.01)),
        ("one row", distclip.AdaptiveGradientClipping(0.01)),
    ],
    ids=str,
)
def test_ranks_may_differ_in_their_number_of_threads(shape: str, rule: distclip.Rule, dtype: torch.dtype) -> None:
    """Replicas of DDP each measure for themselves: where a sum is cut for threads must not show."""
    if dtype.is_complex and isinstance(rule, distclip.CentralizeGradient):
        pytest.skip("not defined for complex gradients")
    # Not around 0, where roundings of sums are small beside the elements.
    grad = random(0, *LONG[shape]).double().exp().to(dtype)
    assert measured(1, grad, rule) == measured(3, grad, rule) == measured(2, grad, rule)


def test_sums_do_not_depend_on_threads() -> None:
    values = random(0, 100_003).double().square()
    with threads_set(1):
        total = summed(values)
    with threads_set(3):
        assert torch.equal(summed(values), total)
    assert total.item() == pytest.approx(math.fsum(values.tolist()), rel=1e-14)


def train_overlapped(name: str, alone: bool) -> None:
    """``alone``: on rank 0 only."""
    layout = LAYOUTS[name]
    model = layout.wrap(make_net())
    optimizer = sgd([model])
    clipper = GradClipper(model, 1.0, overlap=dist.get_rank() == 0 or not alone)
    for _ in range(4):
        optimizer.zero_grad()
        backward(layout, model)
        report = clipper.clip()
        optimizer.step()
        assert_same_bits(told(report))
        assert_same_replicas([model])


@pytest.mark.parametrize(("name", "alone"), [("ddp", False), ("replicate-dtensor", False), ("fsdp2-ignored", True)])
def test_overlap(name: str, alone: bool) -> None:
    run_ranks(train_overlapped, 2, name, alone)


@pytest.mark.parametrize("name", ["ddp", "replicate-dtensor"])
def test_overlap_on_some_ranks_that_do_not_reduce(name: str) -> None:
    """Their norms would differ in the last bits."""
    run_ranks(overlapped_alone, 2, name)


def overlapped_alone(name: str) -> None:
    with pytest.raises(RuntimeError, match="disagree on how to clip") as raised:
        train_overlapped(name, alone=True)
    for rank, overlap in enumerate((True, False)):
        assert f"on rank {rank}: check=first, overlap={overlap}" in str(raised.value)
