"""``audit``: the table, no finding where all is right, and every planted fault by name, ranks and cause."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import Audit, audit
from distclip.audit import full
from distclip.audit.findings import ranges
from distclip.plan import Plan, make_plan
from tests import oracle
from tests.layouts import LAYOUTS, Layout, build, each_layout
from tests.nets import Net, loss_of, make_batch, make_net
from tests.ranks import ranks, run_ranks
from tests.test_declare import Experts, fill, random


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def told(found: Audit, kind: str) -> str:
    """The messages of one kind."""
    return "\n".join(finding.message for finding in found.findings if finding.kind == kind)


def kinds(found: Audit) -> set[str]:
    return {finding.kind for finding in found.findings}


def same_everywhere(found: Audit) -> None:
    """All ranks must have found the same; collective."""
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, found.findings)
    assert all(findings == found.findings for findings in everybody)


def check_layout(layout: Layout, device: str) -> None:
    model = build(layout, device)
    before = oracle.whole_grads(model)
    grads = [param.grad for param in model.parameters()]
    truth = oracle.norm(before)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for group in (None, world()):
        found = audit(model, optimizer=optimizer, group=group)
        assert found.ok, str(found)
        assert found.backward
        assert found.slow_norm == pytest.approx(truth, rel=1e-6)
        assert found.total_norm == pytest.approx(truth, rel=1e-6)
    assert {row.name for row in found.rows} >= before.keys()
    # The very same gradient tensors, unchanged.
    assert all(param.grad is grad for param, grad in zip(model.parameters(), grads, strict=True))
    oracle.assert_same(oracle.whole_grads(model), before)


@each_layout
def test_layouts(layout: Layout, device: str) -> None:
    run_ranks(check_layout, layout.world_sizes[-1], layout, device=device)


TABLE = """\
rank 1, ranks 0-3 asked
name           shape  dtype    local shape  system           sharded over  replicated over  holders  gradient
shared         2      float32  2            plain            -             0-3              4        yes
dense.weight   5x4    float32  3x4          DTensor          1,3           0,1              2        yes
dense.bias     5      float32  3            DTensor          1,3           0,1              2        yes
expert.weight  3x4    float32  3x4          plain + declare  0,1           1,3              2        yes
No finding. Replicas are equal bit by bit, distinct pieces are not, nothing is counted twice or left out; the norm,
"""


class Mixed(nn.Module):
    """An HSDP layer, an expert, and a small tensor that all ranks share."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 5)
        self.expert = nn.Linear(4, 3, bias=False)
        self.shared = nn.Parameter(torch.ones(2))


@ranks(4)
def test_the_table() -> None:
    """Replicas on neighbouring ranks, shards on 0, 2 and on 1, 3; another expert on every second rank."""
    model = Mixed()
    mesh = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("replicate", "shard"))
    fully_shard(model.dense, mesh=mesh)
    distclip.declare(model.expert, sharded=mesh["replicate"])
    for seed, param in enumerate(model.dense.parameters()):
        assert isinstance(param, DTensor)
        param.grad = distribute_tensor(random(seed, *param.shape), param.device_mesh, param.placements)
    model.expert.weight.grad = random(10 + mesh.get_local_rank("replicate"), 3, 4)
    model.shared.grad = random(20, 2)
    found = audit(model)
    if dist.get_rank() == 1:
        assert str(found)[: len(TABLE)] == TABLE
    expert = found.rows[-1]
    assert expert.holders == 2
    assert expert.sharded == (((0, 1), (2, 3))[dist.get_rank() // 2],)


@ranks(2)
def test_the_table_in_the_readme() -> None:
    model = Experts(1)
    model.experts[0].register_parameter("bias", None)
    fill(model, dist.get_rank())
    found = audit(model, group=world())
    if dist.get_rank() == 0:
        assert str(found) in (Path(__file__).parent.parent / "README.md").read_text()


def staged(rank: int) -> nn.Sequential:
    """A stage of a model of two: names repeat, shapes do not."""
    stage = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 5))
    if rank:
        stage = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 7, bias=False))
    for seed, param in enumerate(stage.parameters()):
        param.grad = random(seed + 10 * rank, *param.shape)
    return stage


@ranks(2, 4)
def test_an_undeclared_expert(world_size: int) -> None:
    rank = dist.get_rank()
    model = Experts(2)
    fill(model, rank)
    assert audit(model).ok, "nothing connects these ranks"
    found = audit(model, group=world())
    same_everywhere(found)
    between = "ranks 0 and 1" if world_size == 2 else "ranks 0-3"
    message = told(found, "replicas").splitlines()[0]
    assert message.startswith(f"experts.0.weight differs between {between}, but nothing declares it sharded.")
    assert "distclip.declare(<experts.0.weight>, sharded=<the group of ranks 0" in message
    assert {finding.parameter for finding in found.findings if finding.kind == "replicas"} == {
        name for name, _ in model.named_parameters() if name.startswith("experts")
    }
    assert "(So it is with experts.0.bias, experts.1.weight, experts.1.bias.)" in " ".join(str(found).split())
    distclip.declare(model.experts, sharded=world())
    assert audit(model, group=world()).ok


@ranks(2)
def test_an_undeclared_expert_of_another_name_by_its_values() -> None:
    """Not called an expert, but the parameters differ as well: declare is the first advice. Else all-reduce is."""
    model = Experts(1, lora=True)
    fill(model, 0)
    model.lora.grad = random(5 + dist.get_rank(), 2, 3)
    assert "declares it sharded. If it is one parameter" in told(audit(model, group=world()), "replicas")
    with torch.no_grad():
        model.get_parameter("lora").add_(dist.get_rank())
    assert "declares it sharded. If each rank holds one" in told(audit(model, group=world()), "replicas")


@ranks(2)
def test_an_undeclared_expert_between_sharded_layers() -> None:
    """FSDP2's group connects the ranks, so that nobody needs to name one."""
    model = Experts(1)
    fully_shard(model.dense)
    model.dense(random(dist.get_rank(), 3, 4)).square().sum().backward()
    for param in model.experts.parameters():
        param.grad = random(dist.get_rank(), *param.shape)
    found = audit(model)
    same_everywhere(found)
    assert kinds(found) == {"replicas", "norm"}


@ranks(2)
def test_a_forgotten_pipeline_group() -> None:
    stage = staged(dist.get_rank())
    found = audit(stage, group=world())
    same_everywhere(found)
    shapes = told(found, "shapes")
    assert shapes.startswith(
        "0.weight has shape (7, 5), torch.float32 on rank 0, shape (6, 5), torch.float32 on rank 1 (1.weight likewise)"
    )
    assert "pass pipeline_group=<the group of ranks 0,1>" in shapes
    left_out = told(found, "left-out")
    assert "1.bias is on rank 0 only, and the norm on rank 1 leaves it out. If they are stages" in left_out
    assert "0.bias is on rank 1 only, and the norm on rank 0 leaves it out. If they are stages" in left_out
    assert audit(stage, pipeline_group=world()).ok


@ranks(4)
def test_a_forgotten_pipeline_group_over_sharded_stages() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = nn.Sequential(nn.Linear(6, 6), *([nn.Linear(6, 6)] if mesh.get_local_rank("pp") else []))
    fully_shard(stage, mesh=mesh["dp"])
    stage(random(dist.get_rank(), 3, 6)).square().sum().backward()
    found = audit(stage, group=world())
    same_everywhere(found)
    left_out, differing = told(found, "left-out"), told(found, "not-averaged")
    assert left_out.startswith("1.weight, 1.bias are on ranks 2,3 only, and the norm on ranks 0,1 leaves them out. If")
    assert " (0.weight, 0.bias): " in differing
    assert "If they are stages of a pipeline, pass pipeline_group=" in differing
    assert audit(stage).ok
    assert audit(stage, pipeline_group=mesh["pp"]).ok


@ranks(2)
def test_a_pipeline_group_that_one_rank_forgot() -> None:
    stage, rank = staged(dist.get_rank()), dist.get_rank()
    group = world() if rank == 0 else None
    found = audit(stage, pipeline_group=group, group=world())
    same_everywhere(found)
    assert "on rank 0, pipeline_group names ranks 0,1" in told(found, "pipeline")
    assert "on rank 1, no pipeline_group is named" in told(found, "pipeline")


@ranks(2, 4)
def test_a_forgotten_all_reduce(world_size: int) -> None:
    model = make_net()
    tokens, targets = make_batch()
    mine = slice(dist.get_rank(), None, world_size)
    loss_of(model, (tokens[mine], targets[mine])).backward()
    found = audit(model, group=world())
    same_everywhere(found)
    message = told(found, "not-averaged")
    between = "ranks 0 and 1" if world_size == 2 else "ranks 0-3"
    assert message.startswith(f"no gradient agrees between {between} (scale, embed.weight, blocks.0.norm.weight and 9")
    assert "they were not averaged over the ranks. Wrap the model in DistributedDataParallel, or all-reduce" in message
    for param in model.parameters():
        if param.grad is not None:
            dist.all_reduce(param.grad)
    assert audit(model, group=world()).ok


@ranks(2)
def test_ddp_without_its_averaging() -> None:
    model = DistributedDataParallel(make_net())
    tokens, targets = make_batch()
    with model.no_sync():
        loss_of(model, (tokens[dist.get_rank() :: 2], targets[dist.get_rank() :: 2])).backward()
    found = audit(model)
    same_everywhere(found)
    assert told(found, "unreduced").startswith("on ranks 0,1, DDP has not averaged these gradients")
    assert "outside no_sync()" in told(found, "not-averaged")


@ranks(2)
@pytest.mark.parametrize("name", ["fsdp1-full_shard-flat", "fsdp2"])
def test_gradients_that_fsdp_has_not_reduced(name: str) -> None:
    model = LAYOUTS[name].wrap(make_net())
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        loss_of(model, make_batch()).backward()
        found = audit(model)
    else:
        with model.no_sync():  # type: ignore[operator]
            loss_of(model, make_batch()).backward()
            found = audit(model)
    same_everywhere(found)
    assert "has not reduced these" in told(found, "unreduced") or "not reduced over" in told(found, "unreduced")
    assert found.total_norm is None


@ranks(2)
def test_a_tied_weight_counted_twice() -> None:
    """Under another name on each stage; both hold the summed gradient."""
    rank = dist.get_rank()
    stage = staged(rank)
    stage[rank].register_parameter("weight", nn.Parameter(torch.zeros(7, 6)))
    tied = stage.get_parameter(f"{rank}.weight")
    tied.grad = random(3, 7, 6)
    found = audit(stage, pipeline_group=world())
    same_everywhere(found)
    assert told(found, "counted-twice").startswith(
        "0.weight on rank 0 and 1.weight on rank 1 have the same gradient: if they are one tied tensor, it counts 2 "
        "times. Say so on each of them: distclip.declare(<the tied parameter>, replicated=<the group of ranks 0,1>)"
    )
    distclip.declare(tied, replicated=world())
    assert audit(stage, pipeline_group=world()).ok


@ranks(2)
def test_one_tensor_declared_to_be_many() -> None:
    model = Experts(1, lora=True)
    fill(model, dist.get_rank())
    distclip.declare([*model.experts.parameters(), model.lora], sharded=world())
    found = audit(model)
    same_everywhere(found)
    assert kinds(found) == {"equal-places"}
    assert "lora is declared sharded, but its gradient is the same on ranks 0,1: it counts 2 times" in str(found)


@ranks(2)
def test_biases_of_experts_whose_gradients_are_equal() -> None:
    """As under a loss that is linear in them: other values tell that they are not one tensor."""
    torch.manual_seed(dist.get_rank())
    expert = nn.Linear(4, 2)
    model = nn.Sequential(expert)
    distclip.declare(expert, sharded=world())
    model(torch.randn(5, 4)).mul(torch.tensor([1.0, 2.0])).sum().backward()
    assert expert.bias.grad is not None
    assert expert.bias.grad.tolist() == [5.0, 10.0]
    found = audit(model, group=world())
    assert found.ok, str(found)
    with torch.no_grad():
        expert.bias.fill_(1.0)
    found = audit(model, group=world())
    assert kinds(found) == {"equal-places"}
    assert "0.bias is declared sharded, but its gradient is the same" in told(found, "equal-places")


@ranks(2)
def test_whole_tensors_given_out_as_pieces() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for shape in ((4, 3), (6,)):
        param = nn.Parameter(DTensor.from_local(torch.zeros(shape), mesh, [Shard(0)]))
        param.grad = DTensor.from_local(random(1, *shape), mesh, [Shard(0)])
        found = audit(nn.ParameterList([param]))
        assert "0 is cut over ranks 0,1, says DTensor, but all pieces are equal" in told(found, "equal-pieces")
    # Rows that are equal by themselves prove nothing: this is what a sum as loss leaves.
    stage = nn.Linear(6, 4)
    fully_shard(stage)
    stage(random(0, 3, 6)).sum().backward()
    assert audit(stage).ok
    distclip.GradClipper(stage).clip()


def test_tied_by_memory_only() -> None:
    model = make_net()
    model.head.weight = nn.Parameter(model.embed.weight.data)
    loss_of(model, make_batch()).backward()
    found = audit(model)
    assert kinds(found) == {"shared-memory"}
    assert "embed.weight and head.weight are two parameters in one memory" in str(found)


def test_an_optimizer_with_the_parameters_of_before() -> None:
    model = make_net()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    loss_of(model, make_batch()).backward()
    assert audit(model, optimizer=optimizer).ok
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    found = audit(model, optimizer=[optimizer])
    assert kinds(found) == {"optimizer-stale", "optimizer-misses"}
    assert "(12, of shape (1,), (11, 5), (5,) and 9 more)" in told(found, "optimizer-stale")
    assert "replaced after the optimizer was made" in told(found, "optimizer-stale")
    assert "scale, embed.weight, blocks.0.norm.weight and 10 more are in no optimizer" in told(
        found, "optimizer-misses"
    )


@ranks(2)
def test_a_gradient_that_one_rank_lacks() -> None:
    model = Experts(1)
    fill(model, 0)
    if dist.get_rank() == 1:
        model.dense.bias.grad = None
    found = audit(model, group=world())
    same_everywhere(found)
    assert told(found, "missing").startswith("dense.bias has a gradient on rank 0 but none on rank 1, which hold the")


@ranks(2)
def test_experts_without_tokens_and_a_rank_without_any_gradient() -> None:
    model = Experts(2)
    fill(model, dist.get_rank())
    distclip.declare(model.experts, sharded=world())
    if dist.get_rank() == 1:
        model.experts.zero_grad()
    assert audit(model).ok
    model = Experts(1)
    fully_shard(model.dense)
    model.dense(random(dist.get_rank(), 3, 4)).square().sum().backward()
    if dist.get_rank() == 1:
        model.zero_grad()
    found = audit(model, group=world())
    assert found.ok, str(found)
    assert [row.gradient for row in found.rows] == [dist.get_rank() == 0] * 2 + [False] * 2


@ranks(2)
def test_a_rank_without_parameters() -> None:
    stage: nn.Module = staged(0) if dist.get_rank() else nn.Identity()
    found = audit(stage, pipeline_group=world())
    assert found.ok, str(found)
    assert len(found.rows) == (3 if dist.get_rank() else 0)
    assert "1.weight, 1.bias are on rank 1 only" in told(audit(stage, group=world()), "left-out").replace(
        "0.weight, ", ""
    )


@ranks(1, 2)
def test_before_a_backward() -> None:
    model = make_net()
    found = audit(model, group=world())
    assert found.ok
    assert (found.backward, found.total_norm, found.slow_norm) == (False, None, None)
    assert "No rank has a gradient" in str(found)
    assert not any(row.gradient for row in found.rows)


@ranks(2)
def test_tolerance() -> None:
    model = Experts(1)
    fill(model, 0)
    assert model.dense.weight.grad is not None
    model.dense.weight.grad *= 1 + 1e-6 * dist.get_rank()
    found = audit(model, group=world())
    assert "if it is rounding, audit(..., tolerance=) accepts it" in told(found, "replicas")
    found = audit(model, group=world(), tolerance=1e-5)
    assert found.ok, str(found)
    assert "Replicas are equal within 1e-05" in str(found)
    assert kinds(audit(model, group=world(), tolerance=1e-8)) >= {"replicas"}
    with pytest.raises(RuntimeError, match=r"disagree.*\n.*rank 0: audit with tolerance=0\.0.*\n.*rank 1: .*0\.1"):
        audit(model, group=world(), tolerance=0.1 * dist.get_rank())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tolerance": -1.0}, ValueError, "tolerance must be at least 0, got -1"),
        ({"tolerance": math.nan}, ValueError, "tolerance must be at least 0, got nan"),
        ({"model": torch.ones(1)}, TypeError, r"model must be a torch\.nn\.Module"),
        ({"optimizer": "sgd"}, TypeError, "optimizer must be a torch.optim.Optimizer"),
        ({"group": "world"}, TypeError, "group must be a ProcessGroup or a 1-D DeviceMesh"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        audit(**{"model": nn.Linear(1, 1), **arguments})


def sparse(param: nn.Parameter, seed: int) -> torch.Tensor:
    rows = torch.tensor([[0, 2, 0]])
    return torch.sparse_coo_tensor(rows, random(seed, 3, param.shape[1]), param.shape, check_invariants=True)


GRADIENTS: dict[str, tuple[torch.dtype, Callable[[nn.Parameter, int], torch.Tensor]]] = {
    "bf16": (torch.bfloat16, lambda param, seed: random(seed, *param.shape).bfloat16()),
    "complex": (torch.complex64, lambda param, seed: torch.complex(random(seed, 4, 3), random(seed + 50, 4, 3))),
    "sparse": (torch.float32, sparse),
    "transposed": (torch.float32, lambda param, seed: random(seed, 3, 4).t()),
    "nan": (torch.float32, lambda param, seed: torch.full((4, 3), math.nan)),
}


@ranks(2)
@pytest.mark.parametrize("kind", GRADIENTS.keys())
def test_gradients_of_all_kinds(kind: str) -> None:
    dtype, make = GRADIENTS[kind]
    param = nn.Parameter(torch.zeros(4, 3, dtype=dtype))
    model = nn.ParameterList([param])
    grad = param.grad = make(param, 1)
    found = audit(model, group=world())
    assert found.ok, str(found)
    assert param.grad is grad
    if kind != "nan":
        assert found.total_norm == pytest.approx(oracle.norm(oracle.whole_grads(model)), rel=1e-6)
        param.grad = make(param, 1 + dist.get_rank())
        assert kinds(audit(model, group=world())) == {"not-averaged", "norm"}
        assert kinds(audit(model, group=world(), tolerance=1e-3)) == {"not-averaged", "norm"}


@ranks(2)
@pytest.mark.parametrize("size", [4, 1 << 18])
def test_partial_gradients(size: int) -> None:
    """Small ones ride in the norm's all-reduce, large ones are reduced before a clip. An audit leaves them be."""
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(distribute_tensor(torch.zeros(size), mesh, [Replicate()]))
    param.grad = DTensor.from_local(random(dist.get_rank(), size), mesh, [Partial()])
    grad = param.grad
    found = audit(nn.ParameterList([param]))
    assert found.ok, str(found)
    whole = random(0, size).double() + random(1, size).double()
    assert found.slow_norm == pytest.approx(whole.norm().item(), rel=1e-6)
    assert param.grad is grad


@ranks(2)
def test_ranks_that_disagree_on_a_tensor() -> None:
    """What a clip raises, an audit tells."""
    mesh = init_device_mesh("cpu", (2,))
    size = 4 + 2 * dist.get_rank()
    model = nn.Linear(2, 2)
    fully_shard(model)
    model.register_parameter("other", nn.Parameter(torch.ones(size)))
    model(torch.ones(1, 2)).square().sum().backward()
    found = audit(model, group=mesh)
    same_everywhere(found)
    assert kinds(found) == {"shapes"}
    assert "other has shape (4,), torch.float32 on rank 0, shape (6,)" in str(found)
    assert found.total_norm is None


@ranks(4)
def test_two_models_on_two_halves() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("model", "dp"))
    if dist.get_rank() >= 2:
        return
    model = DistributedDataParallel(make_net(), process_group=mesh.get_group("dp"))
    loss_of(model, make_batch()).backward()
    found = audit(model)
    assert found.ok
    assert found.ranks == (0, 1)


@ranks(4)
def test_replicas_of_stages_and_of_experts() -> None:
    """pp x dp without a wrapper, and experts that repeat over half of the ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    stage = staged(mesh.get_local_rank("outer"))
    found = audit(stage, pipeline_group=mesh["outer"], group=mesh["inner"])
    assert found.ok, str(found)
    assert found.ranks == (0, 1, 2, 3)
    assert {row.holders for row in found.rows} == {2}
    model = Experts(1)
    fill(model, mesh.get_local_rank("inner"))
    distclip.declare(model.experts, sharded=mesh["inner"])
    assert audit(model, group=world()).ok
    if dist.get_rank() == 3:
        grad = model.get_parameter("experts.0.weight").grad
        assert grad is not None
        grad *= 2
    found = audit(model, group=world())
    assert "experts.0.weight differs between ranks 1 and 3" in told(found, "replicas")


@ranks(2)
def test_a_norm_that_cannot_be_computed() -> None:
    model = nn.Linear(2, 2, dtype=torch.float64)
    distclip.declare(model, sharded=world())
    for param in model.parameters():
        param.grad = torch.full_like(param, 1e200)
    found = audit(model)
    assert "the norm cannot be computed: on rank 0, norm_type=2.0" in told(found, "no-norm")


@ranks(2)
def test_a_mistake_of_distclip_s_own() -> None:
    """A plan that counts replicas once for every rank: nothing but the gathered norm can tell."""
    model = build(LAYOUTS["fsdp2-ignored"])

    def wrong(*args: Any, **kwargs: Any) -> Plan:
        plan = make_plan(*args, **kwargs)
        return replace(plan, shares=torch.ones_like(plan.shares))

    setattr(full, "make_plan", wrong)  # noqa: B010  # the rank's process ends with the test
    found = audit(model)
    same_everywhere(found)
    assert kinds(found) == {"norm"}
    assert "Nothing else is wrong: please report it to distclip." in told(found, "norm")


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((), ""), ((3,), "3"), ((0, 1), "0,1"), ((0, 1, 2), "0-2"), ((5, 0, 1, 2, 7), "0-2,5,7"), ((0, 2, 4), "0,2,4")],
)
def test_ranges(numbers: tuple[int, ...], text: str) -> None:
    assert ranges(numbers) == text


def test_without_a_process_group() -> None:
    model: Net = make_net()
    loss_of(model, make_batch()).backward()
    found = audit([model])
    assert found.ok
    assert found.ranks == (0,)
    assert found.total_norm == pytest.approx(oracle.norm(oracle.whole_grads(model)), rel=1e-6)
    assert audit(nn.Identity()).ok
