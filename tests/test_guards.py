"""What goes wrong on some rank is told on every rank, before a gradient is changed, and never by a hang."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import distclip
from tests import oracle
from tests.layouts import LAYOUTS, Layout, backward, build
from tests.nets import loss_of, make_batch, make_net
from tests.ranks import ranks

SHARDED = [LAYOUTS[name] for name in ("fsdp1-full_shard-orig", "fsdp1-full_shard-flat", "fsdp2", "hsdp-2x")]
sharded = pytest.mark.parametrize("layout", SHARDED, ids=lambda layout: layout.name)


def poison(model: nn.Module, value: float, rank: int) -> None:
    """Put `value` into one gradient element of one rank."""
    if dist.get_rank() == rank:
        grad = next(p.grad for p in model.parameters() if p.grad is not None and _local(p.grad).numel())
        _local(grad).view(-1)[0] = value


def _local(grad: torch.Tensor) -> torch.Tensor:
    return grad._local_tensor if isinstance(grad, DTensor) else grad


@ranks(4)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("p", [2.0, math.inf])
@sharded
def test_a_nonfinite_gradient_on_one_rank(layout: Layout, p: float, value: float) -> None:
    model = build(layout)
    poison(model, value, rank=1)
    before = oracle.whole_grads(model)
    with pytest.raises(RuntimeError, match="non-finite"):
        distclip.clip_grad_norm_(model, 1.0, p, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match="non-finite"):
        distclip.GradClipper(model, distclip.ClipByGlobalNorm(1.0, p), nonfinite="raise").clip()
    oracle.assert_same(oracle.whole_grads(model), before)

    norm = distclip.grad_norm(model, p)
    assert math.isnan(norm.item()) if math.isnan(value) else math.isinf(norm.item())

    report = distclip.GradClipper(model, distclip.ClipByGlobalNorm(1.0, p), nonfinite="skip").clip().to_dict()
    assert report["nonfinite"]
    assert report["skipped"]
    assert all(param.grad is None for param in model.parameters())


@ranks(2)
@sharded
def test_skipped_steps_change_nothing(layout: Layout) -> None:
    if layout.name == "hsdp-2x":
        pytest.skip("needs 4 ranks")
    model = layout.wrap(make_net())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, foreach=False)
    clipper = distclip.GradClipper(model, 1.0, nonfinite="skip")
    for step in range(3):
        optimizer.zero_grad()
        backward(layout, model)
        if step == 1:
            poison(model, math.nan, rank=0)
        before = snapshot(model, optimizer)
        assert clipper.clip().skipped.item() == (step == 1)
        optimizer.step()
        assert same(before, snapshot(model, optimizer)) == (step == 1)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return [_local(tensor).detach().clone() for tensor in (*model.parameters(), *state)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@ranks(2)
@pytest.mark.parametrize("p", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("name", ["fsdp2", "fsdp1-full_shard-orig"])
def test_gradients_missing_on_one_rank(name: str, p: float) -> None:
    """Plans follow parameters, so a rank without some gradient, or without any, still takes part."""
    model = build(LAYOUTS[name])
    missing = [place for place, _ in enumerate(model.parameters()) if place % 2]
    if dist.get_rank() == 1:
        for place, param in enumerate(model.parameters()):
            if place in missing:
                param.grad = None
    mine = [_local(p.grad).double() for p in model.parameters() if p.grad is not None]
    everybody: list[Any] = [None, None]
    dist.all_gather_object(everybody, [grad.numpy() for grad in mine])
    truth = oracle.norm(
        {f"{rank}.{i}": grad for rank, grads in enumerate(everybody) for i, grad in enumerate(grads)}, p
    )
    assert distclip.clip_grad_norm_(model, 1.0, p).item() == pytest.approx(truth, rel=1e-6)
    if dist.get_rank() == 1:
        for param in model.parameters():
            param.grad = None
    distclip.clip_grad_norm_(model, 1.0, p)


@ranks(2)
@pytest.mark.parametrize("flat", [True, False])
def test_fsdp1_parameters_without_their_module(flat: bool) -> None:
    model = FullyShardedDataParallel(make_net().blocks[0], use_orig_params=not flat, device_id=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="FullyShardedDataParallel model that distclip has never seen"):
        distclip.clip_grad_norm_(model.parameters(), 1.0)
    distclip.grad_norm(model)
    distclip.clip_grad_norm_(model.parameters(), 1.0)


@ranks(2)
def test_a_model_wrapped_after_its_first_clip() -> None:
    """Under use_orig_params FSDP1 keeps the parameter objects: a plan made before must not be used after."""
    block = make_net().first
    block(torch.ones(1, 5)).sum().backward()
    params = list(block.parameters())
    distclip.clip_grad_norm_(params, 1.0)
    for param in params:
        param.grad = None
    model = FullyShardedDataParallel(block, use_orig_params=True, device_id=torch.device("cpu"))
    model(torch.ones(1, 5)).sum().backward()
    with pytest.raises(RuntimeError, match="never seen"):
        distclip.clip_grad_norm_(params, 1.0)
    truth = oracle.norm(oracle.whole_grads(model))
    assert distclip.grad_norm(model).item() == pytest.approx(truth, rel=1e-6)


@ranks(2)
@pytest.mark.parametrize("name", ["fsdp1-full_shard-orig", "fsdp1-full_shard-flat", "fsdp2"])
def test_clipping_between_accumulation_steps_is_an_error(name: str) -> None:
    model = LAYOUTS[name].wrap(make_net())
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        loss_of(model, make_batch()).backward()
    else:
        assert isinstance(model, FullyShardedDataParallel)
        with model.no_sync():
            loss_of(model, make_batch()).backward()
            with pytest.raises(RuntimeError, match="clip\\(\\) ran under no_sync"):
                distclip.clip_grad_norm_(model, 1.0)
    with pytest.raises(RuntimeError, match="between accumulation"):
        distclip.clip_grad_norm_(model, 1.0)


@ranks(4)
def test_hsdp_without_its_all_reduce_is_an_error() -> None:
    layout = LAYOUTS["hsdp-2x"]
    model = layout.wrap(make_net())
    assert isinstance(model, FSDPModule)
    model.set_requires_all_reduce(False)
    backward(layout, model)
    with pytest.raises(RuntimeError, match="set_requires_all_reduce"):
        distclip.clip_grad_norm_(model, 1.0)


@ranks(2)
def test_ddp_without_its_averaging_is_a_warning() -> None:
    model = DistributedDataParallel(make_net())
    with model.no_sync():
        loss_of(model, make_batch()).backward()
    with pytest.warns(UserWarning, match="DDP has not averaged") as caught:
        distclip.clip_grad_norm_(model, 1.0)
    assert caught[0].filename == __file__
    loss_of(model, make_batch()).backward()
    distclip.clip_grad_norm_(model, 1.0)


@ranks(2)
def test_zero_redundancy_optimizer() -> None:
    """ZeRO-1 of torch: DDP averages whole gradients, only the optimizer's state is sharded."""
    model = DistributedDataParallel(make_net())
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = ZeroRedundancyOptimizer(trained, torch.optim.AdamW, lr=0.05)
    alone = make_net()
    reference = torch.optim.AdamW([param for param in alone.parameters() if param.requires_grad], lr=0.05)
    clipper = distclip.GradClipper(model, 2.0)
    for _ in range(3):
        optimizer.zero_grad()
        reference.zero_grad()
        backward(LAYOUTS["ddp"], model)
        loss_of(alone, make_batch()).backward()
        want = nn.utils.clip_grad_norm_(alone.parameters(), 2.0)
        report = clipper.clip()
        assert report.total_norm.item() == pytest.approx(want.item(), rel=1e-5)
        assert report.clipped
        optimizer.step()
        reference.step()
    for got, expected in zip(model.module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@ranks(2)
def test_a_gradient_placed_otherwise_than_its_parameter() -> None:
    model = build(LAYOUTS["fsdp2"])
    param = next(param for param in model.parameters() if param.grad is not None)
    assert isinstance(param.grad, DTensor)
    grad, param.grad = param.grad, None
    with torch.no_grad():
        param.grad = grad.redistribute(placements=[torch.distributed.tensor.Replicate()])
    before = oracle.whole_grads(model)
    assert distclip.clip_grad_norm_(model, 1.0).item() == pytest.approx(oracle.norm(before), rel=1e-6)
    oracle.assert_same(oracle.whole_grads(model), oracle.clip_by_global_norm(before, 1.0))
    # What the ranks agreed on holds: another placement later is told, not guessed.
    param.grad = grad
    with pytest.raises(RuntimeError, match="otherwise than the ranks agreed"):
        distclip.clip_grad_norm_(model, 1.0)


@ranks(2)
def test_powers_that_leave_float64_on_one_rank() -> None:
    model = build(LAYOUTS["fsdp2"])
    poison(model, 1e38, rank=1)
    before = oracle.whole_grads(model)
    with pytest.raises(OverflowError, match="norm_type=12"):
        distclip.clip_grad_norm_(model, 1.0, 12.0)
    oracle.assert_same(oracle.whole_grads(model), before)


@ranks(2)
def test_fp32_range_across_ranks() -> None:
    """fp32's extremes survive the collective too: 1e20 on one rank, 1e-25 on the other."""
    model = build(LAYOUTS["fsdp2"])
    for param in model.parameters():
        if param.grad is not None:
            _local(param.grad).fill_(1e20 if dist.get_rank() == 0 else 1e-25)
    before = oracle.whole_grads(model)
    assert distclip.clip_grad_norm_(model, 1.0).item() == pytest.approx(oracle.norm(before), rel=1e-6)
    oracle.assert_same(oracle.whole_grads(model), oracle.clip_by_global_norm(before, 1.0))


@ranks(2)
def test_a_rank_that_cannot_clip_tells_the_others() -> None:
    """A complex gradient on one stage: it raises TypeError, the other a Failure, and nothing is changed."""
    rank = dist.get_rank()
    stage = nn.Linear(2, 2, dtype=torch.complex64 if rank else torch.float32)
    for param in stage.parameters():
        param.grad = torch.full_like(param, 5.0)
    clipper = distclip.GradClipper(stage, distclip.ClipByValue(1.0), pipeline_group=dist.group.WORLD)
    with pytest.raises(TypeError if rank else RuntimeError, match="complex" if rank else "another rank .* raised"):
        clipper.clip()
    assert all(torch.equal(p.grad, torch.full_like(p, 5.0)) for p in stage.parameters() if p.grad is not None)


@ranks(2)
def test_what_to_do_with_nonfinite_norms_must_be_agreed() -> None:
    model = build(LAYOUTS["fsdp2"])
    clipper = distclip.GradClipper(model, 1.0, nonfinite="skip" if dist.get_rank() else "propagate")
    with pytest.raises(RuntimeError, match=r"disagree on how to clip:\n  on rank 0: .*propagate"):
        clipper.clip()
    with pytest.raises(RuntimeError, match="disagree on the rule"):
        distclip.clip_grad_norm_(model, 1.0, error_if_nonfinite=dist.get_rank() == 1)


@ranks(2)
def test_value_clipping_between_accumulation_steps_is_an_error() -> None:
    model = LAYOUTS["fsdp2"].wrap(make_net())
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(False)
    loss_of(model, make_batch()).backward()
    with pytest.raises(RuntimeError, match="between accumulation"):
        distclip.clip_grad_value_(model, 1.0)


@ranks(2)
def test_a_clipper_on_the_module_inside_a_later_fsdp1() -> None:
    block = make_net().first
    clipper = distclip.GradClipper(block, 1e9)
    block(torch.ones(1, 5)).sum().backward()
    clipper.clip()
    block.zero_grad()
    model = FullyShardedDataParallel(block, use_orig_params=True, device_id=torch.device("cpu"))
    model(torch.ones(1, 5)).sum().backward()
    with pytest.raises(RuntimeError, match="never seen"):
        clipper.clip()
    distclip.grad_norm(model)
    truth = oracle.norm(oracle.whole_grads(model))
    assert clipper.clip().total_norm.item() == pytest.approx(truth, rel=1e-6)


@ranks(2)
def test_a_sharded_model_can_be_converted_after_a_clip() -> None:
    """torch swaps DTensor parameters, and refuses to where something refers to them weakly."""
    model = build(LAYOUTS["fsdp2"])
    distclip.GradClipper(model, 1.0).clip()
    distclip.clip_grad_norm_(model, 1.0)
    model.double()
    assert distclip.grad_norm(model).isfinite()


@ranks(2)
def test_fsdp2_that_keeps_parameters_unsharded_after_backward() -> None:
    """Its modules then hold parameters that have no gradient."""
    model = build(LAYOUTS["fsdp2"])
    assert isinstance(model, FSDPModule)
    sharded = dict(model.named_parameters())
    model.set_reshard_after_backward(False)
    clipper = distclip.GradClipper(model, distclip.ClipByNorm(0.01))
    for _ in range(3):
        backward(LAYOUTS["fsdp2"], model)
        whole = [p.grad.full_tensor() for p in sharded.values() if isinstance(p.grad, DTensor)]
        truth = oracle.norm({str(place): grad.double().numpy() for place, grad in enumerate(whole)})
        assert not isinstance(next(model.parameters()), DTensor)
        assert distclip.grad_norm(model).item() == pytest.approx(truth, rel=1e-6)
        report = clipper.clip()
        assert report.total_norm.item() == pytest.approx(truth, rel=1e-6)
        assert set(report.per_tensor or ()) == set(sharded)
        assert distclip.grad_norm(model).item() < truth
        for param in sharded.values():
            param.grad = None
