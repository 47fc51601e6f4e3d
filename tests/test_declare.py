"""Expert parallel and hand-made shards: what only the user knows."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import GradClipper
from distclip.layout import layout_of
from tests import oracle
from tests.collectives import recorded_collectives
from tests.ranks import ranks


class Experts(nn.Module):
    """Dense weights that all ranks share, and this rank's experts, whose names repeat from rank to rank."""

    def __init__(self, experts: int, lora: bool = False) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(3, 2) for _ in range(experts))
        if lora:
            self.lora = nn.Parameter(torch.zeros(2, 3))


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fill(model: Experts, place: int, first: int = 100) -> oracle.Whole:
    """Give dense tensors the same gradients everywhere and experts those of their place; returns this place's."""
    for seed, (name, param) in enumerate(model.named_parameters()):
        own = 1000 * (place + 1) if name.startswith("experts") else 0
        param.grad = random(first + seed + own, *param.shape)
    return {name: p.grad.double().numpy().copy() for name, p in model.named_parameters() if p.grad is not None}


def job(local: oracle.Whole, place: int) -> oracle.Whole:
    """All tensors of the job: dense ones once, experts of each place under names of their own; collective."""
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, (place, local))
    return {
        f"{name} of {where}" if name.startswith("experts") else name: grad
        for where, grads in everybody
        for name, grad in grads.items()
    }


def check(model: nn.Module, truth: oracle.Whole, local: oracle.Whole) -> None:
    norm = oracle.norm(truth)
    assert distclip.clip_grad_norm_(model, norm / 4).item() == pytest.approx(norm, rel=1e-6)
    factor = norm / 4 / (norm + 1e-6)
    oracle.assert_same(oracle.whole_grads(model), {name: grad * factor for name, grad in local.items()})
    with recorded_collectives() as names:
        distclip.grad_norm(model)
    assert names == ["allreduce_"]


@ranks(2, 4)
def test_plain_experts() -> None:
    place = dist.get_rank()
    model = Experts(2)
    local = fill(model, place)
    distclip.declare(model.experts, sharded=dist.group.WORLD)
    check(model, job(local, place), local)


@ranks(4)
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "ddp"])
def test_experts_on_half_of_the_data_parallel_ranks(wrapped: bool) -> None:
    """dp = 4, ep = 2: each expert is on two ranks, dense weights are on four."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep"))
    place = mesh.get_local_rank("ep")
    model = Experts(2)
    local = fill(model, place)
    distclip.declare(model.experts, sharded=mesh["ep"])
    truth = job(local, place)
    if wrapped:
        names = [name for name, _ in model.named_parameters() if name.startswith("experts")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        check(DistributedDataParallel(model), truth, local)
    else:
        check(model, truth, local)


@ranks(2, 4)
def test_experts_without_tokens() -> None:
    """On rank 1 no expert has a gradient, on rank 0 one has none: nobody hangs, nothing is counted twice."""
    place = dist.get_rank()
    model = Experts(2)
    fill(model, place)
    idle = {0: ["experts.1.bias"], 1: [name for name, _ in model.named_parameters() if name.startswith("experts")]}
    for name, param in model.named_parameters():
        if name in idle.get(place, []):
            param.grad = None
    local = oracle.whole_grads(model)
    distclip.declare(model.experts, sharded=dist.group.WORLD)
    check(model, job(local, place), local)


@ranks(2)
def test_small_replicated_parameters_beside_experts() -> None:
    """LoRA factors inside the expert module, equal on all expert ranks: declared so, or simply not declared."""
    place = dist.get_rank()
    model = Experts(1, lora=True)
    local = fill(model, place)
    distclip.declare(model.experts, sharded=dist.group.WORLD)
    truth = job(local, place)
    check(model, truth, local)
    distclip.declare(model.lora, replicated=dist.group.WORLD)
    local = fill(model, place)
    check(model, truth, local)


@ranks(4)
@pytest.mark.parametrize("shown", [True, False], ids=["mesh shows ep", "mesh hides ep"])
def test_expert_dtensors(shown: bool) -> None:
    """Dense DTensors on all ranks, experts sharded on (ep, efsdp); or on efsdp alone, and ep declared."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "efsdp"))
    flat = init_device_mesh("cpu", (4,))
    place = grid.get_local_rank("ep")
    dense = nn.Parameter(distribute_tensor(random(0, 6, 3), flat, [Shard(0)]))
    dense.grad = distribute_tensor(random(1, 6, 3), flat, [Shard(0)])
    if shown:
        stacked = random(2, 4, 3, 2)
        expert = nn.Parameter(distribute_tensor(stacked, grid, [Shard(0), Shard(1)]))
        expert.grad = distribute_tensor(stacked, grid, [Shard(0), Shard(1)])
        whole = {"dense": random(1, 6, 3).double().numpy(), "expert": stacked.double().numpy()}
    else:
        mine = random(10 + place, 5, 2)
        expert = nn.Parameter(distribute_tensor(mine, grid["efsdp"], [Shard(0)]))
        expert.grad = distribute_tensor(mine, grid["efsdp"], [Shard(0)])
        distclip.declare(expert, sharded=grid["ep"])
        whole = {f"expert {other}": random(10 + other, 5, 2).double().numpy() for other in range(2)}
        whole["dense"] = random(1, 6, 3).double().numpy()
    check_params([dense, expert], whole)


def check_params(params: list[nn.Parameter], whole: oracle.Whole) -> None:
    truth = oracle.norm(whole)
    local = [p.grad._local_tensor.clone() if isinstance(p.grad, DTensor) else p.grad for p in params]
    assert distclip.clip_grad_norm_(params, truth / 2).item() == pytest.approx(truth, rel=1e-6)
    for param, before in zip(params, local, strict=True):
        after = param.grad._local_tensor if isinstance(param.grad, DTensor) else param.grad
        assert after is not None
        assert before is not None
        torch.testing.assert_close(after, before / 2, rtol=1e-5, atol=1e-7)


@ranks(4)
def test_a_module_sharded_on_one_axis_and_replicated_over_the_other() -> None:
    """Its mesh does not show ep: by contract it is replicated there."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "efsdp"))
    flat = init_device_mesh("cpu", (4,))
    on_all, on_half = nn.Linear(5, 3), nn.Linear(5, 3)
    for module in (on_all, on_half):
        nn.init.constant_(module.weight, 0.5)
    fully_shard(on_all, mesh=flat)
    fully_shard(on_half, mesh=grid["efsdp"])
    params = [*on_all.parameters(), *on_half.parameters()]
    whole = {}
    for seed, param in enumerate(params):
        assert isinstance(param, DTensor)
        grad = random(seed, *param.shape)
        whole[str(seed)] = grad.double().numpy()
        param.grad = distribute_tensor(grad, param.device_mesh, param.placements)
    check_params(params, whole)


@ranks(2)
@pytest.mark.parametrize("joined", [True, False])
def test_hand_made_shards(joined: bool) -> None:
    """Megatron's: a plain tensor on each rank is a piece of one. `joined` decides whose norm ClipByNorm takes."""
    model = nn.Linear(3, 4, bias=False)
    model.weight.grad = random(dist.get_rank(), 4, 3)
    distclip.declare(model, sharded=dist.group.WORLD, joined=joined)
    pieces = {str(rank): random(rank, 4, 3).double().numpy() for rank in range(2)}
    both = oracle.norm(pieces)
    assert distclip.grad_norm(model).item() == pytest.approx(both, rel=1e-6)
    own = oracle.norm({"": pieces[str(dist.get_rank())]})
    distclip.GradClipper(model, distclip.ClipByNorm(0.5)).clip()
    expected = random(dist.get_rank(), 4, 3) * (0.5 / (both if joined else own))
    torch.testing.assert_close(model.weight.grad, expected)


@ranks(2)
def test_contradictions_and_other_mistakes() -> None:
    world = dist.group.WORLD
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Linear(4, 4)
    sharded = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
    replicas = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Replicate()]))
    ddp = DistributedDataParallel(nn.Linear(2, 2))
    distclip.grad_norm(ddp)
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (model, {}, ValueError, "needs sharded= or replicated="),
        (model, {"sharded": world, "replicated": mesh}, ValueError, r"name the same ranks \(0, 1\)"),
        (model, {"replicated": world, "joined": True}, ValueError, "joined=True"),
        (model, {"sharded": "ep"}, TypeError, "sharded must be a ProcessGroup or a 1-D DeviceMesh, got str"),
        (3, {"sharded": world}, TypeError, "parameters must be a module"),
        (sharded, {"sharded": world}, ValueError, "DTensor shards it over those ranks itself"),
        (sharded, {"replicated": mesh}, ValueError, "DTensor shards it over those ranks"),
        (replicas, {"sharded": world}, ValueError, "DTensor holds the same piece on those ranks"),
        (ddp, {"sharded": world}, ValueError, "DDP holds the same piece on those ranks"),
    ]
    for parameters, arguments, error, message in cases:
        with pytest.raises(error, match=message):
            distclip.declare(parameters, **arguments)
    distclip.declare(model, sharded=world)
    distclip.declare(model, sharded=mesh)
    with pytest.raises(ValueError, match=r"declared otherwise already .* undeclare"):
        distclip.declare(model, replicated=world)
    distclip.undeclare(model)
    distclip.declare(model, replicated=world)
    distclip.undeclare([model])
    distclip.undeclare(sharded)


@ranks(2)
def test_a_declaration_after_the_first_clip_counts_from_the_next() -> None:
    model = Experts(1)
    local = fill(model, dist.get_rank())
    clipper = distclip.GradClipper(model, float("inf"))
    assert clipper.clip().total_norm.item() == pytest.approx(oracle.norm(local), rel=1e-6)
    distclip.declare(model.experts, sharded=dist.group.WORLD)
    local = fill(model, dist.get_rank())
    truth = oracle.norm(job(local, dist.get_rank()))
    assert clipper.clip().total_norm.item() == pytest.approx(truth, rel=1e-6)
    distclip.undeclare(model.experts)
    local = fill(model, dist.get_rank())
    assert clipper.clip().total_norm.item() == pytest.approx(oracle.norm(local), rel=1e-6)


@ranks(2)
def test_a_declaration_is_carried_over_to_replaced_parameters() -> None:
    model = Experts(1)
    distclip.declare(model.experts, sharded=dist.group.WORLD)
    clipper = GradClipper(model, float("inf"))
    fill(model, dist.get_rank())
    clipper.clip()
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    local = fill(model, dist.get_rank())
    truth = oracle.norm(job(local, dist.get_rank()))
    assert clipper.clip().total_norm.item() == pytest.approx(truth, rel=1e-6)


@ranks(4)
def test_a_declaration_elsewhere_does_not_unsettle_this_model() -> None:
    """Declaring another model on half of the ranks costs this one no handshake, which the others would not join."""
    model = Experts(1)
    fill(model, dist.get_rank())
    distclip.declare(model.experts, sharded=dist.group.WORLD)
    distclip.grad_norm(model)
    half = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        distclip.declare(nn.Linear(2, 2), sharded=half)
    distclip.declare(model.experts, sharded=dist.group.WORLD)
    with recorded_collectives() as names:
        distclip.grad_norm(model)
    assert names == ["allreduce_"]


@ranks(2)
def test_ddp_that_ignores_the_experts() -> None:
    model = Experts(1)
    names = [name for name, _ in model.named_parameters() if name.startswith("experts")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    local = fill(model, dist.get_rank())
    ddp = DistributedDataParallel(model)
    distclip.declare(model.experts, sharded=dist.group.WORLD)
    check(ddp, job(local, dist.get_rank()), local)


@ranks(2)
def test_a_declaration_ends_with_its_parameter() -> None:
    import gc

    from distclip.layout import declared

    model = nn.Linear(2, 2)
    distclip.declare(model, sharded=dist.group.WORLD)
    assert layout_of(model.weight).apart
    before = len(declared._declared)
    del model
    gc.collect()
    assert len(declared._declared) == before - 2
