"""What comes and goes: models, clippers, threads, processes, copies, files, parameters, process groups."""

import copy
import gc
import io
import json
import math
import multiprocessing
import os
import pickle
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.utils import parametrizations, parametrize
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

import distclip
from distclip import ClipByNorm, GradClipper, Monitor, cache, layout
from distclip.config import ClipConfig
from distclip.layout import base, declared
from distclip.layout.memory import Mark
from distclip.plan import Plan
from tests import oracle
from tests.layouts import LAYOUTS, Layout, backward, build
from tests.ranks import ranks

BOUND = 0.5
CLASSES = (Tensor, nn.Module, GradClipper, Plan, Mark, Monitor, Optimizer, dist.ProcessGroup)

pytestmark = [
    # Of Python, where a process with threads (torch's own) forks.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Profiler function:UserWarning"),
]


def small_model(width: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))


def run_backward(model: nn.Module, factor: float = 10.0) -> None:
    for param in model.parameters():
        param.grad = None
    inputs = torch.linspace(-1, 1, 12).view(3, 4).to(next(model.parameters()).dtype)
    (factor * model(inputs).float().square().sum()).backward()


def grads_of(model: nn.Module) -> oracle.Whole:
    return {
        name: param.grad.detach().double().numpy().copy()
        for name, param in model.named_parameters()
        if param.grad is not None
    }


def check_clip(model: nn.Module, clip: Callable[[], Any], bound: float = BOUND) -> None:
    """A backward and a clip of one process, against float64."""
    run_backward(model)
    before = grads_of(model)
    assert oracle.norm(before) > 2 * bound
    told = clip()
    norm = told if isinstance(told, Tensor) else None if told is None else told.total_norm
    if norm is not None:
        assert norm.item() == pytest.approx(oracle.norm(before), rel=1e-6)
    dtype = next(model.parameters()).dtype
    oracle.assert_same(grads_of(model), oracle.clip_by_global_norm(before, bound), dtype)


def check_ranks(model: nn.Module, layout: Layout, clip: Callable[[], Any]) -> None:
    """The same where ranks share a model."""
    for param in model.parameters():
        param.grad = None
    backward(layout, model)
    before = oracle.whole_grads(model)
    assert oracle.norm(before) > 2 * BOUND
    told = clip()
    norm = told if isinstance(told, Tensor) else told.total_norm
    assert norm.item() == pytest.approx(oracle.norm(before), rel=1e-6)
    oracle.assert_same(oracle.whole_grads(model), oracle.clip_by_global_norm(before, BOUND))


# ---- nothing is left behind ----


def alive() -> Counter[str]:
    """How many objects of each class that matters there are, and entries of what distclip remembers."""
    gc.collect()
    found: Counter[str] = Counter()
    # type() and not isinstance(), which would ask lazy objects for their class.
    for kind, count in Counter(map(type, gc.get_objects())).items():
        found.update({each.__name__: count for each in CLASSES if issubclass(kind, each)})
        if str(kind.__module__).startswith("distclip."):
            found[f"distclip's {kind.__qualname__}"] += count
    found["entries"] = len(cache._entries) + len(cache._without_parameters)
    found["learned"] = sum(map(len, layout._learned))
    found["declared"] = len(declared._declared)
    found["groups"] = len(base._ranks_of)
    if dist.is_initialized():
        found["c10d groups"] = len(distributed_c10d._world.pg_map)
    return found


def with_functions(model: nn.Module) -> None:
    distclip.clip_grad_norm_(model, BOUND)
    distclip.clip_grad_value_(list(model.parameters()), 0.1)
    distclip.clip_grads_with_norm_(model, BOUND, distclip.grad_norm(model))


def with_clipper(model: nn.Module) -> None:
    clipper = GradClipper(model, [BOUND, ClipByNorm(0.1)], details_every=1, check="always")
    clipper.register_report_hook(lambda clipper, report, loss: None)
    clipper.clip()


def with_optimizer(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    GradClipper(model, BOUND, optimizer=optimizer).clip()  # the step that it waits for never comes


def with_attachment(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    GradClipper(model, BOUND, scaler=SCALER).attach(optimizer)
    scaled_step(model, optimizer, SCALER)
    SCALER.update()


def with_monitor(model: nn.Module) -> None:
    clipper = GradClipper(model, BOUND)
    monitor = Monitor(clipper, [lambda step, metrics: None], log_every=1)
    clipper.clip()
    monitor.flush()  # and is never closed


def with_overlap(model: nn.Module) -> None:
    clipper = GradClipper(model, BOUND, overlap=True)
    for _ in range(2):
        clipper.clip()
        run_backward(model)


def with_hooks_of_backward(model: nn.Module) -> None:
    for param in model.parameters():
        param.grad = None
    clipper = GradClipper(model, ClipByNorm(0.1))
    clipper.clip_in_backward()
    run_backward(model)
    assert clipper.report is not None


def with_audit(model: nn.Module) -> None:
    distclip.audit(model)


def with_patch(model: nn.Module) -> None:
    with distclip.patch():
        nn.utils.clip_grad_norm_(model.parameters(), BOUND)


SCALER = torch.amp.GradScaler("cpu", init_scale=1.0)
WAYS = (
    with_functions,
    with_clipper,
    with_optimizer,
    with_attachment,
    with_monitor,
    with_overlap,
    with_hooks_of_backward,
    with_audit,
    with_patch,
)


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", WAYS)
def test_models_that_were_clipped_leave_nothing(way: Callable[[nn.Module], None], count: int) -> None:
    def once() -> None:
        model = small_model()
        run_backward(model)
        way(model)

    once()
    before = alive()
    for _ in range(count):
        once()
    assert alive() == before


def test_what_is_counted_would_be_seen() -> None:
    before = alive()
    model = small_model()
    run_backward(model)
    clipper = GradClipper(model, BOUND)
    clipper.clip()
    distclip.grad_norm(model)
    more = alive() - before
    assert more["GradClipper"] == more["entries"] == 1
    assert more["Module"] == 4
    assert more["Plan"] == 2
    assert more["Mark"] > 4


def test_a_clipper_that_goes_takes_its_hooks_from_a_model_that_stays() -> None:
    model = small_model()
    run_backward(model)
    optimizer = torch.optim.SGD(model.parameters())
    for _ in range(20):
        clipper = GradClipper(model, BOUND, overlap=True).attach(optimizer)
        for _ in range(2):
            run_backward(model)
            optimizer.step()
        clipper.detach()
        del clipper
    gc.collect()
    left = [len(param._post_accumulate_grad_hooks or ()) for param in model.parameters()]
    assert max(left) <= 1  # a frame may still hold the last one; nothing piles up
    assert "step" not in vars(optimizer)
    assert not hasattr(optimizer, "_distclip_attachment")


@ranks(2)
@pytest.mark.parametrize("name", ["ddp", "fsdp1-full_shard-orig", "fsdp2"])  # FSDP1's flat ones never go by themselves
def test_models_of_several_ranks_leave_nothing(name: str) -> None:
    group = dist.group.WORLD
    assert group is not None

    def once() -> None:
        model = build(LAYOUTS[name])
        clipper = GradClipper(model, BOUND, overlap=True)
        clipper.clip()
        distclip.grad_norm(model)
        backward(LAYOUTS[name], model)
        clipper.clip()

    once()
    once()
    before = alive()
    for _ in range(12):
        once()
    after = alive()
    # Meshes, specs and buffers of torch's own come and go: what matters does not grow with the number of models.
    grown = {key: count - before[key] for key, count in after.items() if count - before[key] >= 12}
    assert not grown


# ---- threads ----


def test_models_in_several_threads_at_once() -> None:
    start = threading.Barrier(6)

    def train(width: int, overlap: bool) -> None:
        with torch.random.fork_rng():
            model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))
        clipper = GradClipper(model, BOUND, overlap=overlap)
        start.wait(30)
        for step in range(20):
            check_clip(model, clipper.clip)
            if step % 5 == 0:
                check_clip(model, lambda: distclip.clip_grad_norm_(model, BOUND))

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(train, width, width % 2 == 0) for width in range(3, 9)]:
            done.result(60)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_clipper_that_is_used_in_another_thread(overlap: bool) -> None:
    model = small_model()
    clipper = GradClipper(model, BOUND, overlap=overlap)
    check_clip(model, clipper.clip)
    for _ in range(3):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(check_clip, model, clipper.clip).result(60)
            # The backward here, the clip there.
            run_backward(model)
            truth = oracle.norm(grads_of(model))
            assert pool.submit(clipper.clip).result(60).total_norm.item() == pytest.approx(truth, rel=1e-6)


# ---- processes ----


class Clipped(Dataset[float]):
    """Norms of a model that each worker clips by its copy of a clipper."""

    def __init__(self, model: nn.Module, clipper: GradClipper) -> None:
        self.model, self.clipper = model, clipper

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> float:
        run_backward(self.model, factor=10.0 * (index + 1))
        self.clipper.clip()
        return distclip.grad_norm(self.model).item()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_workers_of_a_data_loader(tmp_path: Path) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    clipper = GradClipper(model, BOUND).attach(optimizer)
    with Monitor(clipper, [tmp_path / "run.jsonl"], log_every=1, alarms=()):
        for _ in range(3):
            run_backward(model)
            optimizer.step()
        weights = [param.detach().clone() for param in model.parameters()]
        loader = DataLoader(Clipped(model, clipper), batch_size=1, num_workers=2, multiprocessing_context="fork")
        assert [float(norm) for norm in loader] == pytest.approx([BOUND] * 4, rel=1e-5)
        assert clipper.steps == 3
        torch.testing.assert_close(list(model.parameters()), weights)
        run_backward(model)
        optimizer.step()
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in lines] == [None, 1, 2, 3, 4]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_that_flushes_says_nothing(tmp_path: Path) -> None:
    model = small_model()
    clipper = GradClipper(model, BOUND)
    monitor = Monitor(clipper, [tmp_path / "run.jsonl"], log_every=100, alarms=())
    check_clip(model, clipper.clip)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            check_clip(model, clipper.clip)
            monitor.flush()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    monitor.close()
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in lines] == [None, 1]


def in_a_new_process(
    clipper: GradClipper, optimizer: Optimizer, report: distclip.ClipReport, config: ClipConfig
) -> tuple[dict[str, Any], float, str, int]:
    (model,) = clipper._params.modules
    check_clip(model, clipper.clip)
    run_backward(model)
    optimizer.step()
    return report.to_dict(), distclip.grad_norm(model).item(), str(config.make_rule()), clipper.steps


def test_what_is_sent_to_a_spawned_process() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    clipper = GradClipper(model, BOUND).attach(optimizer)
    check_clip(model, clipper.clip)
    config = ClipConfig(rule="zclip", groups={"head.*": "norm=0.5"})
    report = clipper.report
    assert report is not None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        told = pool.submit(in_a_new_process, clipper, optimizer, report, config).result(60)
    assert told[1] == pytest.approx(BOUND, rel=1e-5)
    assert (told[0], *told[2:]) == (report.to_dict(), str(config.make_rule()), 3)


# ---- copies and files ----


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def saved(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


copied = pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])


@copied
@pytest.mark.parametrize("fused", [False, True])
def test_a_copied_clipper_and_its_model_are_others(copied: Callable[[Any], Any], fused: bool) -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    clipper = GradClipper(model, BOUND, optimizer=optimizer, overlap=True)
    heard: list[int] = []
    clipper.register_report_hook(lambda clipper, report, loss: heard.append(clipper.steps))
    for _ in range(3):
        run_backward(model)
        clipper.clip()  # the fused step is still to come
    twin, steps, other = copied((model, optimizer, clipper))
    assert other.steps == 3
    assert other.report.to_dict() == clipper.report.to_dict()  # type: ignore[union-attr]
    assert not any(param._post_accumulate_grad_hooks for param in twin.parameters())
    mine = grads_of(model)
    run_backward(twin, factor=20.0)
    truth = oracle.norm(grads_of(twin))
    assert other.clip().total_norm.item() == pytest.approx(truth, rel=1e-6)
    steps.step()
    assert distclip.grad_norm(twin).item() == pytest.approx(BOUND, rel=1e-5)
    assert (heard, clipper.steps, other.steps) == ([1, 2, 3], 3, 4)
    np.testing.assert_equal(grads_of(model), mine)
    optimizer.step()
    assert distclip.grad_norm(model).item() == pytest.approx(BOUND, rel=1e-5)


@copied
def test_a_copy_of_an_attached_clipper_is_attached_to_the_copied_optimizer(copied: Callable[[Any], Any]) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    clipper = GradClipper(model, BOUND).attach(optimizer)
    run_backward(model)
    optimizer.step()
    twin, steps, other = copied((model, optimizer, clipper))
    run_backward(twin)
    steps.step()
    assert distclip.grad_norm(twin).item() == pytest.approx(BOUND, rel=1e-5)
    assert (clipper.steps, other.steps) == (1, 2)
    other.detach()
    run_backward(twin)
    steps.step()
    assert distclip.grad_norm(twin).item() > 2 * BOUND
    run_backward(model)
    optimizer.step()
    assert (clipper.steps, other.steps) == (2, 2)


def test_a_shallow_copy_leaves_the_optimizer_to_the_original() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    clipper = GradClipper(model, BOUND).attach(optimizer)
    other = copy.copy(clipper)
    run_backward(model)
    optimizer.step()
    assert (clipper.steps, other.steps) == (1, 0)
    other.detach()
    run_backward(model)
    optimizer.step()
    assert (clipper.steps, other.steps) == (2, 0)


@copied
def test_a_copied_optimizer_alone_is_not_attached(copied: Callable[[Any], Any]) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    clipper = GradClipper(model, BOUND).attach(optimizer)
    other = copied(optimizer)
    for param in other.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    other.step()
    assert clipper.steps == 0
    assert all(param.grad.eq(1).all() for param in other.param_groups[0]["params"])


@copied
def test_copies_while_hooks_of_backward_are_there(copied: Callable[[Any], Any]) -> None:
    model = small_model()
    clipper = GradClipper(model, BOUND)
    clipper.clip_in_backward(previous_norm=True)
    for _ in range(2):
        run_backward(model)
    twin, other = copied((model, clipper))
    assert not any(param._post_accumulate_grad_hooks for param in twin.parameters())
    # It goes on where the original is.
    other.clip_in_backward(previous_norm=True)
    run_backward(twin)
    run_backward(model)
    np.testing.assert_equal(grads_of(twin), grads_of(model))
    assert oracle.norm(grads_of(twin)) == pytest.approx(BOUND, rel=1e-5)


class Owner(nn.Module):
    """A module that has its own clipper."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_model()
        self.optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
        self.clipper = GradClipper(self, BOUND).attach(self.optimizer)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.net(inputs)
        return out


@copied
def test_a_module_that_owns_its_clipper(copied: Callable[[Any], Any]) -> None:
    model = Owner()
    check_clip(model, model.clipper.clip)
    twin = copied(model)
    check_clip(twin, twin.clipper.clip)
    run_backward(twin)
    twin.optimizer.step()
    assert distclip.grad_norm(twin).item() == pytest.approx(BOUND, rel=1e-5)
    assert (model.clipper.steps, twin.clipper.steps) == (1, 3)
    twin.net[0] = nn.Linear(4, 3)
    check_clip(twin, twin.clipper.clip)


@copied
@pytest.mark.parametrize(
    "rule",
    ["zclip", "autoclip=10", "adagc", "stable_spam", "skip_on_spike,sigma=6 | norm=1", "0.* -> norm=1 ; * -> zclip"],
)
def test_rules_reports_and_settings(copied: Callable[[Any], Any], rule: str) -> None:
    model, config = small_model(), ClipConfig(rule=rule, details_every=1)
    clipper = config.clipper(model)
    for factor in (1.0, 3.0, 2.0):
        run_backward(model, factor)
        clipper.clip()
    other_model, other, told, settings = copied((model, clipper, clipper.report, config))
    assert told.to_dict() == clipper.report.to_dict()  # type: ignore[union-attr]
    assert settings == config
    assert str(other.rule) == str(clipper.rule)
    for each, by in ((model, clipper), (other_model, other)):
        run_backward(each, 30.0)
        by.clip()
    assert other.state_dict() == clipper.state_dict()
    np.testing.assert_equal(grads_of(other_model), grads_of(model))


def test_files_that_hold_weights_alone() -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    clipper = GradClipper(model, BOUND, optimizer=optimizer, overlap=True)
    for _ in range(3):
        run_backward(model)
        clipper.clip()
    assert clipper.report is not None
    assert clipper.report.applied == "folded"
    things = {
        "weights": model.state_dict(),
        "parameters": dict(model.named_parameters()),
        "gradients": {name: param.grad for name, param in model.named_parameters()},
        "clipper": clipper.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    file = io.BytesIO()
    torch.save(things, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)
    torch.testing.assert_close(found["weights"], things["weights"])
    assert found["clipper"] == things["clipper"]
    twin = small_model()
    for name, param in twin.named_parameters():
        param.grad = found["gradients"][name]
    assert distclip.grad_norm(twin).item() == pytest.approx(clipper.report.total_norm.item(), rel=1e-6)


@ranks(2)
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_copied_clipper_of_several_ranks(name: str) -> None:
    model = build(LAYOUTS[name])
    clipper = GradClipper(model, BOUND, pipeline_group=None)
    clipper.clip()
    state = pickle.dumps(clipper.rule), copy.deepcopy(clipper.state_dict())
    if name == "ddp":
        other_model, other = copy.deepcopy((model, clipper))
        check_ranks(other_model, LAYOUTS[name], other.clip)
    assert pickle.loads(state[0]).signature == clipper.rule.signature
    assert state[1] == clipper.state_dict()
    check_ranks(model, LAYOUTS[name], clipper.clip)


# ---- scalers ----


def scaled_step(model: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler) -> float:
    """A step under the scaler; returns the norm of the gradients that it was made with."""
    for param in model.parameters():
        param.grad = None
    scaler.scale(10 * model(torch.linspace(-1, 1, 12).view(3, 4)).square().sum()).backward()
    scaler.step(optimizer)
    return distclip.grad_norm(model).item()


@pytest.mark.parametrize("first", [0, 1])
def test_two_attachments_under_one_scaler_go_in_any_order(first: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    models = [small_model(), small_model(5)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-6) for model in models]
    clippers = [
        GradClipper(model, BOUND, scaler=scaler).attach(optimizer)
        for model, optimizer in zip(models, optimizers, strict=True)
    ]

    def norms() -> list[float]:
        found = [scaled_step(*each, scaler) for each in zip(models, optimizers, strict=True)]
        scaler.update()
        return found

    assert norms() == pytest.approx([BOUND] * 2, rel=1e-5)
    clippers[first].detach()
    found = norms()
    assert found[first] > 2 * BOUND
    assert found[1 - first] == pytest.approx(BOUND, rel=1e-5)
    clippers[1 - first].detach()
    assert min(norms()) > 2 * BOUND
    assert "step" not in vars(scaler)


@pytest.mark.parametrize("first", [0, 1])
def test_a_scaler_s_step_that_somebody_wraps_between_two_attachments(first: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    models = [small_model(), small_model(5)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-6) for model in models]
    clippers, came = [], []

    def wrap() -> None:
        inner = scaler.step

        def step(optimizer: Any) -> Any:
            came.append(optimizer)
            return inner(optimizer)

        scaler.step = step  # type: ignore[method-assign]

    for model, optimizer in zip(models, optimizers, strict=True):
        wrap()
        clippers.append(GradClipper(model, BOUND, scaler=scaler).attach(optimizer))
    for each in zip(models, optimizers, strict=True):
        assert scaled_step(*each, scaler) == pytest.approx(BOUND, rel=1e-5)
    assert [clipper.steps for clipper in clippers] == [1, 1]
    scaler.update()
    clippers[first].detach()
    clippers[1 - first].detach()
    came.clear()
    assert scaled_step(models[0], optimizers[0], scaler) > 2 * BOUND
    assert came == [optimizers[0]] * 2, "what others put there stays"


def test_a_scaler_keeps_no_model_and_copies_without_one() -> None:
    others = alive()["Module"]
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for _ in range(3):
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        GradClipper(model, BOUND, scaler=scaler).attach(optimizer)
        assert scaled_step(model, optimizer, scaler) == pytest.approx(BOUND, rel=1e-5)
        scaler.update()
    assert len(pickle.dumps(scaler)) < 2000
    del model, optimizer
    before = alive()
    other = copy.deepcopy(scaler)
    assert alive() == before + Counter({"distclip's _ScalerStep": 1})
    assert (before["GradClipper"], before["Module"], other.get_scale()) == (0, others, 16.0)


# ---- torch.compile ----


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("when", ["before", "after", "in place"])
def test_compiled_models(backend: str, when: str) -> None:
    model = small_model()
    if when == "in place":
        model.compile(backend=backend)
    compiled = model if when == "in place" else cast(nn.Module, torch.compile(model, backend=backend))
    clipper = GradClipper(compiled if when == "before" else model, ClipByNorm(1e9))
    for _ in range(3):
        run_backward(compiled)
        truth = oracle.norm(grads_of(model))
        report = clipper.clip()
        assert report.total_norm.item() == pytest.approx(truth, rel=1e-6)
        assert list(report.per_tensor or ()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert distclip.grad_norm(compiled).item() == pytest.approx(truth, rel=1e-6)


def test_a_clip_in_a_compiled_region_breaks_its_graph_once() -> None:
    model = small_model()
    clipper = GradClipper(model, BOUND)
    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def twice(scale: Tensor, clip: Callable[[], Any]) -> Tensor:
        before = scale * 2
        told = clip()
        norm: Tensor = told if isinstance(told, Tensor) else told.total_norm
        return before * norm

    for clip in (clipper.clip, lambda: distclip.clip_grad_norm_(model, BOUND)):
        torch._dynamo.reset()
        graphs.clear()
        for _ in range(2):
            run_backward(model)
            truth = oracle.norm(grads_of(model))
            assert twice(torch.ones(()), clip).item() == pytest.approx(2 * truth, rel=1e-6)
            assert distclip.grad_norm(model).item() == pytest.approx(BOUND, rel=1e-5)
        assert len(graphs) == 2
    with pytest.raises(torch._dynamo.exc.Unsupported, match="distclip clips outside of compiled graphs"):
        torch.compile(lambda: clipper.clip().total_norm, backend="eager", fullgraph=True)()


def test_a_compiled_step_of_an_attached_optimizer() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    clipper = GradClipper(model, BOUND).attach(optimizer)
    compiled: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    step = torch.compile(lambda: optimizer.step(), backend=backend)
    for count in range(1, 4):
        run_backward(model)
        weights = [param.detach().clone() for param in model.parameters()]
        step()
        assert clipper.steps == count
        assert distclip.grad_norm(model).item() == pytest.approx(BOUND, rel=1e-5)
        for param, weight in zip(model.parameters(), weights, strict=True):
            assert param.grad is not None
            torch.testing.assert_close(param.detach(), weight - 1e-3 * param.grad)
    assert len(compiled) == 1, "the optimizer's own step is compiled, once, and the clip is not"


# ---- parameters that are replaced ----


def assigned(model: nn.Sequential) -> None:
    model.load_state_dict(small_model().state_dict(), assign=True)


def converted(model: nn.Sequential) -> None:
    model.to(torch.bfloat16)


def materialized(model: nn.Sequential) -> None:
    model.to("meta").to_empty(device="cpu")
    for param in model.parameters():
        nn.init.normal_(param)


def normed(model: nn.Sequential) -> None:
    parametrizations.weight_norm(model[0])


def unnormed(model: nn.Sequential) -> None:
    parametrizations.weight_norm(model[0])
    run_backward(model)
    parametrize.remove_parametrizations(model[0], "weight")


def swapped(model: nn.Sequential) -> None:
    for param, other in zip(model.parameters(), small_model().parameters(), strict=True):
        param.grad = None
        torch.utils.swap_tensors(param, other)


def toggled(model: nn.Sequential) -> None:
    weight = model[0].get_parameter("weight")
    weight.requires_grad_(not weight.requires_grad)


def from_buffer(model: nn.Sequential) -> None:
    model[0].bias.grad = None
    value = cast(Tensor, model[0].bias).detach()
    del model[0].bias
    model[0].register_buffer("bias", value)


def to_parameter(model: nn.Sequential) -> None:
    from_buffer(model)
    value = cast(Tensor, model[0].bias)
    del model[0].bias
    model[0].bias = nn.Parameter(value)


def added(model: nn.Sequential) -> None:
    model.add_module("more", nn.Linear(2, 2))


def deleted(model: nn.Sequential) -> None:
    del model[2]


def merged(model: nn.Sequential) -> None:
    """A low-rank adapter, trained, and then added to the weight that it is for."""
    old = model[0]
    down, up = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.down, self.up = old.requires_grad_(False), down, up

        def forward(self, inputs: Tensor) -> Tensor:
            out: Tensor = self.base(inputs) + self.up(self.down(inputs))
            return out

    model[0] = Adapted()
    run_backward(model)
    with torch.no_grad():
        old.get_parameter("weight").add_(up.weight @ down.weight)
    model[0] = old.requires_grad_(True)


CHANGES = (
    assigned,
    converted,
    materialized,
    normed,
    unnormed,
    swapped,
    toggled,
    from_buffer,
    to_parameter,
    added,
    deleted,
    merged,
)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_parameters_are_exchanged(change: Callable[[nn.Sequential], None], overlap: bool) -> None:
    model = small_model()
    clipper = GradClipper(model, 0.1, overlap=overlap)
    distclip.grad_norm(model)
    for _ in range(3):
        check_clip(model, clipper.clip, 0.1)
    change(model)
    for _ in range(3):
        check_clip(model, clipper.clip, 0.1)
        check_clip(model, lambda: distclip.clip_grad_norm_(model, 0.1), 0.1)


@pytest.mark.parametrize("whole", [False, True])
def test_parameters_that_torch_swaps_are_missed_by_clip_in_backward(whole: bool) -> None:
    model = small_model()
    clipper = GradClipper(model, ClipByNorm(0.1))
    clipper.clip_in_backward()
    run_backward(model)
    for param in model.parameters():
        param.grad = None
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        (model[0] if not whole else model[2]).load_state_dict(small_model()[2 if whole else 0].state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    with pytest.raises(RuntimeError, match=r"was not clipped: it was replaced, or became trainable"):
        run_backward(model)


@ranks(2)
@pytest.mark.parametrize("name", ["fsdp1-full_shard-orig", "fsdp2"])
def test_whole_parameters_for_a_while(name: str) -> None:
    layout, model = LAYOUTS[name], build(LAYOUTS[name])
    clipper = GradClipper(model, BOUND)
    check_ranks(model, layout, clipper.clip)
    for _ in range(2):
        if isinstance(model, FSDPModule):
            model.unshard()
            assert distclip.grad_norm(model).item() == pytest.approx(BOUND, rel=1e-5)
            model.reshard()
        else:
            with FullyShardedDataParallel.summon_full_params(model):
                pass
        check_ranks(model, layout, clipper.clip)
        check_ranks(model, layout, lambda: distclip.clip_grad_norm_(model, BOUND))


@ranks(2)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_optimizer_of_zero_redundancy() -> None:
    layout, model = LAYOUTS["ddp"], build(LAYOUTS["ddp"])
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = ZeroRedundancyOptimizer(trained, optimizer_class=torch.optim.SGD, lr=1e-3)
    clipper = GradClipper(model, BOUND).attach(optimizer)
    for _ in range(3):
        check_ranks(model, layout, lambda: (optimizer.step(), clipper.report)[1])
        told: list[Any] = [None, None]
        dist.all_gather_object(told, [param.tolist() for param in trained])
        assert told[0] == told[1]


# ---- process groups that are made anew ----


def leave() -> tuple[Any, int, int]:
    store, rank, size = distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    return store, rank, size


@ranks(2)
@pytest.mark.parametrize("name", ["ddp", "fsdp1-full_shard-orig", "fsdp2"])
def test_the_job_begins_again(name: str) -> None:
    """With the same ranks in the other order; rule and list of parameters are the same."""
    old = build(LAYOUTS[name])
    GradClipper(old, BOUND).clip()
    store, rank, size = leave()
    for number in range(2):
        rank = 1 - rank
        dist.init_process_group("gloo", store=PrefixStore(f"again {number}", store), rank=rank, world_size=size)
        model = build(LAYOUTS[name])
        clipper = GradClipper(model, BOUND)
        for _ in range(2):
            check_ranks(model, LAYOUTS[name], clipper.clip)
            check_ranks(model, LAYOUTS[name], partial(distclip.clip_grad_norm_, model, BOUND))
        if number == 0:
            del model, clipper
            leave()


@ranks(2)
def test_plain_models_outlive_jobs() -> None:
    """A clipper of before, in between and after; declared of two groups one after the other."""
    torch.manual_seed(dist.get_rank())
    model = nn.Linear(4, 3)
    clipper = GradClipper(model, BOUND, check="never")
    store, rank, size = leave()
    check_clip(model, clipper.clip)
    for number in range(2):
        dist.init_process_group("gloo", store=PrefixStore(f"again {number}", store), rank=rank, world_size=size)
        check_clip(model, clipper.clip)
        distclip.declare(model, sharded=dist.group.WORLD if number else dist.new_group([0, 1]))
        run_backward(model, factor=10.0 * (rank + 1))
        squares = torch.tensor(oracle.norm(grads_of(model)) ** 2, dtype=torch.float64)
        dist.all_reduce(squares)
        assert clipper.clip().total_norm.item() == pytest.approx(math.sqrt(squares.item()), rel=1e-6)
        distclip.undeclare(model)
        check_clip(model, clipper.clip)
        if number == 0:
            leave()


@ranks(2)
def test_overlap_of_a_clipper_that_is_older_than_the_job() -> None:
    """Averages by hand are writes that torch does not count, and come after hooks that one process may trust."""
    store, rank, size = leave()
    model = small_model()
    clipper = GradClipper(model, BOUND, overlap=True)
    for _ in range(3):
        check_clip(model, clipper.clip)
    dist.init_process_group("gloo", store=PrefixStore("late", store), rank=rank, world_size=size)
    for _ in range(6):
        run_backward(model, factor=10.0 * (rank + 1))
        for param in model.parameters():
            assert param.grad is not None
            dist.all_reduce(param.grad)
        truth = oracle.norm(grads_of(model))
        assert clipper.clip().total_norm.item() == pytest.approx(truth, rel=1e-6)
