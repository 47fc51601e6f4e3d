"""Every layout against the oracle: the norm on every rank, and every clipped gradient."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distclip
from tests import oracle
from tests.layouts import LAYOUTS, Layout, backward, build, each_layout, every_layout
from tests.nets import loss_of, make_batch, make_net
from tests.ranks import run_ranks


def equal_bits(norm: Tensor) -> bool:
    """Whether all ranks hold the same bits; collective."""
    everybody = [torch.empty_like(norm) for _ in range(dist.get_world_size())]
    dist.all_gather(everybody, norm)
    return all(torch.equal(other, norm) for other in everybody)


def check_global_norm(layout: Layout, p: float, clipped: bool, device: str) -> None:
    model = build(layout, device)
    before = oracle.whole_grads(model)
    true_norm = oracle.norm(before, p)
    max_norm = true_norm / 3 if clipped else true_norm * 2

    norm = distclip.clip_grad_norm_(model, max_norm, p)

    assert type(norm) is Tensor
    assert norm.shape == ()
    assert norm.dtype == torch.float32
    assert equal_bits(norm)
    assert norm.item() == pytest.approx(true_norm, rel=1e-6)
    oracle.assert_same(oracle.whole_grads(model), oracle.clip_by_global_norm(before, max_norm, p), layout.dtype)
    # A module seen once has taught its layout: its parameters alone are enough from now on.
    again = distclip.grad_norm(model.parameters(), p)
    assert again.item() == pytest.approx(oracle.norm(oracle.whole_grads(model), p), rel=1e-6)


@pytest.mark.parametrize(
    ("p", "clipped"),
    [
        pytest.param(
            p, clipped, id=f"{p}-{'clipped' if clipped else 'below'}", marks=[] if fast else [pytest.mark.slow]
        )
        for p in (2.0, 1.0, math.inf, 3.5)
        for clipped in (True, False)
        # Whether nothing is written below the threshold does not depend on p; tests of numbers have others.
        for fast in [p == 2.0 or (clipped and math.isinf(p))]
    ],
)
@every_layout
def test_global_norm(layout: Layout, size: int, device: str, p: float, clipped: bool) -> None:
    run_ranks(check_global_norm, size, layout, p, clipped, device=device)


def check_clipper(layout: Layout, device: str) -> None:
    """The rules that look at single tensors and elements, and the report, by the object."""
    model = build(layout, device)
    before = oracle.whole_grads(model)
    norms = {name: oracle.norm({name: grad}) for name, grad in before.items()}
    median = float(np.median(list(norms.values())))

    report = distclip.GradClipper(model, distclip.ClipByNorm(median)).clip().to_dict()

    trained = {name: norm for name, norm in report["per_tensor"].items() if norm > 0}
    assert trained == pytest.approx({name: norm for name, norm in norms.items() if norm > 0}, rel=1e-6)
    assert report["total_norm"] == pytest.approx(oracle.norm(before), rel=1e-6)
    assert report["coefficient"] == pytest.approx(median / max(norms.values()), rel=1e-6)
    assert report["clipped"]
    after = oracle.whole_grads(model)
    oracle.assert_same(after, oracle.clip_by_norm(before, median), layout.dtype)

    low, high = (float(np.quantile(np.concatenate([g.ravel() for g in after.values()]), q)) for q in (0.1, 0.8))
    report = distclip.GradClipper(model, distclip.ClipByValue((low, high))).clip().to_dict()

    largest, smallest = max(g.max() for g in after.values()), min(g.min() for g in after.values())
    assert report["coefficient"] == pytest.approx(min(high / largest, low / smallest), rel=1e-6)
    assert report["total_norm"] == pytest.approx(oracle.norm(after), rel=1e-6)
    oracle.assert_same(oracle.whole_grads(model), oracle.clip_by_value(after, low, high), layout.dtype)


@each_layout
def test_clipper(layout: Layout, device: str) -> None:
    run_ranks(check_clipper, layout.world_sizes[0], layout, device=device)


def check_not_vacuous(layout: Layout) -> tuple[float, float]:
    """This rank's own share of the norm, and how far the truth is from one process on the whole batch."""
    model = build(layout)
    local = [getattr(p.grad, "_local_tensor", p.grad) for p in model.parameters() if p.grad is not None]
    share = oracle.norm({str(place): grad.double().numpy() for place, grad in enumerate(local)})
    alone = make_net(layout.hidden).to(layout.dtype)
    loss_of(alone, make_batch(16 if layout.accumulate else 8)).backward()
    # Accumulation sums two micro-batches, each a mean over half of the batch.
    expected = oracle.norm(oracle.whole_grads(alone)) * (2 if layout.accumulate else 1)
    return share, oracle.norm(oracle.whole_grads(model)) / expected


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_spread_the_same_network(layout: Layout) -> None:
    results = run_ranks(check_not_vacuous, layout.world_sizes[-1], layout)
    shares, ratios = zip(*results, strict=True)
    assert (len(set(shares)) > 1) == (layout.collectives > 0), "sharded layouts must differ from rank to rank"
    low_precision = layout.dtype != torch.float32 or "precision" in layout.name
    assert ratios == pytest.approx([1.0] * len(ratios), rel=3e-2 if low_precision else 1e-5)


def check_training(layout: Layout) -> None:
    """Several steps: the plan is kept while gradients are freed and made anew, and parameters move."""
    model = layout.wrap(make_net(layout.hidden))
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, foreach=False)
    clipper = distclip.GradClipper(model, 5.0)
    for _ in range(4):
        optimizer.zero_grad()
        backward(layout, model)
        true_norm = oracle.norm(oracle.whole_grads(model))
        report = clipper.clip()
        assert report.total_norm.item() == pytest.approx(true_norm, rel=1e-6)
        assert bool(report.clipped)
        optimizer.step()


@each_layout
def test_training(layout: Layout) -> None:
    run_ranks(check_training, layout.world_sizes[-1], layout)
