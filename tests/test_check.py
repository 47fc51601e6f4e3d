"""``GradClipper(check=)``: what the first clip sees of planted faults, what it costs, and that nobody waits for it."""

import contextlib
import math
import re
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import AuditWarning, ClipByValue, GradClipper
from distclip.audit import clips
from tests import oracle
from tests.collectives import recorded_collectives
from tests.layouts import LAYOUTS, build
from tests.nets import loss_of, make_batch, make_net
from tests.ranks import ranks
from tests.test_audit import sparse, staged, world
from tests.test_declare import Experts, fill, job, random


def warned(clipper: GradClipper) -> list[str]:
    """What one clip warns of, at this file's line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clipper.clip()
    found = [warning for warning in caught if warning.category is AuditWarning]
    assert all(warning.filename == __file__ for warning in found)
    return [str(warning.message) for warning in found]


def ddp_experts(*names: str) -> DistributedDataParallel:
    """DDP that leaves the experts alone; ``names``: of the module that holds this rank's."""
    model = Experts(1)
    if names:
        model.add_module(names[dist.get_rank()], model.experts)
        del model.experts
    ignored = [name for name, _ in model.named_parameters() if not name.startswith("dense")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    fill(model, 0)
    for name in ignored:
        param = model.get_parameter(name)
        param.grad = random(dist.get_rank(), *param.shape)
    return DistributedDataParallel(model)


@ranks(2)
@pytest.mark.parametrize("dense", ["ddp", "fsdp2"])
def test_an_undeclared_expert(dense: str) -> None:
    model: nn.Module = ddp_experts()
    if dense == "fsdp2":
        model = Experts(1)
        fully_shard(model.dense)
        for param in model.parameters():
            grad = random(dist.get_rank(), *param.shape)
            param.grad = (
                torch.distributed.tensor.distribute_tensor(grad, param.device_mesh, param.placements)
                if isinstance(param, DTensor)
                else grad
            )
    (message,) = warned(GradClipper(model, 1e9))
    assert message.startswith(
        "the norm may be wrong. replicas: experts.0.weight differs between ranks 0 and 1, but nothing declares it "
        "sharded. If each rank holds one of its own, as experts do: distclip.declare(<experts.0.weight>, sharded=<the "
        "group of ranks 0,1>)."
    )
    assert "(So it is with experts.0.bias.) Call distclip.audit(model) after a backward() to see all" in message
    experts = [param for name, param in model.named_parameters() if "experts" in name]
    distclip.declare(experts, sharded=world())
    assert warned(GradClipper(model, 1e9)) == []


@ranks(2)
def test_experts_under_names_of_their_own() -> None:
    model = ddp_experts("first", "second")
    (message,) = warned(GradClipper(model, 1e9))
    assert "first.0.weight, first.0.bias are on rank 0 only, and the norm on rank 1 leaves them out." in message
    assert "second.0.weight, second.0.bias are on rank 1 only" in message


@ranks(2)
def test_a_forgotten_all_reduce() -> None:
    model = DistributedDataParallel(make_net())
    tokens, targets = make_batch()
    with model.no_sync():
        loss_of(model, (tokens[dist.get_rank() :: 2], targets[dist.get_rank() :: 2])).backward()
    (message,) = warned(GradClipper(model, 1.0))
    assert "not-averaged: no gradient agrees between ranks 0 and 1 (scale, embed.weight" in message
    assert "outside no_sync()" in message


@ranks(2)
def test_of_many_tensors_some_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(60)])
    ddp = DistributedDataParallel(nn.ModuleDict({"all": model}))
    for place, param in enumerate(model):
        param.grad = torch.full_like(param, 1.0 + place + 100 * dist.get_rank())
    compared = []
    for most in (120, 119, 30):
        monkeypatch.setattr(clips, "_MOST_ROWS", most)
        (message,) = warned(GradClipper(ddp, math.inf))
        everybody: list[Any] = [None, None]
        dist.all_gather_object(everybody, message)
        assert everybody == [message, message]
        compared += [3 + int(more) for more in re.findall(r"(\d+) more", message)]
    assert compared[0] == 60 > compared[1] > compared[2] > 3


@ranks(2)
def test_a_tied_weight_counted_twice() -> None:
    rank = dist.get_rank()
    stage = staged(rank)
    stage[rank].register_parameter("weight", nn.Parameter(torch.zeros(7, 6)))
    tied = stage.get_parameter(f"{rank}.weight")
    tied.grad = random(3, 7, 6)
    (message,) = warned(GradClipper(stage, 1e9, pipeline_group=world()))
    assert "counted-twice: 0.weight on rank 0 and 1.weight on rank 1 have the same gradient" in message
    distclip.declare(tied, replicated=world())
    assert warned(GradClipper(stage, 1e9, pipeline_group=world())) == []


@ranks(2)
def test_one_tensor_declared_to_be_many() -> None:
    model = Experts(1, lora=True)
    fill(model, dist.get_rank())
    distclip.declare([*model.experts.parameters(), model.get_parameter("lora")], sharded=world())
    (message,) = warned(GradClipper(model, 1e9))
    assert "equal-places: lora is declared sharded, but its gradient is the same on ranks 0,1" in message


@ranks(2)
def test_a_gradient_that_one_rank_lacks() -> None:
    model = DistributedDataParallel(make_net())
    loss_of(model, make_batch()).backward()
    if dist.get_rank():
        model.module.scale.grad = None
    (message,) = warned(GradClipper(model, 1e9))
    assert "missing: scale has a gradient on rank 0 but none on rank 1" in message


@ranks(2)
def test_rounding_is_no_fault_and_nan_is_the_clip_s_matter() -> None:
    model = DistributedDataParallel(make_net())
    for value, rank in ((1 + 1e-5, 1), (math.nan, 0)):
        model.zero_grad()
        loss_of(model, make_batch()).backward()
        if dist.get_rank() == rank:
            model.module.scale.grad *= value
        assert warned(GradClipper(model, 1e9)) == []


@ranks(2)
@pytest.mark.parametrize("check", ["first", "always", "never"])
def test_a_fault_of_the_third_step(check: Any) -> None:
    model = DistributedDataParallel(make_net())
    clipper = GradClipper(model, 1e9, check=check)
    for step in range(4):
        model.zero_grad()
        loss_of(model, make_batch()).backward()
        if step >= 2 and dist.get_rank():
            model.module.scale.grad *= 2
        with recorded_collectives() as names:
            messages = warned(clipper)
        assert len(messages) == (check == "always" and step >= 2)
        assert bool(names) == (check == "always" or (check == "first" and step == 0))
    if check == "always":
        assert "scale differs between ranks 0 and 1, but DDP says that they hold the same piece" in messages[0]


@ranks(2)
@pytest.mark.parametrize("changed", ["all", "one"])
def test_a_parameter_exchanged_in_place(changed: str) -> None:
    """``swap_tensors`` keeps the object that modules hold, so that only its layout can tell."""
    model = Experts(1)
    distclip.declare(model.experts, sharded=world())
    fill(model, dist.get_rank())
    clipper = GradClipper(model, 1e9, check="always")
    assert warned(clipper) == []
    # Experts may differ in shape from rank to rank, dense weights may not.
    mine = changed == "all" or dist.get_rank() == 1
    name = "dense.weight" if changed == "all" else "experts.0.weight"
    if mine:
        torch.utils.swap_tensors(model.get_parameter(name), nn.Parameter(torch.zeros(5, 4)))
        if changed == "one":
            distclip.declare(model.get_parameter(name), sharded=world())
    local = fill(model, dist.get_rank(), first=300)
    truth = oracle.norm(job(local, dist.get_rank()))
    messages = warned(clipper)
    assert len(messages) == mine
    if mine:
        assert f"{name} was exchanged in place since the last clip (then plain of shape" in messages[0]
        assert "now plain of shape (5, 4)): the plan is made anew" in messages[0]
    assert clipper.report is not None
    assert clipper.report.total_norm.item() == pytest.approx(truth, rel=1e-6)


@ranks(4)
def test_two_models_on_two_halves_do_not_wait_for_each_other() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("model", "dp"))
    if dist.get_rank() >= 2:
        return
    model = DistributedDataParallel(make_net(), process_group=mesh.get_group("dp"))
    loss_of(model, make_batch()).backward()
    assert warned(GradClipper(model, 1e9, check="always")) == []


@ranks(2)
@pytest.mark.parametrize("check", ["first", "always"])
def test_a_rank_that_cannot_clip_is_not_waited_for(check: Any) -> None:
    """Under DDP a clip has no collective that could tell the others: the check must come, and not hide the error."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(3, dtype=torch.complex64)), nn.Parameter(torch.zeros(3))])
    ddp = DistributedDataParallel(Holder(model))
    for param in model:
        param.grad = torch.ones_like(param)
    if dist.get_rank() == 0:
        model[0].grad = None
    clipper = GradClipper(ddp, ClipByValue(0.5), check=check)
    if dist.get_rank() == 0:
        assert "has a gradient on rank 1 but none on rank 0" in warned(clipper)[0]
    else:
        with pytest.raises(TypeError, match="complex"):
            clipper.clip()


class Holder(nn.Module):
    """DDP wants a module with a forward."""

    def __init__(self, params: nn.ParameterList) -> None:
        super().__init__()
        self.params = params


@ranks(2)
def test_a_plan_made_anew_on_one_replica_only() -> None:
    """Under DDP nobody else learns of it: the check must not be waited for."""
    model = DistributedDataParallel(make_net())
    clipper = GradClipper(model, 1e9)
    for step in range(3):
        if step == 1 and dist.get_rank():
            model.module.scale = nn.Parameter(model.module.scale.detach().clone())
        for seed, param in enumerate(model.parameters()):
            param.grad = random(seed + 100 * step, *param.shape)
        assert warned(clipper) == []


@ranks(2)
def test_a_new_plan_of_all_is_checked_again() -> None:
    model = Experts(1, lora=True)
    distclip.declare(model.experts, sharded=world())
    fill(model, dist.get_rank())
    clipper = GradClipper(model, 1e9)
    assert warned(clipper) == []
    distclip.declare(model.get_parameter("lora"), sharded=world())
    fill(model, dist.get_rank(), first=300)
    (message,) = warned(clipper)
    assert "equal-places: lora" in message
    fill(model, dist.get_rank(), first=500)
    assert warned(clipper) == []


@ranks(4)
@pytest.mark.parametrize("check", ["first", "always"])
def test_groups_that_some_ranks_name_after_the_first_clip(check: Any) -> None:
    """All make a new plan, for two of them know one group more: all must come to the same check, or to none."""
    half = dist.new_group([0, 1])
    model = Experts(1)
    fully_shard(model.dense)
    clipper = GradClipper(model, 1e9, check=check)
    for step in range(3):
        for seed, param in enumerate(model.parameters()):
            param.grad = random(seed + 10 * step, *param.shape)
            if isinstance(param, DTensor):
                param.grad = distribute_tensor(param.grad, param.device_mesh, param.placements)
        if step == 1 and dist.get_rank() < 2:
            distclip.declare(model.experts, sharded=half)
        messages = warned(clipper)
        assert ("equal-places: experts.0.weight" in " ".join(messages)) == (
            step == 1 or (step > 1 and check == "always")
        )


@ranks(3)
@pytest.mark.parametrize("check", ["first", "always"])
def test_a_rank_that_others_name_after_their_first_clip(check: Any) -> None:
    """The first two checked each other under DDP before, the third nobody."""
    model: nn.Module = nn.Linear(3, 2)
    pair = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        model = DistributedDataParallel(model, process_group=pair)
    clipper = GradClipper(model, 1e9, check=check)
    extra = nn.Parameter(torch.zeros(2, 3))
    for step in range(3):
        if step == 1:
            model.register_parameter("extra", extra)
            distclip.declare(extra, sharded=world())
        for seed, param in enumerate(model.parameters()):
            param.grad = random(seed, *param.shape)
        if step >= 1:
            extra.grad = random(100 + dist.get_rank(), 2, 3)
        assert warned(clipper) == []


@ranks(2)
def test_ranks_that_check_at_different_times_disagree() -> None:
    model = build(LAYOUTS["fsdp2"])
    with pytest.raises(RuntimeError, match=r"disagree on how to clip:\n.*rank 0: .*check=first.*\n.*rank 1: .*never"):
        GradClipper(model, 1.0, check="never" if dist.get_rank() else "first").clip()


@ranks(2)
@pytest.mark.filterwarnings("ignore:clip.. found no gradient")
@pytest.mark.parametrize("name", ["fsdp1-full_shard-flat", "fsdp2"])
def test_gradients_that_fsdp_has_not_reduced(name: str) -> None:
    """The error is the clip's own; the check does not stand before it."""
    model: Any = LAYOUTS[name].wrap(make_net())
    if name == "fsdp2":
        model.set_requires_gradient_sync(False)
    with contextlib.nullcontext() if name == "fsdp2" else model.no_sync():
        loss_of(model, make_batch()).backward()
        with pytest.raises(RuntimeError, match="between accumulation"):
            GradClipper(model, 1.0).clip()


@ranks(2)
def test_experts_without_tokens_and_gradients_of_all_kinds() -> None:
    model = Experts(2)
    extra = nn.ParameterDict(
        {
            "bf16": nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16)),
            "complex": nn.Parameter(torch.zeros(4, 3, dtype=torch.complex64)),
            "sparse": nn.Parameter(torch.zeros(4, 3)),
            "empty": nn.Parameter(torch.zeros(0, 3)),
        }
    )
    distclip.declare(model.experts, sharded=world())
    fill(model, dist.get_rank())
    if dist.get_rank() == 1:
        model.experts.zero_grad()
    for seed, name in enumerate(("bf16", "complex", "empty")):
        extra[name].grad = random(seed, *extra[name].shape).to(extra[name].dtype)
    extra["sparse"].grad = sparse(extra["sparse"], 9)
    assert warned(GradClipper([model, extra], 1e9)) == []
    extra["sparse"].grad = sparse(extra["sparse"], 9 + dist.get_rank())
    (message,) = warned(GradClipper([model, extra], 1e9))
    assert "1.sparse differs between ranks 0 and 1" in message
