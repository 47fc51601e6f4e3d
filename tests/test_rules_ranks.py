"""Every rule on several ranks, against its formula on the gathered gradients: row by row of the table of layouts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distclip
from distclip import GradClipper
from tests import oracle
from tests.collectives import recorded_collectives
from tests.formulas import FORMULAS, Whole, agc, centralize, each
from tests.layouts import LAYOUTS, Layout, backward
from tests.nets import make_net
from tests.ranks import ranks, run_ranks
from tests.states import by_name

# Flat parameters that cut rows, both ways; rows dealt out unevenly; columns dealt out; replicas; experts of two meshes.
SPREAD = ["ddp", "fsdp1-full_shard-flat", "fsdp1-full_shard-orig", "fsdp2", "tp"]
# Of rows, also: several axes, rows dealt out in strides, Partial gradients, pieces of float64, whole on each node.
ROWS = ["tp-sequence", "fsdp2+tp", "fsdp2+tp-sequence", "hsdp-2x", "fsdp2-mixed-dtypes", "fsdp1-hybrid_shard-flat"]


def enlarge(model: nn.Module, step: int) -> None:
    """Other gradients in every step, without another forward: times a number of its own."""
    for param in model.parameters():
        if param.grad is not None:
            param.grad.mul_([1.0, 0.2, 3.0, 0.5][step % 4])


def whole_weights(layout: Layout) -> Whole:
    net = make_net(layout.hidden)
    named = net.named_parameters(remove_duplicate=False)
    return {name: param.detach().double().numpy() for name, param in named}


def assert_close(got: Whole, want: Whole) -> None:
    assert got.keys() == want.keys()
    for name, grad in want.items():
        largest = float(np.abs(grad).max(initial=0.0))
        np.testing.assert_allclose(got[name], grad, rtol=3e-6, atol=1e-6 * largest + 1e-12, err_msg=name)


def check(layout: Layout, name: str, steps: int = 6) -> dict[str, Any]:
    model, formula = layout.wrap(make_net(layout.hidden)), FORMULAS[name]()
    clipper, weights = GradClipper(model, formula.rule(), check="never"), whole_weights(layout)
    for step in range(steps):
        model.zero_grad()
        backward(layout, model)
        enlarge(model, step)
        want = formula(oracle.whole_grads(model), weights)
        report = clipper.clip()
        assert bool(report.skipped) == (want is None)
        if want is None:
            assert all(param.grad is None for param in model.parameters())
        else:
            assert_close(oracle.whole_grads(model), want)
        if step == 2:
            state = clipper.state_dict()
            clipper = GradClipper(model, formula.rule(), check="never")
            clipper.load_state_dict(state)
    return clipper.state_dict()


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(
    "layout",
    [pytest.param(each, marks=pytest.mark.slow) if each == "fsdp1-full_shard-orig" else each for each in SPREAD],
)
def test_rule(layout: str, name: str) -> None:
    """The state too: the same bits on every rank."""
    first, *others = run_ranks(check, 2, LAYOUTS[layout], name)
    assert all(other == first for other in others)


@pytest.mark.parametrize("name", ["agc", "centralize", "stable_spam", "per_group"])
@pytest.mark.parametrize("layout", ROWS)
def test_rows(layout: str, name: str) -> None:
    run_ranks(check, LAYOUTS[layout].world_sizes[-1], LAYOUTS[layout], name, 2)


@pytest.mark.parametrize("name", ["adagc", "ema_ratio", "stable_spam", "autoclip"])
def test_state_survives_another_sharding(name: str) -> None:
    """Saved by two ranks, of flat parameters too, it is what one process would have saved, by the same names."""
    (single,) = run_ranks(check, 1, LAYOUTS["single"], name)
    for layout in ("fsdp1-full_shard-flat", "fsdp2"):
        state = run_ranks(check, 2, LAYOUTS[layout], name)[0]
        one, other = (by_name(each["rule_state"]) for each in (single, state))
        trained = {key for key, value in one.items() if np.all(np.isfinite(value)) and np.any(value)}
        assert {key: other[key] for key in trained} == {key: pytest.approx(one[key], rel=1e-4) for key in trained}


class Convolutions(nn.Module):
    """What is cut along other axes than rows of matrices: kernels, a transposed one, one without rows enough."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 2)
        self.narrow = nn.Conv1d(7, 1, 3)
        self.wide = nn.Linear(9, 3)


@ranks(2, 4)
@pytest.mark.parametrize("kind", ["agc", "centralize"])
@pytest.mark.parametrize("wrap", ["fsdp2", "shard1", "flat"])
def test_rows_of_kernels(kind: str, wrap: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import Shard

    plain, model = Convolutions(), Convolutions()
    wrapped: nn.Module = model
    if wrap == "flat":
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=False)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        place: Callable[[nn.Parameter], Shard | None] = lambda p: Shard(1) if p.ndim > 1 else None  # noqa: E731
        if wrap == "shard1":
            # Evenly only, as FSDP2 wants it.
            del model.conv, model.narrow, plain.conv, plain.narrow
            model.wide = nn.Linear(8, 3)
            plain.wide = nn.Linear(8, 3)
            plain.load_state_dict(model.state_dict())
        fully_shard(model, mesh=mesh, shard_placement_fn=place if wrap == "shard1" else None)
    loss = sum((p.sin() * (1 + torch.arange(p.numel()).view_as(p))).sum() for p in plain.parameters())
    loss.backward()  # type: ignore[union-attr]
    give(wrapped, plain)
    formula: Any = agc if kind == "agc" else each(centralize)
    rule = distclip.AdaptiveGradientClipping(exclude="*up*") if kind == "agc" else distclip.CentralizeGradient()
    grads = {name: p.grad.double().numpy() for name, p in plain.named_parameters() if p.grad is not None}
    want = formula(None, grads, {name: p.detach().double().numpy() for name, p in plain.named_parameters()})
    GradClipper(wrapped, rule, check="never").clip()
    assert_close(oracle.whole_grads(wrapped), want)


def give(model: nn.Module, plain: nn.Module) -> None:
    """This rank's parts of the plain model's gradients, put by hand where its wrapper would."""
    from torch.distributed.tensor import distribute_tensor

    named = dict(plain.named_parameters())
    handle = getattr(model, "_handle", None)
    if handle is not None:
        flat = handle.flat_param
        whole = torch.cat([named[name].grad.reshape(-1) for name in flat._fqns])  # type: ignore[union-attr]
        size = flat.numel()
        padded = torch.zeros(size * dist.get_world_size())
        padded[: whole.numel()] = whole
        flat.grad = padded[dist.get_rank() * size :][:size].clone()
        return
    for name, param in model.named_parameters():
        grad = named[name].grad
        assert grad is not None
        param.grad = distribute_tensor(grad, param.device_mesh, param.placements)  # type: ignore[attr-defined]


@ranks(2)
def test_names_of_stages_and_experts() -> None:
    """Where they reuse a name, their place is part of the key; elsewhere the plain name is enough."""
    model = nn.ModuleDict({"dense": nn.Linear(2, 2, bias=False), "expert": nn.Linear(2, 1, bias=False)})
    distclip.declare(model["expert"], sharded=dist.group.WORLD)
    clipper = GradClipper(model, distclip.EMARatioClip(1.0, 0.5), check="never")
    for param, size in zip(model.parameters(), (1.0, 1.0 + dist.get_rank()), strict=True):
        param.grad = torch.full_like(param, size)
    clipper.clip()
    state = clipper.state_dict()["rule_state"]
    ema = dict(zip(state["names"], state["ema"], strict=True))
    assert ema == {
        "dense.weight": 2.0,
        "expert.weight, place 0 of 2": pytest.approx(2**0.5),
        "expert.weight, place 1 of 2": pytest.approx(8**0.5),
    }
    rule = distclip.PerGroup({"expert.*": 1.0})
    GradClipper(model, rule, check="never").clip()
    assert model["expert"].weight.grad.flatten().tolist() == pytest.approx([(1 + dist.get_rank()) / 10**0.5] * 2)  # type: ignore[union-attr,operator]


@ranks(2)
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_a_loss_of_one_rank_skips_on_all(wrap: str) -> None:
    layout = LAYOUTS[wrap]
    model = layout.wrap(make_net())
    backward(layout, model)
    clipper = GradClipper(model, distclip.SkipOnSpike(8, 6.0, 2), check="never")
    for _ in range(3):
        assert not clipper.clip(loss=torch.tensor(1.0 + dist.get_rank())).skipped
        model.zero_grad()
        backward(layout, model)
    assert clipper.clip(loss=torch.tensor(1.0 if dist.get_rank() else 5.0)).skipped


COSTS: list[tuple[Any, int]] = [
    ([distclip.ClipByNorm(8.0), distclip.SkipAbove(1e9), 6.0, distclip.AdaGC(), distclip.ClipByGlobalNorm(1.0)], 1),
    (distclip.AdaptiveGradientClipping(), 1),
    ([distclip.AdaptiveGradientClipping(), distclip.ClipByNorm(1.0), 1.0], 1),
    (distclip.CentralizeGradient(), 1),
    ({"blocks.*": 1.0, "*": distclip.ClipByValue(1.0)}, 1),
    ([1.0, distclip.ClipByValue(1.0)], 1),
    ([distclip.ClipByValue(1.0), 1.0], 2),
    (distclip.StableSPAM(), 2),
    ([distclip.ClipByGlobalNorm(1.0), distclip.ClipByGlobalNorm(1.0, 1.0)], 2),
]


@ranks(2)
def test_collectives() -> None:
    """What docstrings say that a clip costs, once the plan stands."""
    layout = LAYOUTS["fsdp2"]
    model = layout.wrap(make_net())
    for rule, count in COSTS:
        clipper = GradClipper(model, rule, check="never")
        for _ in range(2):
            model.zero_grad()
            backward(layout, model)
            with recorded_collectives() as calls:
                clipper.clip()
        assert len(calls) == count, rule
        state = clipper.state_dict()
        assert clipper.state_dict() == state
