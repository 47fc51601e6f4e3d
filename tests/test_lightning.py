"""distclip in the Lightning Trainer: steps against one float64 process, checkpoints, logs, mistakes."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader

from distclip import ClipByValue, Rule
from distclip.rules import parse
from tests import oracle
from tests.losses import SEEN, LossSeen
from tests.ranks import ranks
from tests.test_launch import start

pytest.importorskip("lightning", reason="Lightning is not installed")
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from distclip.integrations.lightning import ClipCallback

pytestmark = [
    # Lightning's own: what it thinks of the test's settings, and what torch thinks of Lightning.
    pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*is_namedtuple_cls.*:FutureWarning"),
]
METRICS = {"grad_norm", "grad_norm_clipped", "clip_coef", "clip_threshold", "clipped", "skipped", "nonfinite"}
RULES = ("global_norm=0.1", "norm=0.1", "value=-0.01:0.02")


class CpuFsdp(FSDPStrategy):
    """FSDP1, which Lightning refuses on a CPU, and torch does not."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


STRATEGIES: dict[str, Any] = {
    "ddp": lambda: "ddp",
    "fsdp1": CpuFsdp,
    "fsdp2": lambda: ModelParallelStrategy(dist.get_world_size(), 1),
}


class Task(LightningModule):
    """Learns one output; remembers all gradients of each step, before and after clipping."""

    def __init__(self, kind: str = "sgd", lr: float = 0.1, sharded: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
        self.kind, self.lr, self.sharded = kind, lr, sharded
        self.losses: list[float] = []
        self.before: list[oracle.Whole] = []
        self.after: list[oracle.Whole] = []

    def configure_model(self) -> None:
        if self.sharded:
            assert self.device_mesh is not None
            mesh = self.device_mesh["data_parallel"]
            assert mesh.size() == dist.get_world_size()
            fully_shard(self.net, mesh=mesh)

    def loss(self, batch: Tensor) -> Tensor:
        loss: Tensor = (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()
        return loss

    def grads(self) -> oracle.Whole:
        model = self.trainer.strategy.model
        assert model is not None
        return oracle.whole_grads(model)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer: Optimizer
        params = self.parameters()
        optimizer = (
            torch.optim.AdamW(params, lr=self.lr, fused=True) if self.kind == "fused" else SGD(params, lr=self.lr)
        )
        # SGD leaves gradients as they are.
        optimizer.register_step_post_hook(lambda *_: self.after.append(self.grads()))
        return optimizer

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.before.append(self.grads())


class Manual(Task):
    """The same under manual optimization: a step of every second batch."""

    automatic_optimization = False

    def training_step(self, batch: Tensor, number: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if number % 2:
            self.before.append(self.grads())
            optimizer.step()
            optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Here they are clipped already."""


class Log(Callback):
    """What is there after each step, as loggers would write it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step > len(self.steps):
            self.steps.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def batches(rows: int, count: int) -> DataLoader[Tensor]:
    inputs = torch.randn(8 * count, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(inputs, batch_size=rows)  # type: ignore[arg-type]  # a tensor is rows enough


def fit(
    task: LightningModule,
    clip: Any = None,
    *callbacks: Any,
    rows: int = 8,
    epoch: int = 8,
    ckpt_path: Any = None,
    **settings: Any,
) -> tuple[Trainer, list[dict[str, float]]]:
    """Train on eight rows a step, all ranks together. Returns the trainer, and what was logged of each step."""
    log = Log()
    ours = [] if clip is None else [clip if isinstance(clip, ClipCallback) else ClipCallback(clip)]
    usual: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": dist.get_world_size(),
        "max_steps": 4,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(callbacks=[*ours, *callbacks, log], **(usual | settings))
    trainer.fit(task, batches(rows // dist.get_world_size(), epoch), ckpt_path=ckpt_path, weights_only=True)
    return trainer, log.steps


def expected(rule: Rule, before: oracle.Whole) -> oracle.Whole:
    if isinstance(rule, ClipByValue):
        return oracle.clip_by_value(before, -0.01, 0.02)
    clip = oracle.clip_by_norm if str(rule).startswith("norm") else oracle.clip_by_global_norm
    return clip(before, 0.1)


def check(task: Task, log: list[dict[str, float]], rule: str) -> None:
    """Every step's norm, gradients and log must be those of one process on the same gradients."""
    assert len(task.before) == len(task.after) == len(log) == 4
    for before, after, metrics in zip(task.before, task.after, log, strict=True):
        oracle.assert_same(after, expected(parse(rule), before))
        assert metrics["train/grad_norm"] == pytest.approx(oracle.norm(before), rel=1e-6)
        assert metrics["train/clipped"] == 1
        unknown = {"grad_norm_clipped", "clip_threshold"} if rule.startswith("value") else set()
        assert {f"train/{name}" for name in METRICS - unknown} <= metrics.keys()
        if rule.startswith("global"):
            assert metrics["train/clip_coef"] == pytest.approx(0.1 / oracle.norm(before), rel=1e-4)


# Each rank's start costs more than its training: so, several runs in one.
@ranks(1, 2)
def test_every_gradient_is_that_of_one_process() -> None:
    """In both kinds of optimization, with accumulation and without."""
    for rule in RULES:
        task = Task()
        check(task, fit(task, rule)[1], rule)
    task = Task()
    check(task, fit(task, RULES[0], rows=4, accumulate_grad_batches=2)[1], RULES[0])
    task = Manual()
    check(task, fit(task, RULES[0], rows=4)[1], RULES[0])


@ranks(2)
@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_sharded(strategy: str) -> None:
    """The Trainer itself refuses to clip by the norm under FSDP1."""
    for rule in RULES:
        task = Task(sharded=strategy == "fsdp2")
        check(task, fit(task, rule, strategy=STRATEGIES[strategy]())[1], rule)


def history(kind: str, rule: str | None, **settings: Any) -> list[float]:
    """The loss before each step, and a parameter after all."""
    task = Task(kind, lr=0.01)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="gradient_clip_val=")
        fit(task, rule, **settings)
    return [*task.losses, *next(task.parameters()).detach().flatten().tolist()]


def check_same_training() -> None:
    """Of torch, by the Trainer itself, and of distclip, which overrules the Trainer."""
    for kind in ("sgd", "fused"):
        ours = history(kind, "global_norm=0.5", gradient_clip_val=0.01)
        assert ours == pytest.approx(history(kind, None, gradient_clip_val=0.5), rel=1e-5)
        assert ours != pytest.approx(history(kind, None), rel=1e-5)


@ranks(1, 2)
def test_training_is_that_of_the_trainer_itself() -> None:
    check_same_training()


def scaled(scale: float = 1024.0) -> MixedPrecision:
    """precision="16-mixed", which on a CPU Lightning makes bf16-mixed."""
    return MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=scale))


@ranks(1, 2)
def test_the_loss_scale_is_taken_off() -> None:
    """In place and folded; a step that overflows is left out, and its scale halved."""
    for kind in ("sgd", "fused"):
        plain, task = Task(kind), Task(kind)
        fit(plain, RULES[0], precision="32-true")
        _, log = fit(task, RULES[0], plugins=[scaled()])
        norms = [oracle.norm(before) for before in plain.before]
        # In float16.
        assert [step["train/grad_norm"] for step in log] == pytest.approx(norms, rel=2e-2)
        for param, other in zip(task.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(param, other, rtol=2e-2, atol=2e-3)
    task, precision = Task(), scaled(2.0**40)
    before = [param.detach().clone() for param in task.parameters()]
    _, log = fit(task, RULES[0], max_steps=2, plugins=[precision])
    assert [(step["train/nonfinite"], step["train/skipped"]) for step in log] == [(1, 1), (1, 1)]
    assert precision.scaler is not None
    assert precision.scaler.get_scale() == 2.0**38
    assert all(map(torch.equal, before, task.parameters()))


class Overflow(Task):
    """An inf in the second step, in one rank's shard, after Lightning has looked for it."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        if len(self.before) == 2 and dist.get_rank() == 1:
            grad: Any = next(self.parameters()).grad
            grad.to_local().view(-1)[0] = torch.inf


@ranks(2)
def test_all_ranks_hear_of_one_that_overflows() -> None:
    task, precision = Overflow(sharded=True), scaled()
    strategy = STRATEGIES["fsdp2"]()
    _, log = fit(task, RULES[0], strategy=strategy, plugins=[precision])
    assert [step["train/skipped"] for step in log] == [0, 1, 0, 0]
    assert precision.scaler is not None
    assert precision.scaler.get_scale() == 512.0
    assert len(task.after) == 3


@pytest.mark.gpu
@ranks(1)
@pytest.mark.filterwarnings("ignore:FSDP is switching to use .NO_SHARD.")
@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_fp16_on_a_gpu(strategy: str) -> None:
    task = Task()
    settings: dict[str, Any] = {"accelerator": "gpu", "strategy": strategy, "precision": "16-mixed"}
    _, log = fit(task, RULES[0], **settings)
    assert len(log) == 4
    assert all(step["train/grad_norm_clipped"] <= 0.1001 for step in log if not step["train/skipped"])
    assert not all(step["train/skipped"] for step in log)


@ranks(1)
def test_bf16_and_skipped_steps() -> None:
    task = Task("fused")
    before = [param.detach().clone() for param in task.parameters()]
    _, log = fit(task, "skip_above=0", precision="bf16-mixed")
    assert [step["train/skipped"] for step in log] == [1.0] * 4
    assert all(map(torch.equal, before, task.parameters()))


@ranks(1)
def test_rules_see_the_loss() -> None:
    """The mean over micro-batches, without the loss scale."""
    for plugins in ([], [scaled()]):
        SEEN.clear()
        task = Task()
        fit(task, LossSeen(), rows=4, accumulate_grad_batches=2, plugins=plugins)
        assert pytest.approx(np.array(task.losses).reshape(4, 2).mean(1), rel=1e-2) == SEEN


class Pair(LightningModule):
    """Two networks, each with an optimizer; one parameter that none steps."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.loose = nn.Linear(6, 5), nn.Linear(5, 1), nn.Linear(6, 1)
        self.norms: list[list[float]] = [[], []]

    def training_step(self, batch: Tensor, _: int) -> None:
        loss = (self.second(self.first(batch)) + self.loose(batch)).square().mean()
        for part, optimizer in enumerate(self.optimizers()):
            self.zero_grad()
            self.manual_backward(loss, retain_graph=part == 0)
            params = [p.grad.double().flatten() for g in optimizer.param_groups for p in g["params"]]
            self.norms[part].append(float(torch.cat(params).norm()))
            with pytest.warns(UserWarning, match=r"Pair\.clip_gradients is off"):
                self.clip_gradients(optimizer, gradient_clip_val=1e-9)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        # So small that the second is still right for this step's loss.
        return [SGD(part.parameters(), lr=1e-9) for part in (self.first, self.second)]


@ranks(1, 2)
def test_each_optimizer_has_its_own_norm() -> None:
    task, clip = Pair(), ClipCallback("norm=0.1")
    _, log = fit(task, clip, strategy="ddp_find_unused_parameters_true")
    names = [name for clipper in clip.clippers for name in (clipper.report.per_tensor if clipper.report else {}) or {}]
    assert names == ["first.weight", "first.bias", "second.weight", "second.bias"]
    assert clip.clippers[1].steps == len(task.norms[0]) > 1
    # A step of either counts for the Trainer.
    assert log[-1]["train/grad_norm"] == pytest.approx(task.norms[0][-1], rel=1e-5)
    assert log[-1]["train/1/grad_norm"] == pytest.approx(task.norms[1][-1], rel=1e-5)


def resumable(folder: Path, strategy: str, stop: int, resume: bool) -> Any:
    """Losses and norms of this part of a run of six steps, and what its rule remembers at the end."""
    task = Task(lr=0.01, sharded=strategy == "fsdp2")
    clip = ClipCallback("zclip,warmup_steps=2,alpha=0.5")
    file = folder / f"{strategy}-{stop}.ckpt"
    trainer, log = fit(
        task,
        clip,
        max_steps=-1,
        max_epochs=stop // 3,
        strategy=STRATEGIES[strategy](),
        ckpt_path=folder / f"{strategy}-3.ckpt" if resume else None,
        epoch=3,
    )
    trainer.save_checkpoint(file)
    return task.losses, [step["train/grad_norm"] for step in log], clip.state_dict()


@ranks(1, 2)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_resumed_run_goes_on_to_the_bit(strategy: str, tmp_path: Path) -> None:
    first_losses, first_norms, _ = resumable(tmp_path, strategy, 3, False)
    then_losses, then_norms, resumed = resumable(tmp_path, strategy, 6, True)
    losses, norms, state = resumable(tmp_path / "whole", strategy, 6, False)
    assert (first_losses + then_losses, first_norms + then_norms[-3:], resumed) == (losses, norms, state)


@ranks(1)
def test_without_lightning() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "distclip.integrations.lightning")
        patch.setitem(sys.modules, "lightning.pytorch", None)
        with pytest.raises(ImportError, match=r"pip install 'distclip\[lightning\]'"):
            importlib.import_module("distclip.integrations.lightning")


@ranks(1)
def test_mistakes(tmp_path: Path) -> None:
    class Own(Task):
        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("nothing is to be clipped twice")

    with pytest.raises(ValueError, match="did you mean 'zclip'"):
        ClipCallback("zclop")
    with pytest.warns(UserWarning, match=r"gradient_clip_val=0\.5 of the Trainer is off: ZClip"):
        fit(Task(), "zclip", gradient_clip_val=0.5)
    with pytest.warns(UserWarning, match=r"Own\.configure_gradient_clipping is off"):
        fit(Own(), 1.0)
    task = Task()
    trainer, _ = fit(task, "zclip")
    trainer.save_checkpoint(tmp_path / "zclip.ckpt")
    assert not vars(task).keys() & {"clip_gradients", "configure_gradient_clipping"}
    with pytest.raises(ValueError, match="state_dict is of rule ZClip"):
        fit(Task(), 1.0, max_steps=6, ckpt_path=tmp_path / "zclip.ckpt")
    clip = ClipCallback("zclip")
    clip.load_state_dict({"clippers": 2 * trainer.callbacks[0].state_dict()["clippers"]})  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"holds the rules of 2 optimizers, .* gives 1"):
        fit(Task(), clip)


@ranks(1)
def test_a_training_that_raises_leaves_nothing_behind() -> None:
    class Breaks(Task):
        def training_step(self, batch: Tensor, number: int) -> Any:
            if number == 1:
                raise KeyError("broken")
            return super().training_step(batch, number)

    task = Breaks()
    with pytest.raises(KeyError, match="broken"):
        fit(task, 0.1)
    assert not vars(task).keys() & {"clip_gradients", "configure_gradient_clipping"}


@ranks(1)
def test_an_optimizer_that_comes_later() -> None:
    class Exchanged(Task):
        def on_train_batch_start(self, *_: Any) -> None:
            self.trainer.optimizers = [SGD(self.parameters())]

    with pytest.raises(RuntimeError, match=r"does not know this SGD: it was put into trainer\.optimizers after"):
        fit(Exchanged(), 0.1)


@ranks(1)
@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_training_step_that_returns_nothing() -> None:
    class Sometimes(Task):
        def training_step(self, batch: Tensor, number: int) -> Any:
            return None if number % 2 else super().training_step(batch, number)

    for plugins in ([], [scaled()]):
        clip = ClipCallback(0.1)
        fit(Sometimes(), clip, plugins=plugins, max_steps=-1, max_epochs=1)
        assert clip.clippers[0].steps == 4


@ranks(1)
def test_under_the_other_name() -> None:
    """Lightning's two packages are copies of each other."""
    import pytorch_lightning

    class Other(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 1)

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            loss: Tensor = self.net(batch).square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            return SGD(self.parameters())

    clip: Any = ClipCallback(0.1)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pytorch_lightning.Trainer(accelerator="cpu", devices=1, max_steps=3, callbacks=[clip], **quiet)
    trainer.fit(Other(), batches(8, 3))
    assert clip.clippers[0].steps == 3
    assert trainer.logged_metrics["train/clip_coef"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_the_example(size: int, tmp_path: Path) -> None:
    done = start("--steps", "4", "--out", str(tmp_path), ranks=size, script="lightning_train.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train/clip_coef" in next(tmp_path.rglob("metrics.csv")).read_text()
