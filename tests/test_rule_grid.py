"""Every rule under every layout, 30 steps with a restore in the middle, against one process in float64.

Nothing is trained. Each rank learns once, from a backward, which element of the whole model lies where in its
gradients: the backward delivers every element's number. Known random gradients then follow that map, as do the results
of the truth, so that the comparison needs no gathering and nothing of distclip's layouts.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import GradClipper, Rule
from distclip import rules as r
from distclip.rules import Decision, Norms
from tests.ranks import run_ranks
from tests.states import by_name

STEPS, MIDDLE = 30, 15
SPIKES, NAN, SILENT = {9: 40.0, 13: 8.0, 17: 60.0, 24: 5.0}, 11, (4, 16)
Array = NDArray[np.float64]


class Part(nn.Module):
    """Some of the model's tensors. Called with a value for each, it makes these its gradients."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], silent: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.names = [name for name in shapes if name not in silent]
        for place, (name, shape) in enumerate(shapes.items()):
            generator = torch.Generator().manual_seed(place + sum(shape))
            zero = name == "zero"
            value = torch.zeros(shape) if zero else torch.randn(shape, generator=generator)
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, grads: dict[str, Tensor], prefix: str) -> Tensor:
        total = torch.zeros(())
        for name in self.names:
            param, grad = getattr(self, name), grads[prefix + name]
            if isinstance(param, DTensor):
                product = (param * distribute_tensor(grad, param.device_mesh, param.placements)).sum()
                assert isinstance(product, DTensor)
                total = total + product.full_tensor()
            else:
                total = total + (param * grad).sum()
        return total


class Grid(nn.Module):
    """Vectors, matrices and a kernel; one tensor starts at zero, one never gets a gradient, one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Part({"weight": (7, 6), "bias": (7,), "scale": (1,)})
        self.second = Part({"kernel": (8, 3, 5), "bias": (5,), "zero": (5, 4)})
        self.third = Part({"weight": (3, 9), "unused": (4, 3)}, silent=("unused",))
        self.frozen = Part({"weight": (5,)}).requires_grad_(False)

    def forward(self, grads: dict[str, Tensor]) -> Tensor:
        parts = {name: part for name, part in self.named_children() if name != "frozen"}
        total = torch.zeros(())
        for name, part in parts.items():
            total = total + part(grads, f"{name}.")
        return total


def experts_of(place: int | None) -> Part:
    """One rank's expert; with None all, as one process would hold them, by the names that distclip gives them."""
    named = {"weight": (3, 4), "bias": (3,)}
    whole = Part({f"{name}, place {rank} of 2": shape for rank in range(2) for name, shape in named.items()})
    if place is None:
        return whole
    own = Part(named)
    own.load_state_dict({name: whole.get_parameter(f"{name}, place {place} of 2").detach() for name in named})
    return own


class WithExperts(Grid):
    def __init__(self, place: int | None) -> None:
        super().__init__()
        self.expert = experts_of(place)


@functools.cache
def sizes(experts: bool) -> dict[str, torch.Size]:
    """Every tensor that gets gradients."""
    model = WithExperts(None) if experts else Grid()
    named = model.named_parameters()
    return {name: p.shape for name, p in named if p.requires_grad and not name.endswith("unused")}


def numbered(experts: bool) -> dict[str, Tensor]:
    """The place of each element among all of the model; 0 is padding, or what never has a gradient."""
    found, first = {}, 1
    for name, shape in sizes(experts).items():
        found[name] = torch.arange(first, first + shape.numel(), dtype=torch.float32).view(shape)
        first += shape.numel()
    return found


@functools.cache
def gradients(experts: bool) -> Array:
    """Of all elements in all steps, from 1 on; float32 holds them."""
    total = sum(shape.numel() for shape in sizes(experts).values())
    random = np.random.default_rng(0)
    sizes_of_steps = np.exp(random.normal(0.0, 0.2, STEPS))
    grads = random.normal(0.1, 1.0, (STEPS, total + 1)) * sizes_of_steps[:, None]
    grads[:, 0] = 0.0
    places = {name: slice(int(ids.min()), int(ids.max()) + 1) for name, ids in numbered(experts).items()}
    for step, size in SPIKES.items():
        grads[step] *= size
    grads[20, places["third.weight"]] *= 100.0
    grads[NAN, places["second.bias"].start] = np.nan
    for step in SILENT:
        grads[step, places["second.kernel"]] = 0.0
    grads[:3, places["first.bias"]] = 0.0  # all of some rules' warm-up
    return grads.astype(np.float32).astype(np.float64)


class ToMedian(Rule):
    """A user's own: every tensor to the median norm of all that have one."""

    needs_per_tensor = True

    def decide(self, norms: Norms) -> Decision:
        assert norms.per_tensor is not None
        some = norms.per_tensor > 0
        median = norms.per_tensor.masked_fill(~some, torch.nan).nanmedian()
        return Decision(torch.where(some, median / norms.per_tensor, 1.0), median)


class Slower(r.StatefulRule):
    """A user's own with memory."""

    def initial(self) -> dict[str, float | list[float]]:
        return {"mean": 5.0}

    def decide(self, norms: Norms) -> Decision:
        mean = self.recall(norms)["mean"]
        self.learn(mean=torch.where(norms.finite, 0.9 * mean + 0.1 * norms.total.clamp(max=30.0), mean))
        return Decision((mean / norms.total).clamp(max=1.0), mean)


RULES: dict[str, Callable[[], Any]] = {
    "value": lambda: r.ClipByValue((-0.3, 0.5)),
    "global": lambda: 3.0,
    "global, p=1": lambda: r.ClipByGlobalNorm(20.0, 1.0),
    "global, p=inf": lambda: r.ClipByGlobalNorm(1.0, float("inf")),
    "norm": lambda: r.ClipByNorm(1.5),
    "average": lambda: r.ClipByAverageNorm(0.1),
    "rms": lambda: r.ClipByBlockRMS(0.8),
    "agc": lambda: r.AdaptiveGradientClipping(0.3, exclude="third.*"),
    "normalize": lambda: r.NormalizeGradient(2.0),
    "centralize": lambda: r.CentralizeGradient(),
    "autoclip": lambda: r.AutoClip(40.0),
    "autoclip, window": lambda: r.AutoClip(30.0, history=6),
    "quantile": lambda: r.QuantileClip(0.5, 5, 1.2),
    "zclip": lambda: r.ZClip(alpha=0.9, max_norm=None, warmup_steps=5),
    "zclip, mean": lambda: r.ZClip(max_norm=20.0, warmup_steps=6, clip_option="mean", skip_update_on_spike=True),
    "zclip, percentile": lambda: r.ZClip(max_norm=None, warmup_steps=4, mode="percentile", z_thresh=1.5),
    "adagc": lambda: r.AdaGC(lambda_abs=12.0, beta=0.9, warmup_steps=3),
    "ema": lambda: r.EMARatioClip(1.1, 0.9),
    "spam": lambda: r.StableSPAM(gamma3=0.9),
    "skip spikes": lambda: r.SkipOnSpike(window=5, sigma=2.5, min_history=3),
    "skip above": lambda: r.SkipAbove(25.0),
    "chain": lambda: [r.SkipOnSpike(8, 4.0, 4), r.CentralizeGradient(), r.EMARatioClip(1.0, 0.8), r.AutoClip(50.0)],
    "groups": lambda: {"first.*": r.AutoClip(40.0), ("*.bias", "expert.*"): 0.5, "second.*": r.AdaGC(2.0, 1.0, 0.9, 3)},
    "groups of chains": lambda: {
        "second.*": [r.ClipByValue(0.7), r.EMARatioClip(1.0, 0.5)],
        "*": r.AdaptiveGradientClipping(0.5),
    },
    "schedule": lambda: r.ClipByGlobalNorm(lambda step: 1.0 + 0.5 * step),
    "ratio by schedule": lambda: r.EMARatioClip(lambda step: 1.5 - 0.03 * step, 0.7),
    "own": ToMedian,
    "own with memory": Slower,
}


class Held(NamedTuple):
    """One rank's model, and where its gradients are."""

    model: Any
    grads: list[tuple[nn.Parameter, Tensor]]
    ids: list[NDArray[np.int64]]
    group: Any = None


class Run(NamedTuple):
    """What one rank saw of one rule."""

    results: list[list[Array] | None]
    """Its gradients after each step; None where the step was left out."""
    reports: list[dict[str, float]]
    middle: dict[str, Any]
    last: dict[str, Any]


def delivered(model: nn.Module) -> nn.Module:
    model(numbered(False)).backward()
    return model


def _single(_: Grid) -> nn.Module:
    return delivered(Grid())


def _ddp(net: Grid) -> nn.Module:
    return delivered(DistributedDataParallel(net, find_unused_parameters=True))


def _fsdp1(net: Grid, orig: bool) -> nn.Module:
    options: dict[str, Any] = {"use_orig_params": orig, "device_id": torch.device("cpu")}
    for name in ("second", "frozen"):
        setattr(net, name, FullyShardedDataParallel(getattr(net, name), **options))
    return delivered(FullyShardedDataParallel(net, **options))


def _fsdp2(net: Grid, mesh: Any = None) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",)) if mesh is None else mesh
    for part in (net.second, net.third):
        fully_shard(part, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return delivered(net)


def _hsdp(net: Grid) -> nn.Module:
    return _fsdp2(net, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def _fsdp2_tp(net: Grid) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tp"))
    cut: dict[str, Placement] = {"first.weight": Shard(1), "second.kernel": Shard(0), "second.zero": Shard(1)}
    for prefix, part in net.named_children():
        for name, param in list(part.named_parameters()):
            place = [cut.get(f"{prefix}.{name}", Replicate())]
            whole = distribute_tensor(param.detach(), mesh["tp"], place)
            part.register_parameter(name, nn.Parameter(whole, requires_grad=param.requires_grad))
    return _fsdp2(net, mesh["shard"])


def _pipeline(net: Grid) -> nn.Module:
    grads = numbered(False)
    for name in [("second", "frozen"), ("first", "third")][dist.get_rank()]:
        delattr(net, name)
    give(net, grads)
    return net


def _experts(_: Grid) -> nn.Module:
    model, grads, place = WithExperts(dist.get_rank()), numbered(True), dist.get_rank()
    distclip.declare(model.expert, sharded=dist.group.WORLD)
    give(model, {name.removesuffix(f", place {place} of 2"): grad for name, grad in grads.items()})
    return model


def give(model: nn.Module, grads: dict[str, Tensor]) -> None:
    for name, param in model.named_parameters():
        if name in grads:
            param.grad = grads[name].clone()


class Layout(NamedTuple):
    ranks: int
    wrap: Callable[[Grid], nn.Module]


LAYOUTS = {
    "single": Layout(1, _single),
    "ddp": Layout(2, _ddp),
    "fsdp1 flat": Layout(2, functools.partial(_fsdp1, orig=False)),
    "fsdp1 orig": Layout(2, functools.partial(_fsdp1, orig=True)),
    "fsdp2": Layout(4, _fsdp2),
    "hsdp": Layout(4, _hsdp),
    "fsdp2+tp": Layout(4, _fsdp2_tp),
    "pipeline": Layout(2, _pipeline),
    "experts": Layout(2, _experts),
}


def local(grad: Tensor) -> Tensor:
    return grad._local_tensor if isinstance(grad, DTensor) else grad


def held(layout: str) -> Held:
    model = LAYOUTS[layout].wrap(Grid())
    grads = [(param, param.grad) for param in model.parameters() if param.grad is not None]
    ids = [local(grad).detach().round().long().numpy().copy() for _, grad in grads]
    return Held(model, grads, ids, dist.group.WORLD if layout == "pipeline" else None)


def steps_of(there: Held, rule: str, experts: bool, first: int, state: dict[str, Any] | None) -> Run:
    def new() -> GradClipper:
        return GradClipper(there.model, RULES[rule](), pipeline_group=there.group, check="never")

    clipper, results, reports, middle = new(), [], [], {}
    if state is not None:
        clipper.load_state_dict(state)
    for step in range(first, STEPS):
        if step == MIDDLE:
            middle = clipper.state_dict()
            clipper = new()
            clipper.load_state_dict(middle)
        for (param, grad), ids in zip(there.grads, there.ids, strict=True):
            local(grad).copy_(torch.from_numpy(gradients(experts)[step][ids]))
            param.grad = grad
        report = clipper.clip()
        reports.append(told(report))
        after = [local(grad).double().numpy().copy() for _, grad in there.grads]
        if report.skipped:
            assert all(param.grad is None for param, _ in there.grads)
        results.append(None if report.skipped else after)
    return Run(results, reports, middle, clipper.state_dict())


def told(report: distclip.ClipReport) -> dict[str, float]:
    names = ("total_norm", "coefficient", "threshold", "clipped", "nonfinite", "skipped")
    return {name: float(getattr(report, name)) for name in names}


@torch.no_grad()
def body(
    layout: str, rules: list[str], first: int, states: dict[str, Any]
) -> tuple[list[NDArray[np.int64]], dict[str, Run]]:
    with torch.enable_grad():
        there = held(layout)
    experts = layout == "experts"
    return there.ids, {rule: steps_of(there, rule, experts, first, states.get(rule)) for rule in rules}


def zero_body(stage: int, rules: list[str]) -> tuple[list[NDArray[np.int64]], dict[str, Run]]:
    """DeepSpeed steps by itself: what its optimizer is handed stands for the gradients. It moves nothing."""
    from tests.test_deepspeed import BY_NAME, make_engine

    engine = make_engine(BY_NAME[f"zero{stage}-fp32"], Grid(), gradient_accumulation_steps=1, gradient_clipping=0.0)
    handed: list[Array] = []

    def record(closure: None = None) -> None:
        params = (param for group in engine.optimizer.optimizer.param_groups for param in group["params"])
        handed.extend(param.grad.double().numpy().ravel().copy() for param in params if param.grad is not None)

    def stepped(grads: dict[str, Tensor]) -> list[Array]:
        handed.clear()
        engine.backward(engine(grads))
        engine.step()
        return list(handed)

    engine.optimizer.optimizer.step = record
    numbers = numbered(False)
    ids = [part.round().astype(np.int64) for part in stepped(numbers)]
    steps = [
        {name: torch.from_numpy(grads[ids_.long().numpy()]).float() for name, ids_ in numbers.items()}
        for grads in gradients(False)
    ]
    runs = {}
    for rule in rules:
        clipper, results, reports, middle = GradClipper(engine, RULES[rule](), check="never"), [], [], {}
        for step, grads in enumerate(steps):
            if step == MIDDLE:
                middle = clipper.state_dict()
                clipper.detach()
                clipper = GradClipper(engine, RULES[rule](), check="never")
                clipper.load_state_dict(middle)
            after = stepped(grads)
            assert clipper.report is not None
            assert bool(clipper.report.skipped) == (not after)
            reports.append(told(clipper.report))
            results.append(after or None)
        runs[rule] = Run(results, reports, middle, clipper.state_dict())
        clipper.detach()
    return ids, runs


@functools.cache
def truth(rule: str, experts: bool) -> Run:
    """One process, the whole model, float64, all steps in one go."""
    model = (WithExperts(None) if experts else Grid()).double()
    clipper, ids = GradClipper(model, RULES[rule](), check="never"), numbered(experts)
    results: list[list[Array] | None] = []
    reports = []
    middle: dict[str, Any] = {}
    for step in range(STEPS):
        if step == MIDDLE:
            middle = clipper.state_dict()
        give(model, {name: torch.from_numpy(gradients(experts)[step][ids[name].long().numpy()]) for name in ids})
        kept = [param.grad for name, param in model.named_parameters() if name in ids]
        report = clipper.clip()
        reports.append(told(report))
        whole = np.concatenate([np.zeros(1), *(grad.numpy().ravel() for grad in kept if grad is not None)])
        results.append(None if report.skipped else [whole])
    return Run(results, reports, middle, clipper.state_dict())


def wrong(rule: str, ids: list[NDArray[np.int64]], got: Run, experts: bool, first: int = 0) -> Iterator[str]:
    """What differs from the truth."""
    want = truth(rule, experts)
    for step in range(first, STEPS):
        expected, result, where = want.results[step], got.results[step - first], f"{rule}, step {step}"
        if (expected is None) != (result is None):
            yield f"{where}: skipped {result is None}, not {expected is None}"
        elif expected is not None and result is not None:
            largest = np.nanmax(np.abs(expected[0]), initial=0.0)
            largest = largest if np.isfinite(largest) else 1.0
            for mine, values in zip(ids, result, strict=True):
                good = np.isclose(values, expected[0][mine], 1e-5, 1e-6 * largest, equal_nan=True)
                if not good[mine > 0].all():
                    yield f"{where}: gradients {values[~good][:3]}, not {expected[0][mine][~good][:3]}"
        for name, number in got.reports[step - first].items():
            if not np.isclose(number, want.reports[step][name], 1e-5, 0, equal_nan=True):
                yield f"{where}: {name} {number}, not {want.reports[step][name]}"
    for when in ("middle", "last"):
        one, other = by_name(getattr(want, when)), by_name(getattr(got, when))
        if not other and when == "middle" and first > 0:
            continue
        # A tensor that never had a gradient teaches nothing; some wrappers do not know it apart.
        names = {name for name in one.keys() | other.keys() if "unused" not in name and "frozen" not in name}
        for name in sorted(names):
            if repr(one.get(name)) == repr(other.get(name)):
                continue
            if name not in one or name not in other or isinstance(one[name], str):
                yield f"{rule}, state {when}: {name} {other.get(name)}, not {one.get(name)}"
            elif not np.allclose(one[name], other[name], 1e-5, 1e-7, equal_nan=True):
                yield f"{rule}, state {when}: {name} {other[name]}, not {one[name]}"


def check(outcomes: list[Any], experts: bool = False, first: int = 0, drops_nan: bool = False) -> None:
    """All ranks against the truth, and against each other; `drops_nan`: DeepSpeed leaves such a step out by itself."""
    problems = []
    seen = np.unique(np.concatenate([part.ravel() for ids, _ in outcomes for part in ids]))
    assert set(range(1, len(gradients(experts)[0]))) <= set(seen.tolist()), "the ranks hold the whole model"
    for rank, (ids, runs) in enumerate(outcomes):
        for rule, run in runs.items():
            lines = wrong(rule, ids, run, experts, first)
            known = f"{rule}, step {NAN}: skipped "
            problems += [f"rank {rank}, {line}" for line in lines if not (drops_nan and line.startswith(known))]
            chief = outcomes[0][1][rule]
            # repr tells every bit of a float, and NaN from nothing else.
            if repr((run.reports, run.middle, run.last)) != repr((chief.reports, chief.middle, chief.last)):
                problems.append(f"rank {rank}, {rule}: another report or state than rank 0")
            if not same_bits(ids, run, outcomes[0][0], chief):
                problems.append(f"rank {rank}, {rule}: other bits than rank 0 in what both hold")
    assert not problems, f"{len(problems)} differences:\n" + "\n".join(problems[:40])


def same_bits(ids: list[NDArray[np.int64]], run: Run, other_ids: list[NDArray[np.int64]], other: Run) -> bool:
    mine, theirs = (np.concatenate([part.ravel() for part in each]) for each in (ids, other_ids))
    both = np.setdiff1d(np.intersect1d(mine, theirs), [0])
    here, there = (np.array([np.flatnonzero(all_ == one)[0] for one in both], dtype=int) for all_ in (mine, theirs))
    for result, reference in zip(run.results, other.results, strict=True):
        if result is not None and reference is not None:
            left, right = (np.concatenate([part.ravel() for part in each]) for each in (result, reference))
            if not np.array_equal(left[here], right[there], equal_nan=True):
                return False
    return True


@functools.cache
def outcomes_of(layout: str) -> list[Any]:
    return run_ranks(body, LAYOUTS[layout].ranks, layout, list(RULES), 0, {}, timeout=120)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow if name in ("hsdp", "fsdp2+tp") else ()) for name in LAYOUTS]
)
def test_layout(layout: str) -> None:
    check(outcomes_of(layout), layout == "experts")


@pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning")
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero(stage: int) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    check(run_ranks(zero_body, 2, stage, list(RULES), timeout=120), drops_nan=True)


@pytest.mark.parametrize("rule", RULES)
def test_rules_act(rule: str) -> None:
    """Else the grid would compare what nothing was done to."""
    run = truth(rule, False)
    acted = [bool(report["clipped"] or report["skipped"]) for report in run.reports]
    changed = [
        result is None or not np.allclose(result[0], gradients(False)[step], equal_nan=True)
        for step, result in enumerate(run.results)
    ]
    assert any(changed[:MIDDLE])
    assert any(changed[MIDDLE:])
    assert any(acted) or rule in ("centralize", "normalize", "own", "spam")


@pytest.mark.parametrize("layout", ["single", "ddp"])
def test_resumed_under_another_sharding(layout: str) -> None:
    """Saved by four ranks of FSDP2."""
    _, runs = outcomes_of("fsdp2")[0]
    states = {rule: run.middle for rule, run in runs.items() if by_name(run.middle["rule_state"])}
    assert len(states) >= 14
    check(run_ranks(body, LAYOUTS[layout].ranks, layout, list(states), MIDDLE, states), first=MIDDLE)
