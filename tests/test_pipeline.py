"""Pipeline parallel: stages on ranks, tied embeddings, stages without parameters or gradients, real schedules."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.nn.parallel import DistributedDataParallel

import distclip
from tests import oracle
from tests.collectives import recorded_collectives
from tests.nets import Block
from tests.ranks import ranks

VOCABULARY = 11


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.embed(tokens)
        return out


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out


def make_layers(tied: bool = False) -> list[nn.Module]:
    """Embedding, blocks, head; with `tied`, embedding and head start equal (two tensors, as two stages hold them)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers: list[nn.Module] = [First(), Block(), Block(), Last()]
    if tied:
        head, embed = layers[3].head, layers[0].embed
        assert isinstance(head, nn.Linear)
        assert isinstance(embed, nn.Embedding)
        head.weight = nn.Parameter(embed.weight.detach().clone())
    return layers


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (8, 6), generator=generator), torch.randint(
        VOCABULARY, (8, 6), generator=generator
    )


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return 10 * nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def whole_model(tied: bool = False) -> oracle.Whole:
    """The truth: one process, all layers, the whole batch."""
    layers = make_layers(tied)
    model = nn.Sequential(*layers)
    if tied:
        layers[3].head.weight = layers[0].embed.weight  # type: ignore[union-attr]
    tokens, targets = batch()
    loss_of(model(tokens), targets).backward()
    return oracle.whole_grads(model)


def give_grads(stage: nn.Module, stages: list[list[int]], place: int) -> None:
    """The gradients of the whole model, as the stage of layers `stages[place]` has them after its schedule."""
    everything = nn.Sequential(*make_layers())
    tokens, targets = batch()
    loss_of(everything(tokens), targets).backward()
    mine = nn.ModuleList(everything[layer] for layer in stages[place])
    for param, source in zip(stage.parameters(), mine.parameters(), strict=True):
        assert source.grad is not None
        param.grad = source.grad.clone()


def stage_of(stages: list[list[int]], place: int) -> nn.ModuleList:
    layers = make_layers()
    stage = nn.ModuleList(layers[layer] for layer in stages[place])
    give_grads(stage, stages, place)
    return stage


def check(stage: Any, before: oracle.Whole, group: Any, p: float = 2.0) -> None:
    """Norm on this rank, clipped gradients of this stage, one all-reduce."""
    truth = oracle.norm(before, p)
    local = oracle.whole_grads(nn.ModuleList(stage)) if isinstance(stage, list) else oracle.whole_grads(stage)
    clipper = distclip.GradClipper(stage, distclip.ClipByGlobalNorm(truth / 3, p), pipeline_group=group)
    report = clipper.clip()
    assert report.total_norm.item() == pytest.approx(truth, rel=1e-6)
    after = oracle.whole_grads(nn.ModuleList(stage)) if isinstance(stage, list) else oracle.whole_grads(stage)
    oracle.assert_same(after, {name: grad * ((truth / 3) / (truth + 1e-6)) for name, grad in local.items()})
    with recorded_collectives() as names:
        norm = distclip.grad_norm(stage, p, pipeline_group=group)
        assert norm.item() == pytest.approx(truth / 3, rel=1e-5)
        distclip.grad_norm(stage, p, pipeline_group=group)
    assert names[-1] == "allreduce_"


@ranks(2, 4)
@pytest.mark.parametrize("p", [2.0, 1.0, math.inf, 3.5])
def test_plain_stages(p: float, world_size: int) -> None:
    stages = [[0, 1], [2, 3]] if world_size == 2 else [[0], [1], [2], [3]]
    stage = stage_of(stages, dist.get_rank())
    check(stage, whole_model(), dist.group.WORLD, p)


@ranks(2)
def test_by_a_device_mesh() -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    check(stage_of([[0, 1], [2, 3]], dist.get_rank()), whole_model(), mesh["pp"])


@ranks(2)
def test_interleaved_stages() -> None:
    """Two stages a rank, given as a list of modules whose names repeat."""
    layers = [0, 2] if dist.get_rank() == 0 else [1, 3]
    check([stage_of([[layer]], 0) for layer in layers], whole_model(), dist.group.WORLD)


@ranks(4)
@pytest.mark.parametrize("data", ["ddp", "fsdp2", "plain"])
def test_stages_with_data_parallelism(data: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stages = [[0, 1], [2, 3]]
    place = mesh.get_local_rank("pp")
    stage: nn.Module = nn.Sequential(*(make_layers()[layer] for layer in stages[place]))
    if data == "fsdp2":
        fully_shard(stage, mesh=mesh["dp"])
        reference = stage_of(stages, place)
        for param, source in zip(stage.parameters(), reference.parameters(), strict=True):
            assert source.grad is not None
            param.grad = torch.distributed.tensor.distribute_tensor(
                source.grad, mesh["dp"], [torch.distributed.tensor.Shard(0)]
            )
    else:
        give_grads(stage, stages, place)
        if data == "ddp":
            stage = DistributedDataParallel(stage, process_group=mesh.get_group("dp"))
    check(stage, whole_model(), mesh["pp"])


@ranks(4)
def test_tensor_parallel_stages_with_plain_norms() -> None:
    """DTensor linears and plain norms on each stage: FIELD's pipeline x TP."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = [Block(hidden=8), Block(hidden=8)]
    whole = copy.deepcopy(nn.ModuleList(blocks))
    stage = blocks[mesh.get_local_rank("pp")]
    parallelize_module(stage, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    for block in (*whole, stage):
        block(x).square().sum().backward()
    check(stage, oracle.whole_grads(whole), mesh["pp"])


@ranks(2, 4)
def test_tied_embedding_counts_once(world_size: int) -> None:
    """Both copies hold the sum of their gradients, as an all-reduce over the embedding group leaves them."""
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("pp", "dp"))
    place = mesh.get_local_rank("pp")
    stages = [[0, 1], [2, 3]]
    stage = nn.ModuleList(make_layers(tied=True)[layer] for layer in stages[place])
    truth = whole_model(tied=True)
    layers = nn.Sequential(*make_layers(tied=True))
    tokens, targets = batch()
    loss_of(layers(tokens), targets).backward()
    for param, source in zip(
        stage.parameters(), nn.ModuleList(layers[i] for i in stages[place]).parameters(), strict=True
    ):
        param.grad = source.grad
    tied = stage.get_parameter("0.embed.weight" if place == 0 else "1.head.weight")
    dist.all_reduce(tied.grad, group=mesh.get_group("pp"))
    undeclared = distclip.grad_norm(stage, pipeline_group=mesh["pp"]).item()
    assert undeclared > 1.01 * oracle.norm(truth)
    distclip.declare(tied, replicated=mesh["pp"])
    check(stage, truth, mesh["pp"])
    report = distclip.GradClipper(stage, distclip.ClipByNorm(1e-3), pipeline_group=mesh["pp"]).clip()
    assert report.per_tensor is not None
    distclip.undeclare(tied)


@ranks(2)
@pytest.mark.parametrize("rule", [distclip.ClipByGlobalNorm(1.0), distclip.ClipByNorm(0.5), distclip.ClipByValue(0.1)])
def test_a_stage_without_parameters_and_one_without_gradients(rule: distclip.Rule) -> None:
    everything = nn.Sequential(*make_layers())
    tokens, targets = batch()
    loss_of(everything(tokens), targets).backward()
    before = oracle.whole_grads(everything)
    if dist.get_rank() == 0:
        report = distclip.GradClipper(nn.Identity(), rule, pipeline_group=dist.group.WORLD).clip()
    else:
        report = distclip.GradClipper(everything, rule, pipeline_group=dist.group.WORLD).clip()
    assert report.total_norm.item() == pytest.approx(oracle.norm(before), rel=1e-6)
    # Frozen on one stage: the other's gradients are all there are.
    stage = stage_of([[0, 1], [2, 3]], dist.get_rank())
    if dist.get_rank() == 0:
        for param in stage.parameters():
            param.requires_grad_(False)
            param.grad = None
    truth = {name: grad for name, grad in whole_model().items() if name.startswith(("2.", "3."))}
    report = distclip.GradClipper(stage, rule, pipeline_group=dist.group.WORLD).clip()
    assert report.total_norm.item() == pytest.approx(oracle.norm(truth), rel=1e-6)


@ranks(2)
def test_drop_in_functions_on_a_stage_without_parameters() -> None:
    everything = nn.Sequential(*make_layers())
    loss_of(everything(batch()[0]), batch()[1]).backward()
    truth = oracle.norm(oracle.whole_grads(everything))
    stage = everything if dist.get_rank() else nn.Identity()
    for _ in range(3):
        norm = distclip.grad_norm(stage, pipeline_group=dist.group.WORLD)
        assert norm.item() == pytest.approx(truth, rel=1e-6)


@ranks(2)
def test_one_rank_knows_another_group_of_the_same_ranks() -> None:
    """Rank 1 forgot to declare: the tied tensor has two names then, and nobody waits in a group of his own."""
    embedding, pipeline = dist.new_group([0, 1]), dist.new_group([0, 1])
    stage = stage_of([[0, 1], [2, 3]], dist.get_rank())
    if dist.get_rank() == 0:
        distclip.declare(stage.get_parameter("0.embed.weight"), replicated=embedding)
    assert distclip.grad_norm(stage, pipeline_group=pipeline).isfinite()


@ranks(2)
def test_norms_per_tensor_of_stages_that_reuse_names() -> None:
    """Stage 0's "0.weight" is another tensor than stage 1's: each is clipped by its own norm."""
    with torch.random.fork_rng():
        torch.manual_seed(dist.get_rank())
        stage = nn.Sequential(nn.Linear(4, 4, bias=False))
        stage[0].weight.grad = torch.randn(4, 4) * (1 + dist.get_rank())
    before = oracle.whole_grads(stage)
    report = distclip.GradClipper(stage, distclip.ClipByNorm(1.0), pipeline_group=dist.group.WORLD).clip()
    oracle.assert_same(oracle.whole_grads(stage), oracle.clip_by_norm(before, 1.0))
    assert report.per_tensor is not None
    assert report.per_tensor["0.weight"].item() == pytest.approx(oracle.norm(before), rel=1e-6)


def run_schedule(interleaved: bool) -> list[nn.Module]:
    rank, device = dist.get_rank(), torch.device("cpu")
    places = [[0, 2], [1, 3]][rank] if interleaved else [rank]
    parts = [[0], [1], [2], [3]] if interleaved else [[0, 1], [2, 3]]
    modules = [nn.Sequential(*(make_layers()[layer] for layer in parts[place])) for place in places]
    stages = [PipelineStage(m, place, len(parts), device) for m, place in zip(modules, places, strict=True)]
    tokens, targets = batch()
    schedule: Any = (
        ScheduleInterleaved1F1B([*stages], 4, loss_fn=loss_of)
        if interleaved
        else Schedule1F1B(stages[0], 4, loss_fn=loss_of)
    )
    if rank == 0:
        schedule.step(tokens)
    else:
        schedule.step(target=targets)
    return list(modules)


@ranks(2)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("interleaved", [False, True])
def test_real_schedules(interleaved: bool) -> None:
    """torch.distributed.pipelining, against one process on the whole batch."""
    modules = run_schedule(interleaved)
    truth = oracle.norm(whole_model())
    report = distclip.GradClipper(modules, truth / 2, pipeline_group=dist.group.WORLD).clip()
    assert report.total_norm.item() == pytest.approx(truth, rel=1e-5)
    assert report.clipped
    assert distclip.grad_norm(modules, pipeline_group=dist.group.WORLD).item() == pytest.approx(truth / 2, rel=1e-5)


@ranks(2)
@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ("pp", TypeError, "pipeline_group must be a ProcessGroup or a 1-D DeviceMesh, got str"),
        ("grid", ValueError, "a 1-D DeviceMesh, got a mesh of shape"),
    ],
)
def test_bad_groups(group: str, error: type[Exception], message: str) -> None:
    wrong: Any = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b")) if group == "grid" else group
    with pytest.raises(error, match=message):
        distclip.GradClipper(nn.Linear(1, 1), pipeline_group=wrong)
    with pytest.raises(error, match=message):
        distclip.grad_norm(nn.Linear(1, 1), pipeline_group=wrong)


@ranks(2)
def test_a_group_that_this_rank_is_not_in() -> None:
    alone = dist.new_group([0])
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match="rank 1 is not in the group"):
            distclip.GradClipper(nn.Linear(1, 1), pipeline_group=alone)


@ranks(2)
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float64, torch.float32)])
def test_the_dtype_of_the_norm_is_agreed(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    stage = nn.Linear(3, 3, dtype=dtypes[dist.get_rank()])
    for param in stage.parameters():
        param.grad = torch.ones_like(param)
    norm = distclip.grad_norm(stage, pipeline_group=dist.group.WORLD)
    assert norm.dtype == dtypes[1]
    assert norm.item() == pytest.approx(24**0.5)
