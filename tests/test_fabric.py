"""distclip in Lightning Fabric: every step against one float64 process, checkpoints, logs, mistakes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from distclip import ClipByValue, ClipConfig, Rule
from distclip.integrations.fabric import install
from distclip.rules import parse
from tests import oracle
from tests.ranks import ranks
from tests.test_launch import start

pytest.importorskip("lightning", reason="Lightning is not installed")
from lightning.fabric import Fabric
from lightning.fabric.loggers.csv_logs import CSVLogger
from lightning.fabric.plugins.precision import MixedPrecision
from lightning.fabric.strategies.fsdp import FSDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy

pytestmark = [
    # torch's own, of Lightning's imports.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*is deprecated"),
]
RULES = ("global_norm=0.1", "norm=0.1", "value=-0.01:0.02")


class CpuFsdp(FSDPStrategy):
    """FSDP1, which Lightning refuses on a CPU, and torch does not."""

    def setup_module(self, module: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    assert mesh["data_parallel"].size() == dist.get_world_size()
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


STRATEGIES: dict[str, Any] = {
    "ddp": lambda: "ddp",
    "fsdp1": CpuFsdp,
    "fsdp2": lambda: ModelParallelStrategy(shard, dist.get_world_size(), 1),
}


class Training:
    """Steps on eight rows, all ranks and micro-batches together."""

    def __init__(self, strategy: str = "ddp", accumulate: int = 1, fused: bool = False, **settings: Any) -> None:
        devices = dist.get_world_size()
        self.fabric = Fabric(accelerator="cpu", devices=devices, strategy=STRATEGIES[strategy](), **settings)
        self.fabric.launch()
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
        self.model: Any = self.fabric.setup_module(net)
        params = self.model.parameters()
        optimizer = torch.optim.AdamW(params, lr=0.1, fused=True) if fused else torch.optim.SGD(params, lr=0.1)
        self.optimizer: Any = self.fabric.setup_optimizers(optimizer)
        self.accumulate = accumulate
        self.inputs = torch.randn(8, 8, 6, generator=torch.Generator().manual_seed(0))
        self.number = 0

    def backward(self) -> Tensor:
        """Returns the mean loss over this rank's micro-batches."""
        ranks, total = dist.get_world_size(), torch.zeros(())
        for part in range(self.accumulate):
            batch = self.inputs[self.number][dist.get_rank() + part * ranks :: ranks * self.accumulate]
            with self.fabric.no_backward_sync(self.model, enabled=part < self.accumulate - 1):
                loss = (self.model(batch) - batch.sum(1, keepdim=True)).square().mean() / self.accumulate
                self.fabric.backward(loss)
            total += loss.detach()
        self.number += 1
        return total

    def step(self) -> tuple[float, float]:
        """One step. Returns loss and norm."""
        loss = self.backward()
        norm = self.fabric.clip_gradients(self.model, self.optimizer)
        assert norm is not None
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss), float(norm)

    def grads(self) -> oracle.Whole:
        found = oracle.whole_grads(self.model._forward_module)
        return {name: grad / self.scale for name, grad in found.items()}

    scale = 1.0

    def parameters(self) -> list[Tensor]:
        return [param.detach().clone() for param in self.model.parameters()]


def expected(rule: Rule, before: oracle.Whole) -> oracle.Whole:
    if isinstance(rule, ClipByValue):
        return oracle.clip_by_value(before, -0.01, 0.02)
    clip = oracle.clip_by_norm if str(rule).startswith("norm") else oracle.clip_by_global_norm
    return clip(before, 0.1)


def check(training: Training, rule: str) -> None:
    """Norm and gradients of two steps must be those of one process on the same gradients."""
    install(training.fabric, rule)
    for _ in range(2):
        training.backward()
        before = training.grads()
        norm = training.fabric.clip_gradients(training.model, training.optimizer)
        assert float(norm) == pytest.approx(oracle.norm(before), rel=1e-6)  # type: ignore[arg-type]
        after = oracle.whole_grads(training.model._forward_module)
        oracle.assert_same(after, expected(parse(rule), before))
        training.optimizer.step()
        training.optimizer.zero_grad()


@ranks(1, 2)
def test_every_gradient_is_that_of_one_process() -> None:
    for rule in RULES:
        for accumulate in (1, 2):
            check(Training(accumulate=accumulate), rule)


@ranks(2)
@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_sharded(strategy: str) -> None:
    for rule in RULES:
        check(Training(strategy), rule)


@ranks(1, 2)
def test_training_is_that_of_fabric_itself() -> None:
    ours, theirs = Training(fused=True), Training(fused=True)
    handle = install(ours.fabric, 0.5)
    for _ in range(4):
        loss, norm = ours.step()
        theirs_loss = theirs.backward()
        theirs_norm = theirs.fabric.clip_gradients(theirs.model, theirs.optimizer, max_norm=0.5)
        theirs.optimizer.step()
        theirs.optimizer.zero_grad()
        assert (loss, norm) == pytest.approx((float(theirs_loss), float(theirs_norm)), rel=1e-5)  # type: ignore[arg-type]
        assert norm > 0.5
        assert handle.clippers[0].report is not None
        assert handle.clippers[0].report.applied == "folded"
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@ranks(1, 2)
def test_the_loss_scale_is_taken_off() -> None:
    """A step that overflows is left out, and its scale halved."""
    for fused in (False, True):
        precision = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=1024.0))
        training = Training(fused=fused, plugins=[precision])
        training.scale = 1024.0
        check(training, RULES[0]) if not fused else install(training.fabric, RULES[0])
        assert training.step()[1] < 10
    precision = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=2.0**40))
    training = Training(plugins=[precision])
    handle = install(training.fabric, RULES[0])
    before = training.parameters()
    training.step()
    assert precision.scaler is not None
    assert precision.scaler.get_scale() == 2.0**39
    assert handle.clippers[0].report is not None
    assert handle.clippers[0].report.to_dict()["skipped"]
    assert all(map(torch.equal, before, training.parameters()))


@ranks(1, 2)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_resumed_run_goes_on_to_the_bit(strategy: str, tmp_path: Path) -> None:
    rule = "zclip,warmup_steps=2,alpha=0.5"
    whole = Training(strategy)
    handle = install(whole.fabric, rule)
    steps = [whole.step() for _ in range(3)]
    state = {"model": whole.model, "optimizer": whole.optimizer, "clip": handle}
    whole.fabric.save(tmp_path / "state", state)
    steps += [whole.step() for _ in range(3)]
    resumed = Training(strategy)
    again = install(resumed.fabric, rule)
    resumed.number = 3
    resumed.fabric.load(
        tmp_path / "state", {"model": resumed.model, "optimizer": resumed.optimizer, "clip": again}, weights_only=True
    )
    assert again.state_dict()["clippers"][0]["steps"] == 3
    assert [resumed.step() for _ in range(3)] == steps[3:]
    assert again.state_dict() == handle.state_dict()
    again.load_state_dict(handle.state_dict())
    assert again.clippers[0].steps == 6


@ranks(2)
def test_each_optimizer_has_its_own_norm(tmp_path: Path) -> None:
    """Of a part of a model; and what is logged of each."""
    training = Training(loggers=CSVLogger(tmp_path, name="log", version=0))
    config = ClipConfig(rule="norm=0.1", log_every=2, log_prefix="clip/")
    fabric, model = training.fabric, training.model
    handle = install(fabric, config)
    optimizers = [torch.optim.SGD(model.module[part].parameters(), lr=0.1) for part in (0, 2)]
    for _ in range(4):
        training.backward()
        grads = training.grads()
        for part, optimizer in zip("02", optimizers, strict=True):
            mine = {name: grad for name, grad in grads.items() if name.startswith(part)}
            norm = fabric.clip_gradients(model, optimizer)
            assert float(norm) == pytest.approx(oracle.norm(mine), rel=1e-6)  # type: ignore[arg-type]
            optimizer.step()
        model.zero_grad()
    reports = [clipper.report for clipper in handle.clippers]
    assert [list(report.per_tensor or {}) for report in reports if report] == [
        ["0.weight", "0.bias"],
        ["2.weight", "2.bias"],
    ]
    if dist.get_rank() == 0:
        fabric.logger.save()
        head, *rows = (tmp_path / "log" / "version_0" / "metrics.csv").read_text().splitlines()
        assert {"clip/grad_norm", "clip/clip_coef", "clip/1/grad_norm", "step"} <= set(head.split(","))
        assert [row.split(",")[-1] for row in rows] == ["2", "2", "4", "4"]


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.maker, self.judge = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        judged: Tensor = self.judge(self.maker(x))
        return judged


@ranks(1)
def test_frozen_at_first_and_added_later() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = Gan(), None
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.judge.parameters(), lr=0.0))
    install(fabric, ClipConfig(rule=1.0, check="never"))

    def norms() -> list[float]:
        """After a backward and a clip: what the clip says, and of each part before and after."""
        model.zero_grad()
        fabric.backward(100 * model(torch.ones(1, 2)).sum())
        parts = [part.weight for part in (model.module.maker, model.module.judge) if part.weight.requires_grad]
        before = [float(part.grad.norm()) for part in parts]
        told = float(fabric.clip_gradients(model, optimizer))  # type: ignore[arg-type]  # Lightning says None too
        return [told, *before, *(float(part.grad.norm()) for part in parts)]

    model.module.maker.requires_grad_(False)
    told, judge, after = norms()
    assert (told, after) == pytest.approx((judge, 1.0))
    model.module.maker.requires_grad_(True)
    told, maker, judge, maker_after, judge_after = norms()
    assert (told, maker_after, judge_after) == pytest.approx((judge, maker, 1.0))
    optimizer.add_param_group({"params": list(model.module.maker.parameters())})
    told, maker, judge, maker_after, judge_after = norms()
    assert told == pytest.approx(math.hypot(maker, judge))
    assert math.hypot(maker_after, judge_after) == pytest.approx(1.0)


@ranks(1)
def test_mistakes() -> None:
    training = Training()
    with pytest.raises(TypeError, match="fabric must be a Lightning Fabric, got Linear"):
        install(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="did you mean 'zclip'"):
        install(training.fabric, "zclop")
    handle = install(training.fabric, "zclip")
    with pytest.raises(RuntimeError, match=r"call remove\(\) on the handle first"):
        install(training.fabric)
    training.backward()
    with pytest.warns(UserWarning, match=r"max_norm=2 is off: ZClip.*Leave it out"):
        training.fabric.clip_gradients(training.model, training.optimizer, max_norm=2)
    other = Training()
    install(other.fabric, 1.0).load_state_dict(handle.state_dict())
    with pytest.raises(ValueError, match="state_dict is of rule ZClip"):
        other.step()
    handle.remove()
    training.optimizer.zero_grad()
    training.backward()
    norm = training.fabric.clip_gradients(training.model, training.optimizer, max_norm=1e-3)
    assert float(norm) > 1e-3  # type: ignore[arg-type]
    assert oracle.norm(training.grads()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_the_example(size: int, tmp_path: Path) -> None:
    done = start("--steps", "4", "--out", str(tmp_path), ranks=size, script="fabric_train.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train/clip_coef" in next(tmp_path.rglob("metrics.csv")).read_text()
