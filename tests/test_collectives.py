"""How many collectives a clip costs under every layout, and that nobody waits for ranks that take no part."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import distclip
from tests import oracle
from tests.collectives import recorded_collectives
from tests.layouts import LAYOUTS, Layout, backward, build, each_layout
from tests.nets import loss_of, make_batch, make_net
from tests.ranks import ranks, run_ranks


def count(layout: Layout, rule: distclip.Rule) -> list[list[str]]:
    model = build(layout)
    with recorded_collectives() as names:
        distclip.GradClipper(model, rule, check="never").clip()
    counted = [list(names)]
    clipper = distclip.GradClipper(model, rule)
    for _ in range(3):
        for param in model.parameters():
            param.grad = None
        backward(layout, model)
        with recorded_collectives() as names:
            clipper.clip()
        counted.append(list(names))
    if not any(isinstance(param, DTensor) for param in model.parameters()):
        counted.append(["no DTensor"])
    return counted


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(distclip.ClipByGlobalNorm(1.0), id="global"),
        pytest.param(distclip.ClipByGlobalNorm(1.0, float("inf")), id="inf", marks=pytest.mark.slow),
        pytest.param(distclip.ClipByValue((-0.1, 0.2)), id="value"),
    ],
)
@each_layout
def test_collectives_of_one_clip(layout: Layout, rule: distclip.Rule) -> None:
    for counted in run_ranks(count, layout.world_sizes[-1], layout, rule):
        unchecked, first, second, third, *plain = counted
        if layout.partial and rule.bounds is not None:
            # The norm's, and a header before the others: they would miss a rank that cannot clip.
            assert second.count("allreduce_") == third.count("allreduce_") == 2
            continue
        assert second == third == ["allreduce_"] * layout.collectives
        # The first clip also agrees on who takes part: where replicas are plain tensors there is nothing to agree on.
        assert len(first) >= len(unchecked) >= layout.collectives
        if plain and not layout.collectives:
            assert unchecked == []


# README's rows, and those of tests/layouts.py that stand behind each.
README_TABLE: list[tuple[str, list[str]]] = [
    ("one process", ["single"]),
    (
        "`DistributedDataParallel`, `replicate` (plain tensors or DTensors), `ZeroRedundancyOptimizer`",
        ["ddp", "ddp-accumulate", "replicate", "replicate-dtensor", "hsdp-only-replicas"],
    ),
    (
        "FSDP1 `FULL_SHARD`, `SHARD_GRAD_OP`, `HYBRID_SHARD`, `_HYBRID_SHARD_ZERO2`: flat or `use_orig_params`, "
        "nested, `ignored_states`, mixed dtypes, mixed precision, CPU offload",
        [name for name in LAYOUTS if name.startswith("fsdp1") and "no_shard" not in name],
    ),
    ("FSDP1 `NO_SHARD`", ["fsdp1-no_shard-orig", "fsdp1-no_shard-flat"]),
    (
        "FSDP2 `fully_shard` and HSDP: uneven and empty shards, ignored, frozen and tied parameters, "
        "`MixedPrecisionPolicy`, `CPUOffloadPolicy`, meshes flattened for context parallel",
        [name for name in LAYOUTS if name.startswith("fsdp2") and "tp" not in name] + ["hsdp-2x", "hsdp-only-shards"],
    ),
    (
        "tensor and sequence parallel: colwise, rowwise, vocabulary parallel, norms plain or DTensors, "
        "Partial gradients",
        ["tp", "tp-sequence"],
    ),
    ("FSDP2 + TP (2-D), HSDP + TP (3-D)", ["fsdp2+tp", "fsdp2+tp-sequence", "hsdp+tp"]),
]


@pytest.mark.parametrize(("row", "names"), README_TABLE, ids=[row.split(":")[0] for row, _ in README_TABLE])
def test_readme_tells_the_number(row: str, names: list[str]) -> None:
    counts = {LAYOUTS[name].collectives for name in names}
    assert len(counts) == 1
    line = f"| {row} | {counts.pop()} |"
    print(line)
    assert line in (Path(__file__).parent.parent / "README.md").read_text()


def test_readme_leaves_no_layout_out() -> None:
    assert {name for _, names in README_TABLE for name in names} == set(LAYOUTS)


@ranks(2)
def test_drop_in_functions_keep_the_plan() -> None:
    model = build(LAYOUTS["fsdp2"])
    distclip.grad_norm(model)
    with recorded_collectives() as names:
        norm = distclip.grad_norm(model.parameters())
        distclip.clip_grads_with_norm_(model.parameters(), 1.0, norm)
        distclip.clip_grad_value_(model, 0.1)
    assert names == ["allreduce_"]


def fsdp2_on(mesh: DeviceMesh) -> nn.Module:
    net = make_net()
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


@ranks(4)
def test_two_models_on_two_halves_do_not_wait_for_each_other(world_size: int) -> None:
    halves = init_device_mesh("cpu", (2, 2), mesh_dim_names=("model", "shard"))
    rank = dist.get_rank()
    model = fsdp2_on(halves["shard"])
    if rank >= 2:
        # The second half never clips: the first must not notice.
        return
    tokens, targets = make_batch()
    loss_of(model, (tokens[rank::2], targets[rank::2])).backward()
    before = oracle.norm(oracle.whole_grads(model))
    assert distclip.clip_grad_norm_(model, 1.0).item() == pytest.approx(before, rel=1e-6)


@ranks(4)
def test_hsdp_on_part_of_the_job_makes_its_group_once() -> None:
    """Three ranks' worth of groups never span a 2 x 2 mesh: the group that does is made by its members alone."""
    groups = dist.get_world_size()
    assert groups == 4
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = fsdp2_on(mesh)
    tokens, targets = make_batch()
    loss_of(model, (tokens[dist.get_rank() :: 4], targets[dist.get_rank() :: 4])).backward()
    before = oracle.norm(oracle.whole_grads(model))
    for _ in range(2):
        assert distclip.grad_norm(model).item() == pytest.approx(before, rel=1e-6)


@ranks(4)
def test_one_block_on_hsdp_another_on_fsdp() -> None:
    """Meshes of different shapes in one model: each tensor is divided by its own number of holders."""
    flat = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    first, second = make_net().blocks
    fully_shard(first, mesh=flat)
    fully_shard(second, mesh=grid)
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(6, 5, generator=generator)
    (second(first(x)) ** 2).sum().backward()
    grads = [p.grad for block in (first, second) for p in block.parameters()]
    whole = [grad.full_tensor() for grad in grads if isinstance(grad, DTensor)]
    truth = oracle.norm({str(place): grad.double().numpy() for place, grad in enumerate(whole)})
    assert distclip.grad_norm([first, second]).item() == pytest.approx(truth, rel=1e-6)
