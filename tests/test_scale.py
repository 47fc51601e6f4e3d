"""What grows with ranks, tensors and steps: plans of 1,000 simulated ranks, and what a clip does not do again."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distclip
from distclip.layout.dtensor import is_dtensor
from tests import oracle
from tests.collectives import recorded_collectives
from tests.layouts import LAYOUTS, Layout, backward, build
from tests.ranks import ranks
from tests.simulated import mesh_of, placed, sent, simulate

# Uneven cuts, empty shards, a tensor that no number of ranks divides.
SHAPES = ((1500, 4), (1999,), (8, 3), (1,))
MAX_NORM = 0.5


class World(NamedTuple):
    """One rank's part of a model."""

    model: nn.Module
    grads: dict[str, Tensor]
    """Whole gradients of the tensors of which it has a piece, by name."""
    keys: dict[str, str]
    """By name, what tells two tensors of one name apart (stages, experts)."""
    pipeline: dist.ProcessGroup | None = None


def whole_grad(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.arange(1.0, math.prod(shape) + 1).mul(seed + 1).sin().view(shape)


def spread(shape: tuple[int, ...], placements: list[Any], seed: int = 0) -> tuple[nn.ParameterList, dict[str, Tensor]]:
    """Parameters on a mesh of all ranks, and their gradients; the last axes alone where there are fewer placements."""
    mesh = mesh_of(*shape)
    if len(placements) < len(shape):
        mesh = mesh[tuple((mesh.mesh_dim_names or ())[-len(placements) :])]
    grads = {str(place): whole_grad(size, seed + place) for place, size in enumerate(SHAPES)}
    model = nn.ParameterList()
    for grad in grads.values():
        # A vector has no second dimension to be cut along.
        fitting = [Replicate() if kind == Shard(1) and grad.ndim < 2 else kind for kind in placements]
        param = nn.Parameter(placed(torch.ones_like(grad), mesh, fitting))
        param.grad = placed(grad, mesh, fitting)
        model.append(param)
    return model, grads


def fsdp2(size: int) -> World:
    model, grads = spread((size,), [Shard(0)])
    return World(model, grads, {name: name for name in grads})


def hsdp(size: int) -> World:
    model, grads = spread((size // 100 or 2, min(100, size // 2)), [Replicate(), Shard(0)])
    return World(model, grads, {name: name for name in grads})


def fsdp2_tp(size: int) -> World:
    model, grads = spread((size // 8, 8), [Shard(0), Shard(1)])
    return World(model, grads, {name: name for name in grads})


def pipeline(size: int) -> World:
    """Stages of one shape and the same names, with other gradients."""
    mesh = mesh_of(size // 100 or 2, min(100, size // 2))
    stage = mesh.get_local_rank(0)
    model, grads = nn.ParameterList(), {}
    for place, shape in enumerate(SHAPES[: 2 + stage % 3]):
        grad = whole_grad(shape, 10 * stage + place)
        param = nn.Parameter(placed(torch.ones(shape), mesh["b"], [Shard(0)]))
        param.grad = placed(grad, mesh["b"], [Shard(0)])
        model.append(param)
        grads[str(place)] = grad
    return World(model, grads, {name: f"stage {stage}: {name}" for name in grads}, mesh.get_group("a"))


def experts(size: int) -> World:
    """Plain experts, 8 of them, each on every eighth rank; the rest as under FSDP2. Some have no token."""
    model, grads = spread((size,), [Shard(0)])
    mesh = mesh_of(size // 8, 8)
    mine = mesh.get_local_rank(1)
    expert = nn.Parameter(torch.ones(5, 3))
    model.append(expert)
    distclip.declare([expert], sharded=mesh.get_group("b"))
    grads["4"] = torch.zeros(5, 3) if mine == 3 else whole_grad((5, 3), 50 + mine)
    expert.grad = None if mine == 3 else grads["4"].clone()
    return World(model, grads, {name: name for name in SHAPES_BY_NAME} | {"4": f"expert {mine}"})


SHAPES_BY_NAME = {str(place): shape for place, shape in enumerate(SHAPES)}


class Told(NamedTuple):
    """What one rank found."""

    ranks: tuple[int, ...]
    slots: int
    collectives: list[int]
    """Bytes of each, once the plan is made."""
    handshake: int
    """Bytes that making the plan took."""
    norm: float
    counted: dict[str, float]
    """By key, the share of the tensor's sum of squares that this rank counts."""
    truth: dict[str, float]
    wrong: list[str]
    """Tensors whose clipped gradient is not what one process makes of it."""


def clip_on_one_rank(spread_model: Callable[[int], World]) -> Told:
    world = spread_model(dist.get_world_size())
    params = dict(world.model.named_parameters())
    clipper = distclip.GradClipper(world.model, MAX_NORM, pipeline_group=world.pipeline, check="never")
    plan = clipper._current_plan()
    handshake = len(sent())
    counted = {}
    for name, share in zip(plan.names, plan.shares.tolist(), strict=True):
        counted[world.keys[name]] = share * square_sum(params[name].grad)
    norm = float(clipper.clip().total_norm)
    coefficient = MAX_NORM / (norm + 1e-6)
    wrong = [name for name, param in params.items() if not is_clipped(param, world.grads[name] * coefficient)]
    truth = {world.keys[name]: square_sum(grad) for name, grad in world.grads.items()}
    told, clipping = sum(sent()[:handshake]), sent()[handshake:]
    return Told(plan.participants.ranks, plan.slot_count, clipping, told, norm, counted, truth, wrong)


def square_sum(tensor: Tensor | None) -> float:
    """Of what lies on this rank."""
    if tensor is None:
        return 0.0
    local = tensor.to_local() if is_dtensor(tensor) else tensor
    return float(local.double().square().sum())


def is_clipped(param: Tensor, whole: Tensor) -> bool:
    if not is_dtensor(param):
        return param.grad is None or torch.allclose(param.grad, whole, rtol=1e-6, atol=1e-9)
    expected = placed(whole, param.device_mesh, param.placements)
    grad = param.grad
    assert isinstance(grad, DTensor)
    return torch.allclose(grad.to_local(), expected.to_local(), rtol=1e-6, atol=1e-9)


SIMULATED = (fsdp2, hsdp, fsdp2_tp, pipeline, experts)


@pytest.mark.parametrize(
    ("spread_model", "size"),
    [
        *((b, 24) for b in SIMULATED),
        (pipeline, 300),
        *(pytest.param(b, 1000, marks=pytest.mark.slow) for b in SIMULATED),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_all_ranks_have_the_right_plan(spread_model: Callable[[int], World], size: int) -> None:
    told: list[Told] = simulate(size, clip_on_one_rank, spread_model)
    truth = {key: power for one in told for key, power in one.truth.items()}
    assert all(one.ranks == tuple(range(size)) for one in told)
    assert {one.slots for one in told} == {len(truth)}
    for key, power in truth.items():
        counted = math.fsum(one.counted.get(key, 0.0) for one in told)
        assert counted == pytest.approx(power, rel=1e-9), key
    norm = oracle.norm({key: torch.tensor(power).double().sqrt().numpy() for key, power in truth.items()})
    assert norm > MAX_NORM
    assert {one.norm for one in told} == {told[0].norm}
    assert told[0].norm == pytest.approx(norm, rel=1e-6)
    assert not [(rank, one.wrong) for rank, one in enumerate(told) if one.wrong]
    # One all-reduce of 56 bytes, however many ranks and tensors there are.
    assert {tuple(one.collectives) for one in told} == {(56,)}
    # A rank tells its list of tensors where no other rank has told the same.
    assert max(one.handshake for one in told) < 200 * size


WALKS = ("modules", "named_modules", "parameters", "named_parameters", "children", "named_children", "buffers")


def forbid_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    def walk(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a clip walks over the model's modules")

    for name in WALKS:
        monkeypatch.setattr(nn.Module, name, walk)


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def step(model: nn.Module, params: list[nn.Parameter], factor: float, set_to_none: bool = True) -> Tensor:
    """New gradients, as a step of training makes them; returns their norm."""
    for param in params:
        if set_to_none:
            param.grad = None
        elif param.grad is not None:
            param.grad.zero_()
    (model(torch.ones(1, 3, dtype=params[0].dtype)).square().sum() * factor).backward()
    norm: Tensor = torch.cat([param.grad.flatten() for param in params if param.grad is not None]).double().norm()
    return norm


CLIPS: dict[str, Callable[[distclip.GradClipper, list[nn.Parameter]], Tensor]] = {
    "GradClipper": lambda clipper, _: clipper.clip().total_norm,
    "clip_grad_norm_ of a list": lambda _, params: distclip.clip_grad_norm_(params, 1e-3),
    "clip_grad_norm_ of a generator": lambda _, params: distclip.clip_grad_norm_(iter(params), 1e-3),
}


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS.keys())
def test_no_clip_but_the_first_walks_over_modules(
    clip: Callable[[distclip.GradClipper, list[nn.Parameter]], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    params, clipper = list(model.parameters()), distclip.GradClipper(model, 1e-3)
    step(model, params, 1.0)
    clip(clipper, params)
    truth = step(model, params, 2.0)
    forbid_walks(monkeypatch)
    assert clip(clipper, params).item() == pytest.approx(truth.item(), rel=1e-6)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_plan_outlives_gradients(set_to_none: bool) -> None:
    model = small_model()
    params, clipper = list(model.parameters()), distclip.GradClipper(model, 1e-3)
    plans: set[object] = set()
    for factor in (1.0, 3.0, 0.5, 2.0):
        before = [param.grad for param in params]
        truth = step(model, params, factor, set_to_none)
        # Truly others, or truly the same: what was before still lives here.
        assert all((old is param.grad) != set_to_none for old, param in zip(before, params, strict=True)) or not plans
        assert clipper.clip().total_norm.item() == pytest.approx(truth.item(), rel=1e-6)
        after = torch.cat([param.grad.flatten() for param in params if param.grad is not None]).norm()
        assert after.item() == pytest.approx(1e-3, rel=1e-2)  # 1e-6 is added to the norm
        plans.add(clipper._plan)
    assert len(plans) == 1


def replace_a_parameter(clipper: distclip.GradClipper, model: nn.Sequential) -> None:
    layer = model[2]
    assert isinstance(layer, nn.Linear)
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def need_more(clipper: distclip.GradClipper, model: nn.Sequential) -> None:
    clipper.rule = distclip.ClipByNorm(1e-3)


def need_another_norm(clipper: distclip.GradClipper, model: nn.Sequential) -> None:
    clipper.rule = distclip.ClipByGlobalNorm(1e-3, 1.0)


def change_the_dtype(clipper: distclip.GradClipper, model: nn.Sequential) -> None:
    model.double()


CHANGES = (replace_a_parameter, need_more, need_another_norm, change_the_dtype)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_plan_follows_parameters_and_rule(
    change: Callable[[distclip.GradClipper, nn.Sequential], None],
) -> None:
    model = small_model()
    clipper = distclip.GradClipper(model, 1e-3)
    step(model, list(model.parameters()), 1.0)
    clipper.clip()
    first = clipper._plan
    change(clipper, model)
    step(model, list(model.parameters()), 2.0)
    clipper.clip()
    assert clipper._plan is not first
    second = clipper._plan
    step(model, list(model.parameters()), 3.0)
    report = clipper.clip()
    assert clipper._plan is second
    wide = change is change_the_dtype
    assert report.total_norm.dtype == (torch.float64 if wide else torch.float32)
    for param in model.parameters():
        assert param.grad is not None
        assert param.grad.norm() <= 1e-3 * 1.001


def test_a_threshold_that_changes_needs_no_new_plan() -> None:
    model = small_model()
    clipper = distclip.GradClipper(model, distclip.ClipByGlobalNorm(lambda step: 1.0 + step))
    plans: set[object] = set()
    for _ in range(3):
        step(model, list(model.parameters()), 1.0)
        clipper.clip()
        plans.add(clipper._plan)
    assert len(plans) == 1


@ranks(2)
@pytest.mark.parametrize("name", ["fsdp2", "fsdp1-full_shard-orig"])
@pytest.mark.parametrize("way", ["clipper", "function"])
def test_new_gradients_cost_no_word(name: str, way: str) -> None:
    """One all-reduce a clip, also where one rank's gradients lie in other memory."""
    layout: Layout = LAYOUTS[name]
    model = build(layout)
    params = list(model.parameters())
    clipper = distclip.GradClipper(model, 1e-3, check="never")

    def clip() -> Tensor:
        return clipper.clip().total_norm if way == "clipper" else distclip.clip_grad_norm_(params, 1e-3)

    distclip.grad_norm(model)
    clip()
    for number in range(3):
        model.zero_grad(set_to_none=number != 1)
        backward(layout, model)
        if dist.get_rank() == 1 and number == 2:
            for param in filter(is_dtensor, params):
                param.grad = None if param.grad is None else param.grad.clone()
        truth = oracle.norm(oracle.whole_grads(model))
        with recorded_collectives() as names:
            norm = clip()
        assert names == ["allreduce_"]
        assert norm.item() == pytest.approx(truth, rel=1e-6)
        assert oracle.norm(oracle.whole_grads(model)) == pytest.approx(1e-3, rel=1e-2)


class Wires(TorchDispatchMode):
    """The bytes of every all-reduce, those inside DTensor's own operations too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # and what it is made of comes here again
        if func._schema.name in ("c10d::allreduce_", "_c10d_functional::all_reduce"):
            self.sizes.append(sum(leaf.nbytes for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor)))
        return func(*args, **(kwargs or {}))


def reduced_by_torch(shape: tuple[int, ...], placements: list[Any], tensors: int) -> tuple[list[int], list[int]]:
    """What torch's function reduces until its norm is known, and what distclip does."""
    mesh = init_device_mesh("cpu", shape)
    params = []
    for _ in range(tensors):
        params.append(nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh, placements)))
        params[-1].grad = distribute_tensor(torch.ones(8, 8), mesh, placements)
    distclip.grad_norm(params)
    torch.nn.utils.clip_grad_norm_(params, 1e30)
    with Wires() as theirs:
        norm = torch.nn.utils.clip_grad_norm_(params, 1e30)
    with Wires() as ours:
        same = distclip.grad_norm(params)
    assert isinstance(norm, DTensor)
    assert same.item() == pytest.approx(norm.full_tensor().item(), rel=1e-6)
    return theirs.sizes, ours.sizes


@ranks(4)
@pytest.mark.parametrize(
    ("shape", "placements", "collectives"),
    [((4,), [Shard(0)], 1), ((2, 2), [Replicate(), Shard(0)], 1), ((2, 2), [Shard(0), Shard(1)], 2)],
    ids=["FSDP2", "HSDP", "FSDP2 x TP"],
)
def test_what_torch_reduces_is_what_the_document_says(
    shape: tuple[int, ...], placements: list[Any], collectives: int
) -> None:
    theirs, ours = reduced_by_torch(shape, placements, 5)
    print(theirs, ours)
    assert theirs == [4 * 5] * collectives
    assert ours == [56]
