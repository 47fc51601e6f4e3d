"""Parameter lists that are parts of a model, and several optimizers, each with a part of its own."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import GradClipper
from tests import oracle
from tests.layouts import LAYOUTS, Layout, backward, build, marks_of
from tests.nets import Net, make_net
from tests.ranks import ranks, run_ranks
from tests.test_layouts import equal_bits

# A flat parameter packs a whole unit: its blocks are the parts there are.
PARTS = {"first block": "blocks.0.", "norms": "norm.", "everything but a block": "!blocks.1."}


def belongs(name: str, part: str) -> bool:
    return part[1:] not in name if part.startswith("!") else part in name


def subset(grads: oracle.Whole, part: str) -> oracle.Whole:
    return {name: grad for name, grad in grads.items() if belongs(name, part)}


def check_subset(layout: Layout, part: str) -> None:
    """The norm is the part's, on every rank, and nothing but the part is scaled."""
    model = build(layout)
    before = oracle.whole_grads(model)
    chosen = subset(before, part)
    assert 0 < len(chosen) < len(before)
    true_norm = oracle.norm(chosen)
    # An FSDP1 model must have been seen once; elsewhere this changes nothing.
    distclip.grad_norm(model)
    params = [param for name, param in model.named_parameters() if belongs(oracle.clean(name), part)]

    norm = distclip.clip_grad_norm_(params, true_norm / 3)

    assert equal_bits(norm)
    assert norm.item() == pytest.approx(true_norm, rel=1e-6)
    expected = before | oracle.clip_by_global_norm(chosen, true_norm / 3)
    after = oracle.whole_grads(model)
    if layout.partial:
        # Scaled before they are summed, parts that cancel keep the rounding of each.
        for name, grad in expected.items():
            np.testing.assert_allclose(after[name], grad, rtol=1e-6, atol=1e-7 * abs(grad).max(), err_msg=name)
    else:
        oracle.assert_same(after, expected, layout.dtype)


def is_flat(layout: Layout) -> bool:
    return layout.name.endswith("-flat") or layout.name == "fsdp1-bf16-grads"


CASES = [
    pytest.param(layout, part, id=f"{layout.name}-{name}", marks=marks_of(layout))
    for layout in LAYOUTS.values()
    for name, part in PARTS.items()
    if layout.world_sizes[-1] <= 4 and (part != "norm." or not is_flat(layout))
]


@pytest.mark.parametrize(("layout", "part"), CASES)
def test_subset(layout: Layout, part: str) -> None:
    run_ranks(check_subset, layout.world_sizes[0], layout, part)


@ranks(2)
@pytest.mark.parametrize("name", ["ddp", "fsdp1-full_shard-orig", "fsdp1-full_shard-flat", "fsdp2"])
def test_only_the_trained_parameters(name: str) -> None:
    """What many scripts hand over, and their optimizers' param_groups hold."""
    model = build(LAYOUTS[name])
    true_norm = oracle.norm(oracle.whole_grads(model))
    trained = [param for param in model.parameters() if param.requires_grad]
    distclip.grad_norm(model)
    optimizer = torch.optim.SGD([{"params": trained[::2]}, {"params": trained[1::2]}], lr=0.1, foreach=False)
    assert distclip.grad_norm(trained).item() == pytest.approx(true_norm, rel=1e-6)
    norms = [distclip.grad_norm(group["params"]).item() for group in optimizer.param_groups]
    assert oracle.norm({str(place): torch.tensor(norm).numpy() for place, norm in enumerate(norms)}) == pytest.approx(
        true_norm, rel=1e-6
    )
    assert min(norms) > 0


@ranks(2)
def test_a_part_of_an_fsdp1_model_that_was_never_seen() -> None:
    model = build(LAYOUTS["fsdp1-full_shard-orig"])
    params = [param for name, param in model.named_parameters() if "norm" in name]
    with pytest.raises(RuntimeError, match="that distclip has never seen"):
        distclip.clip_grad_norm_(params, 1.0)


@ranks(2)
@pytest.mark.parametrize("name", ["single", "ddp", "fsdp1-full_shard-orig", "fsdp1-full_shard-flat", "fsdp2"])
def test_a_clipper_for_each_optimizer(name: str) -> None:
    """Two optimizers over disjoint parts, each with a clipper and a threshold; several steps."""
    layout = LAYOUTS[name]
    model = layout.wrap(make_net())
    net = model.module if isinstance(model, DistributedDataParallel | FullyShardedDataParallel) else model
    assert isinstance(net, Net)
    block, other = net.blocks
    parts = {"blocks.0.": [block], "blocks.1.": [other]}
    clippers = {part: GradClipper(modules, 1.0) for part, modules in parts.items()}
    optimizers = [
        torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.01, foreach=False)
        for modules in parts.values()
    ]
    for _ in range(3):
        model.zero_grad()
        backward(layout, model)
        before = oracle.whole_grads(model)
        expected = dict(before)
        for part, clipper in clippers.items():
            chosen = subset(before, part)
            report = clipper.clip()
            assert report.total_norm.item() == pytest.approx(oracle.norm(chosen), rel=1e-6)
            expected |= oracle.clip_by_global_norm(chosen, 1.0)
        oracle.assert_same(oracle.whole_grads(model), expected, layout.dtype)
        for optimizer in optimizers:
            optimizer.step()


class Towers(nn.Module):
    """Two towers and a head, as a model that is trained by two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.tanh(self.a(x)) * torch.tanh(self.b(x)))
        return out


def wrapped_towers(how: str) -> tuple[nn.Module, Towers]:
    torch.manual_seed(0)
    towers = Towers()
    if how == "ddp":
        return DistributedDataParallel(towers), towers
    if how == "fsdp2":
        for part in (towers.a, towers.b, towers.head):
            fully_shard(part)
        fully_shard(towers)
        return towers, towers
    for name in ("a", "b", "head"):
        unit = FullyShardedDataParallel(
            getattr(towers, name), device_id=torch.device("cpu"), use_orig_params=how == "fsdp1-orig"
        )
        setattr(towers, name, unit)
    root = FullyShardedDataParallel(towers, device_id=torch.device("cpu"), use_orig_params=how == "fsdp1-orig")
    return root, towers


@ranks(2)
@pytest.mark.parametrize("how", ["ddp", "fsdp2", "fsdp1-orig", "fsdp1-flat"])
def test_a_clipper_of_several_modules(how: str) -> None:
    model, towers = wrapped_towers(how)
    body, head = GradClipper([towers.a, towers.b], 0.1), GradClipper(towers.head, 0.2)
    one = torch.optim.SGD([*towers.a.parameters(), *towers.b.parameters()], lr=0.1, foreach=False)
    two = torch.optim.AdamW(towers.head.parameters(), foreach=False)
    for step in range(3):
        one.zero_grad()
        two.zero_grad()
        data = torch.linspace(-1, 1, 16).view(4, 4)[torch.distributed.get_rank() :: 2] + step
        (100 * model(data).square().mean()).backward()
        before = oracle.whole_grads(model)
        top = {name: grad for name, grad in before.items() if name.startswith("head")}
        rest = {name: grad for name, grad in before.items() if name not in top}
        # By the module once, then by the parameters that its optimizer holds.
        if step == 0:
            assert body.clip().total_norm.item() == pytest.approx(oracle.norm(rest), rel=1e-6)
        else:
            norm = distclip.clip_grad_norm_(one.param_groups[0]["params"], 0.1)
            assert norm.item() == pytest.approx(oracle.norm(rest), rel=1e-6)
        assert head.clip().total_norm.item() == pytest.approx(oracle.norm(top), rel=1e-6)
        expected = oracle.clip_by_global_norm(rest, 0.1) | oracle.clip_by_global_norm(top, 0.2)
        oracle.assert_same(oracle.whole_grads(model), expected)
        one.step()
        two.step()
