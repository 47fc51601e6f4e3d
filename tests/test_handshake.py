"""Ranks that disagree: an error on every rank that names what differs, never a hang, never a reduced mixture."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distclip
from distclip import ClipByGlobalNorm, ClipByNorm, ClipByValue, GradClipper
from tests import oracle
from tests.layouts import LAYOUTS, backward, build
from tests.ranks import RanksFailed, ranks, run_ranks

LAYOUT_NAMES = ["fsdp2", "fsdp1-full_shard-orig", "tp"]


@ranks(2)
@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ((ClipByGlobalNorm(1.0), ClipByNorm(1.0)), ("ClipByGlobalNorm", "ClipByNorm")),
        ((ClipByGlobalNorm(1.0), ClipByGlobalNorm(2.0)), (r"max_norm=1\.0", r"max_norm=2\.0")),
        ((ClipByGlobalNorm(1.0), ClipByGlobalNorm(1.0, float("inf"))), (r"norm_type=2\.0", "norm_type=inf")),
        ((ClipByGlobalNorm(1.0), ClipByValue(1.0)), ("ClipByGlobalNorm", "ClipByValue")),
    ],
    ids=["another rule", "another threshold", "another norm type", "a rule on elements"],
)
@pytest.mark.parametrize("name", LAYOUT_NAMES)
def test_another_rule(name: str, rules: tuple[Any, Any], named: tuple[str, str]) -> None:
    model = build(LAYOUTS[name])
    before = oracle.whole_grads(model)
    clipper = GradClipper(model, rules[dist.get_rank()])
    with pytest.raises(RuntimeError, match=f"disagree.*\n  on rank 0: .*{named[0]}.*\n  on rank 1: .*{named[1]}"):
        clipper.clip()
    oracle.assert_same(oracle.whole_grads(model), before)


@ranks(2)
@pytest.mark.parametrize("name", LAYOUT_NAMES)
def test_drop_in_functions_too(name: str) -> None:
    model = build(LAYOUTS[name])
    mine = dist.get_rank()
    with pytest.raises(RuntimeError, match="disagree on how to clip"):
        distclip.clip_grad_norm_(model, 1.0, norm_type=[2.0, 1.0][mine])
    with pytest.raises(RuntimeError, match=r"disagree on the rule:\n  on rank 0: .*max_norm=1\.0"):
        distclip.clip_grad_norm_(model, max_norm=[1.0, 3.0][mine])
    # After the mistake is mended, all goes on.
    assert distclip.clip_grad_norm_(model, 1.0).isfinite()


@ranks(2)
def test_a_rule_that_changes_on_one_rank_between_clips() -> None:
    layout = LAYOUTS["fsdp2"]
    model = build(layout)
    rule = ClipByGlobalNorm(1e6)
    clipper = GradClipper(model, rule)
    clipper.clip()
    rule.max_norm = [1.0, 2.0][dist.get_rank()]
    for param in model.parameters():
        param.grad = None
    backward(layout, model)
    with pytest.raises(RuntimeError, match=r"disagree on the rule:\n  on rank 0: .*1\.0.*\n  on rank 1: .*2\.0"):
        clipper.clip()


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x)
        return out


@ranks(4, timeout=30)
@pytest.mark.parametrize("forgetful", [0, 1, 3])
def test_a_forgotten_pipeline_group(forgetful: int) -> None:
    """Two stages, two shards each. The peer of the forgetful rank waits in a group where that never comes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "shard"))
    stage = Stage()
    fully_shard(stage, mesh=mesh["shard"])
    stage(torch.ones(2, 6)).sum().backward()
    group = None if dist.get_rank() == forgetful else mesh["pp"]
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="disagree on how to clip") as caught:
        GradClipper(stage, 1.0, pipeline_group=group).clip()
    assert f"on rank {forgetful}: " in str(caught.value)
    assert "no pipeline_group" in str(caught.value)
    assert "pipeline of 2 ranks" in str(caught.value)
    assert time.monotonic() - started < 15


@ranks(2)
def test_a_parameter_replaced_on_one_rank() -> None:
    """While the others are in a clip by the old plan: they learn of it there, and all compare."""
    layout = LAYOUTS["fsdp2"]
    model = build(layout)
    clipper = GradClipper(model, 1.0)
    clipper.clip()
    mesh = init_device_mesh("cpu", (2,))
    other = nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Shard(0)]))
    if dist.get_rank() == 1:
        model.register_parameter("scale", other)
    for param in model.parameters():
        param.grad = None
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.ones_like(param)
    with pytest.raises(
        RuntimeError, match=r"disagree on a tensor:\n  on rank 0: scale: shape \(1,\).*\n.*shape \(3,\)"
    ):
        clipper.clip()


@ranks(2)
def test_a_parameter_replaced_by_its_like_on_one_rank() -> None:
    """As good as the old one: the ranks agree anew, and the norm is right."""
    layout = LAYOUTS["fsdp2"]
    model = build(layout)
    clipper = GradClipper(model, 1.0)
    clipper.clip()
    scale = model.get_parameter("scale")
    grad = scale.grad
    if dist.get_rank() == 1:
        model.register_parameter("scale", nn.Parameter(scale.detach().clone()))
        model.get_parameter("scale").grad = grad
    for param in model.parameters():
        if param.grad is not None:
            assert isinstance(param.grad, DTensor)
            param.grad._local_tensor.mul_(3.0)
    before = oracle.norm(oracle.whole_grads(model))
    for _ in range(2):
        norm = clipper.clip().total_norm.item()
        assert norm == pytest.approx(before, rel=1e-6)
        for param in model.parameters():
            if param.grad is not None:
                assert isinstance(param.grad, DTensor)
                param.grad._local_tensor.mul_(2.0)
        before = oracle.norm(oracle.whole_grads(model))


@ranks(2)
def test_a_parameter_replaced_on_all_ranks() -> None:
    layout = LAYOUTS["fsdp2"]
    model = build(layout)
    clipper = GradClipper(model, float("inf"))
    clipper.clip()
    mesh = init_device_mesh("cpu", (2,))
    model.register_parameter("scale", nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Shard(0)])))
    model.get_parameter("scale").grad = distribute_tensor(torch.full((3,), 50.0), mesh, [Shard(0)])
    truth = oracle.norm(oracle.whole_grads(model))
    assert clipper.clip().total_norm.item() == pytest.approx(truth, rel=1e-6)


@ranks(2)
@pytest.mark.parametrize("what", ["shape", "dtype", "placement"])
def test_tensors_of_one_name_that_look_different(what: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    rank = dist.get_rank()
    shape = 6 if what == "shape" and rank else 4
    dtype = torch.float64 if what == "dtype" and rank else torch.float32
    placement = Replicate() if what == "placement" and rank else Shard(0)
    local = torch.ones(shape if placement.is_replicate() else shape // 2, dtype=dtype)
    model = nn.Module()
    model.weight = nn.Parameter(DTensor.from_local(local, mesh, [placement], run_check=False))
    model.other = nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Shard(0)]))
    model.weight.grad = torch.ones_like(model.weight)
    with pytest.raises(RuntimeError, match=r"disagree on a tensor:\n  on rank 0: weight: .*\n  on rank 1: weight: "):
        distclip.grad_norm(model)


@ranks(4)
@pytest.mark.parametrize("operation", ["sum", "avg"])
@pytest.mark.parametrize("p", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("size", [7, 200_000], ids=["rides", "reduced first"])
def test_partial_gradients(operation: str, p: float, size: int) -> None:
    """Gradients that are still to be summed over one axis of a mesh, and missing on one rank."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    generator = torch.Generator().manual_seed(mesh.get_local_rank("tp"))
    part = torch.randn(size, generator=generator)
    param = nn.Parameter(distribute_tensor(torch.zeros(size), mesh, [Replicate(), Replicate()]))
    beside = nn.Parameter(distribute_tensor(torch.zeros(8), mesh, [Shard(0), Replicate()]))
    beside.grad = distribute_tensor(torch.arange(8.0), mesh, [Shard(0), Replicate()])
    param.grad = DTensor.from_local(part, mesh, [Replicate(), Partial(operation)])
    whole = {"beside": torch.arange(8.0).double().numpy(), "partial": param.grad.full_tensor().double().numpy()}
    truth = oracle.norm(whole, p)
    assert distclip.clip_grad_norm_([param, beside], truth / 2, p).item() == pytest.approx(truth, rel=1e-6)
    after = {"beside": beside.grad.full_tensor(), "partial": param.grad.full_tensor()}
    for name, grad in after.items():
        torch.testing.assert_close(grad.double(), torch.from_numpy(whole[name]) / 2, rtol=1e-4, atol=1e-5)
    report = GradClipper(nn.ParameterList([param, beside]), ClipByNorm(0.1)).clip()
    assert report.per_tensor is not None
    assert report.per_tensor["0"].item() == pytest.approx(oracle.norm({"": whole["partial"]}) / 2, rel=1e-3)


@ranks(2)
def test_a_partial_gradient_that_one_rank_misses() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for size in (5, 200_000):
        param = nn.Parameter(distribute_tensor(torch.zeros(size), mesh, [Replicate()]))
        if dist.get_rank() == 0:
            param.grad = DTensor.from_local(torch.full((size,), 2.0), mesh, [Partial()])
        assert distclip.grad_norm(param).item() == pytest.approx(2.0 * size**0.5, rel=1e-6)


@ranks(2)
def test_elements_of_partial_gradients_are_limited_after_they_are_reduced() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for clip in (
        lambda p: distclip.clip_grad_value_([p], 1.0),
        lambda p: GradClipper(nn.ParameterList([p]), ClipByValue(1.0)).clip(),
    ):
        param = nn.Parameter(distribute_tensor(torch.zeros(3), mesh, [Replicate()]))
        mine = torch.tensor([[0.6, 5.0, -0.2], [0.6, -4.5, 0.1]])[dist.get_rank()]
        param.grad = DTensor.from_local(mine, mesh, [Partial()])
        clip(param)
        torch.testing.assert_close(param.grad.full_tensor(), torch.tensor([1.0, 0.5, -0.1]))


def wait_for_a_rank_that_never_comes() -> None:
    model = build(LAYOUTS["fsdp2"])
    if dist.get_rank() == 0:
        distclip.clip_grad_norm_(model, 1.0)


def test_a_rank_that_never_clips_ends_with_the_group() -> None:
    with pytest.raises(RanksFailed, match="rank 0"):
        run_ranks(wait_for_a_rank_that_never_comes, 2, timeout=15)


@ranks(2)
def test_gradients_cut_where_all_parameters_are_replicated() -> None:
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh, [Replicate()]))
    whole = torch.arange(12.0).view(4, 3)
    param.grad = distribute_tensor(whole, mesh, [Shard(0)])
    assert distclip.grad_norm(param).item() == pytest.approx(whole.norm().item(), rel=1e-6)


@ranks(2)
@pytest.mark.parametrize(("value", "dtype", "p"), [(1e200, torch.float64, 2.0), (1e38, torch.float32, 10.0)])
def test_partial_gradients_whose_powers_leave_float64(value: float, dtype: torch.dtype, p: float) -> None:
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(distribute_tensor(torch.zeros(4, dtype=dtype), mesh, [Replicate()]))
    param.grad = DTensor.from_local(torch.full((4,), value, dtype=dtype), mesh, [Partial()])
    with pytest.raises(OverflowError, match="leaves float64"):
        distclip.clip_grad_norm_(param, 1.0, p)
