"""GradClipper inside ``engine.step()``: every optimizer of DeepSpeed, against one process holding the whole model."""

from __future__ import annotations

import copy
import inspect
import math
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip
from distclip import ClipByNorm, ClipByValue, GradClipper
from distclip.integrations.deepspeed import NEEDED, TESTED
from distclip.reduction import Failure
from tests import oracle
from tests.collectives import recorded_collectives
from tests.ranks import ranks

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
# DeepSpeed calls collectives under the names that torch has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning")


class Case(NamedTuple):
    """One of DeepSpeed's ways to step."""

    stage: int
    dtype: str
    """fp32, bf16, fp16, or bf16+fp32 (bf16 parameters, float32 accumulation)."""
    optimizer: str
    """The class that DeepSpeed is to choose."""
    offload: bool = False
    zero: dict[str, Any] = {}  # noqa: RUF012  # never changed

    def __str__(self) -> str:
        return "-".join([f"zero{self.stage}", self.dtype, *(["offload"] if self.offload else []), *self.zero])


ZERO, ZERO_3 = "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"
CASES = [
    Case(0, "fp32", "SGD"),
    Case(0, "bf16", "FP16_UnfusedOptimizer"),
    Case(0, "fp16", "FP16_UnfusedOptimizer"),
    Case(0, "fp16", "FP16_Optimizer", zero={"fused": True}),
    Case(1, "fp32", ZERO),
    Case(1, "bf16", ZERO, offload=True),
    Case(1, "fp16", ZERO),
    Case(1, "bf16+fp32", "BF16_Optimizer"),
    Case(2, "fp32", ZERO),
    Case(2, "fp32", ZERO, offload=True),
    Case(2, "bf16", ZERO),
    Case(2, "bf16+fp32", ZERO),
    Case(2, "fp16", ZERO),
    Case(2, "fp16", ZERO, offload=True),
    Case(2, "fp32", ZERO, zero={"round_robin_gradients": True}),
    Case(3, "fp32", ZERO_3),
    Case(3, "fp32", ZERO_3, offload=True),
    Case(3, "bf16", ZERO_3),
    Case(3, "fp16", ZERO_3),
    Case(3, "fp32", ZERO_3, zero={"sub_group_size": 20}),
]
BY_NAME = {str(case): case for case in CASES}
SCALED = [case for case in CASES if case.dtype == "fp16"]
RULES: dict[str, Callable[[], float | distclip.Rule]] = {
    "global": lambda: 0.5,
    "norm": lambda: ClipByNorm(0.1),
    "value": lambda: ClipByValue((-0.02, 0.01)),
}


class Net(nn.Module):
    """Sizes that no number of ranks divides, a frozen layer, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.frozen = nn.Linear(5, 5)
        self.last = nn.Linear(5, 7, bias=False)
        self.frozen.requires_grad_(False)
        self.last.weight = nn.Parameter(self.first.weight.detach().t().contiguous())
        self.again = nn.Linear(7, 5)
        self.again.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.frozen(self.first(x)) + self.again(x)))
        return out


def allow_fp16_on_cpu() -> None:
    """DeepSpeed refuses it there, though torch can. For the rest of this process, which is the rank's own."""
    from deepspeed.accelerator import get_accelerator

    accelerator = type(get_accelerator())
    accelerator.is_fp16_supported = lambda _: True
    accelerator.supported_dtypes = lambda _: [torch.float32, torch.bfloat16, torch.float16]


def start_deepspeed() -> Any:
    """The module, in the process group that stands."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # Its collectives through shared memory are compiled at the first use, behind a lock that a killed rank would keep.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo", verbose=False)
    return deepspeed


def make_engine(case: Case, model: nn.Module | None = None, **config: Any) -> Any:
    """An engine with plain SGD at a rate of 1, so that a step subtracts the gradients."""
    deepspeed = start_deepspeed()
    torch.manual_seed(1)
    model = Net() if model is None else model
    zero: dict[str, Any] = {"stage": case.stage, **case.zero}
    if zero.pop("fused", False):
        # Its own fused Adam needs a GPU, but any optimizer can pass for it.
        deepspeed.runtime.engine.FusedAdam = torch.optim.SGD
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        **config,
    }
    if case.dtype == "fp16":
        allow_fp16_on_cpu()
        settings["fp16"] = {
            "enabled": True,
            "initial_scale_power": 6,
            "loss_scale_window": 1000,
            **config.get("fp16", {}),
        }
    elif case.dtype != "fp32":
        settings["bf16"] = {"enabled": True}
    if case.dtype == "bf16+fp32":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD([{"params": trained[:2]}, {"params": trained[2:]}], lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    assert type(engine.optimizer).__name__ == case.optimizer
    return engine


def backward(engine: Any, step: int, size: float = 20.0) -> None:
    """All micro-batches of one step, other ones on each rank; the last ``engine.step()`` is left to do."""
    dtype = next(engine.module.parameters()).dtype
    for micro in range(2):
        if micro:
            engine.step()
        generator = torch.Generator().manual_seed(100 * step + 10 * micro + dist.get_rank())
        x = torch.randn(4, 7, generator=generator).to(dtype)
        engine.backward(size * engine(x).float().square().mean())


def trained(engine: Any) -> dict[str, nn.Parameter]:
    return {name: param for name, param in engine.module.named_parameters() if param.requires_grad}


def whole_grads(engine: Any) -> oracle.Whole:
    """By DeepSpeed's own debugging function, which knows nothing of distclip; without the loss scale."""
    from deepspeed.utils import safe_get_full_grad

    plain = not engine.zero_optimization()
    # At stage 0 engine.backward() does not multiply by the loss scale.
    scale = 1.0 if plain else float(getattr(engine.optimizer, "loss_scale", 1.0))
    grads = {name: param.grad if plain else safe_get_full_grad(param) for name, param in trained(engine).items()}
    return {name: grad.double().numpy() / scale for name, grad in grads.items() if grad is not None}


def masters(engine: Any) -> oracle.Whole:
    """The float32 parameters that the optimizer steps."""
    from deepspeed.utils import safe_get_full_fp32_param

    params = trained(engine)
    if engine.zero_optimization():
        return {name: safe_get_full_fp32_param(param).double().numpy() for name, param in params.items()}
    if hasattr(engine.optimizer, "fp32_groups"):
        groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        copies = {id(param): copy for pair in groups for param, copy in zip(*pair, strict=True)}
        return {name: copies[id(param)].detach().double().numpy() for name, param in params.items()}
    if hasattr(engine.optimizer, "fp32_groups_flat"):
        groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups_flat, strict=True)
        splits = [(group, flat.detach().double().split([p.numel() for p in group])) for group, flat in groups]
        copies = {id(p): part.view_as(p) for pair in splits for p, part in zip(*pair, strict=True)}
        return {name: copies[id(param)].numpy() for name, param in params.items()}
    return {name: param.detach().double().numpy() for name, param in params.items()}


def clipped(rule: str, grads: oracle.Whole) -> oracle.Whole:
    """What one process would step with."""
    if rule == "global":
        return oracle.clip_by_global_norm(grads, 0.5)
    return oracle.clip_by_norm(grads, 0.1) if rule == "norm" else oracle.clip_by_value(grads, -0.02, 0.01)


def check_step(engine: Any, clipper: GradClipper, rule: str) -> None:
    """Take the step that is due: it must subtract the clipped gradients, and report the norm before."""
    grads, before = whole_grads(engine), masters(engine)
    engine.step()
    after, expected = masters(engine), clipped(rule, grads)
    for name, grad in expected.items():
        np.testing.assert_allclose(before[name] - after[name], grad, rtol=1e-5, atol=3e-7, err_msg=name)
    assert clipper.report is not None
    assert clipper.report.total_norm.item() == pytest.approx(oracle.norm(grads), rel=1e-6)
    assert engine.get_global_grad_norm().item() == clipper.report.total_norm.item()
    assert clipper.report.clipped
    assert not clipper.report.skipped
    assert_same_bits(clipper.report.total_norm)


def assert_same_bits(value: Tensor) -> None:
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, float(value).hex())
    assert len(set(told)) == 1


# One for each of DeepSpeed's optimizers and of its ways with gradients.
USUAL = [
    "zero0-fp32",
    "zero0-fp16-fused",
    "zero1-bf16-offload",
    "zero1-bf16+fp32",
    "zero2-fp16",
    "zero3-fp32",
    "zero3-fp16",
]


@ranks(2, timeout=120)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=[] if name in USUAL else [pytest.mark.slow]) for name, case in BY_NAME.items()],
)
def test_every_rule_steps_with_the_gradients_that_one_process_would(case: Case) -> None:
    engine = make_engine(case)
    for number, (rule, made) in enumerate(RULES.items()):
        clipper = GradClipper(engine, made())
        for step in range(2):
            backward(engine, 10 * number + step)
            check_step(engine, clipper, rule)
        assert clipper.steps == 2
        clipper.detach()


@ranks(4, timeout=120)
@pytest.mark.parametrize(
    "case", [pytest.param(BY_NAME["zero2-fp32"], marks=pytest.mark.slow), BY_NAME["zero3-fp32"]], ids=str
)
def test_on_four_ranks(case: Case) -> None:
    engine = make_engine(case)
    clipper = GradClipper(engine, ClipByNorm(0.1))
    backward(engine, 0)
    check_step(engine, clipper, "norm")
    assert clipper.report is not None
    assert set(clipper.report.per_tensor or ()) == {name for name, _ in engine.module.named_parameters()}


@ranks(2, timeout=120)
@pytest.mark.parametrize("case", list({case.optimizer: case for case in CASES}.values()), ids=str)
def test_collectives_of_one_step(case: Case) -> None:
    """Of ours: DeepSpeed has others in its step."""
    engine = make_engine(case)
    clipper = GradClipper(engine, 0.5)
    original, counted = clipper._judge, []

    def judge(grad_scale: Tensor | None) -> Any:
        with recorded_collectives() as names:
            verdict = original(grad_scale)
        counted.append(list(names))
        return verdict

    clipper._judge = judge  # type: ignore[method-assign]
    for step in range(2):
        backward(engine, step)
        engine.step()
    whole = case.optimizer not in (ZERO, ZERO_3)
    assert counted[1] == ([] if whole else ["allreduce_"])
    assert len(counted) == 2


class Even(nn.Module):
    """Sizes that every number of ranks divides, and a parameter without elements among them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.empty = nn.Parameter(torch.zeros(0))
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (0, 1))
        for layer in self.inner:
            x = x + torch.tanh(layer(x))
        out: Tensor = self.last(x) + self.empty.sum()
        return out


@ranks(2, 4, timeout=120)
@pytest.mark.parametrize("rule", [pytest.param("global", marks=pytest.mark.slow), "norm"])
@pytest.mark.parametrize("offload", [False, True], ids=["kept", "offloaded"])
def test_partitions_in_another_order_than_parameters(offload: bool, rule: str) -> None:
    """DeepSpeed's own debugging functions take them for another there: one process is what to compare with."""
    case = Case(2, "fp32", ZERO, offload=offload, zero={"round_robin_gradients": True})
    torch.manual_seed(1)
    model = Even()
    alone = copy.deepcopy(model)
    engine = make_engine(case, model, gradient_accumulation_steps=1)
    clipper = GradClipper(engine, RULES[rule]())
    x = torch.randn(dist.get_world_size(), 4, 7, generator=torch.Generator().manual_seed(3))
    engine.backward(engine(x[dist.get_rank()]).square().mean() * 20)
    engine.step()
    (alone(x.flatten(0, 1)).square().mean() * 20).backward()
    grads = {name: param.grad.double().numpy() for name, param in alone.named_parameters() if param.grad is not None}
    assert clipper.report is not None
    assert clipper.report.total_norm.item() == pytest.approx(oracle.norm(grads), rel=1e-5)
    after = dict(engine.module.named_parameters())
    for (name, before), grad in zip(alone.named_parameters(), clipped(rule, grads).values(), strict=True):
        change = (before - after[name]).detach().double().numpy()
        np.testing.assert_allclose(change, grad, rtol=1e-4, atol=1e-6, err_msg=name)


def poison(engine: Any, rank: int) -> Any:
    """One element of one gradient becomes inf on one rank."""

    def hook(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad.view(-1)[0] = math.inf
        return grad

    return next(iter(trained(engine).values())).register_hook(hook) if dist.get_rank() == rank else None


@ranks(2, timeout=120)
@pytest.mark.parametrize("case", SCALED, ids=str)
def test_an_overflow_on_one_rank_skips_the_step_on_all(case: Case) -> None:
    engine = make_engine(case, fp16={"hysteresis": 1, "initial_scale_power": 6})
    clipper = GradClipper(engine, 0.5)
    backward(engine, 0)
    check_step(engine, clipper, "global")
    before, scale = masters(engine), engine.optimizer.loss_scale
    handle = poison(engine, rank=1)
    backward(engine, 1)
    engine.step()
    if handle is not None:
        handle.remove()
    assert clipper.report is not None
    assert not clipper.report.total_norm.isfinite()
    assert clipper.report.nonfinite
    assert clipper.report.skipped
    assert engine.skipped_steps == 1
    assert engine.optimizer.loss_scale == scale / 2
    for name, param in masters(engine).items():
        assert np.array_equal(param, before[name])
    backward(engine, 2)
    check_step(engine, clipper, "global")
    assert engine.skipped_steps == 1
    assert clipper.steps == 3


@ranks(2, timeout=120)
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.dtype != "fp16" and not case.zero and not case.offload], ids=str
)
def test_nonfinite_skip_and_raise(case: Case) -> None:
    engine = make_engine(case)
    for nonfinite in ("skip", "raise"):
        clipper = GradClipper(engine, 0.5, nonfinite=nonfinite)
        before = masters(engine)
        handle = poison(engine, rank=1)
        backward(engine, 1)
        if nonfinite == "raise":
            with pytest.raises(RuntimeError, match="non-finite"):
                engine.step()
        else:
            engine.step()
            assert clipper.report is not None
            assert clipper.report.skipped
            assert clipper.report.nonfinite
            assert engine.skipped_steps == 1
        for name, param in masters(engine).items():
            assert np.array_equal(param, before[name])
        if handle is not None:
            handle.remove()
        clipper.detach()


@ranks(2, timeout=120)
@pytest.mark.parametrize("case", [BY_NAME["zero2-fp16"], BY_NAME["zero3-fp16"]], ids=str)
def test_a_loss_scale_that_grows_leaves_the_gradients_as_they_are(case: Case) -> None:
    engine = make_engine(case, fp16={"loss_scale_window": 1, "initial_scale_power": 6})
    clipper = GradClipper(engine, 0.5)
    for step in range(3):
        scale = engine.optimizer.loss_scale
        backward(engine, step)
        check_step(engine, clipper, "global")
        assert step == 0 or engine.optimizer.loss_scale > scale


@ranks(2, timeout=120)
@pytest.mark.parametrize(
    "case", [BY_NAME["zero0-fp32"], BY_NAME["zero1-bf16+fp32"], BY_NAME["zero2-fp32"], BY_NAME["zero3-fp32"]], ids=str
)
def test_a_configured_clipping_is_off_and_comes_back(case: Case) -> None:
    engine = make_engine(case, gradient_clipping=0.25)
    with pytest.warns(UserWarning, match=r"gradient_clipping=0.25 .* is off: ClipByGlobalNorm\(max_norm=0.5"):
        clipper = GradClipper(engine, 0.5)
    backward(engine, 0)
    check_step(engine, clipper, "global")
    with pytest.raises(RuntimeError, match="has a GradClipper already"):
        GradClipper(engine, 1.0)
    with pytest.raises(RuntimeError, match=r"engine.step\(\) clips by itself"):
        clipper.clip()
    clipper.detach()
    clipper.detach()  # nothing left to do
    assert not vars(engine).keys() & {"_distclip_hooks", "_take_model_step", "gradient_clipping"}
    assert engine.gradient_clipping() == 0.25
    backward(engine, 1)
    before = masters(engine)
    engine.step()
    change = oracle.norm({name: before[name] - param for name, param in masters(engine).items()})
    assert change == pytest.approx(0.25, rel=1e-4)
    assert clipper.steps == 1


@ranks(2, timeout=120)
@pytest.mark.parametrize("case", [BY_NAME["zero2-fp32"], BY_NAME["zero3-fp32"]], ids=str)
def test_functions_and_clippers_that_never_saw_the_engine(case: Case) -> None:
    engine = make_engine(case)
    params = [param for param in engine.module.parameters() if param.requires_grad]
    with pytest.raises(RuntimeError, match=r"DeepSpeed engine that distclip has never seen.*GradClipper\(engine"):
        distclip.clip_grad_norm_(params, 1.0)
    clipper = GradClipper(engine, math.inf)
    backward(engine, 0)
    truth = oracle.norm(whole_grads(engine))
    assert distclip.grad_norm(engine).item() == pytest.approx(truth, rel=1e-6)
    assert distclip.grad_norm(params).item() == pytest.approx(truth, rel=1e-6)
    engine.step()
    assert clipper.report is not None
    assert clipper.report.total_norm.item() == pytest.approx(truth, rel=1e-6)
    engine.backward(engine(torch.ones(4, 7)).sum())
    with pytest.raises(RuntimeError, match="not all accumulated yet"):
        distclip.grad_norm(engine)


@ranks(2, timeout=120)
@pytest.mark.parametrize(
    "name", ["zero0-fp32", pytest.param("zero1-bf16+fp32", marks=pytest.mark.slow), "zero2-fp32", "zero3-fp32"]
)
def test_the_audit_finds_the_gradients(name: str) -> None:
    engine = make_engine(BY_NAME[name])
    backward(engine, 0)
    truth = oracle.norm(whole_grads(engine))
    found = distclip.audit(engine)
    assert found.ok, str(found)
    assert found.total_norm == pytest.approx(truth, rel=1e-6)
    rows = {row.name: row for row in found.rows}
    assert rows.keys() == dict(engine.module.named_parameters()).keys()
    stage = BY_NAME[name].stage
    row = rows["first.weight"]
    assert row.system == (f"ZeRO-{stage}" if stage else "DeepSpeed")
    assert row.shape == (5, 7)
    assert (row.sharded if stage in (2, 3) else (row.replicated,)) == ((0, 1),)


@ranks(2, timeout=120)
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2])
def test_experts_count_once(stage: int) -> None:
    deepspeed = start_deepspeed()
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(7, 7)
            self.experts = MoE(7, nn.Linear(7, 7), num_experts=2, ep_size=2, use_residual=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.experts(self.dense(x))[0]
            return out

    torch.manual_seed(dist.get_rank())
    model = Routed()
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(groups, lr=1.0), config=config)
    clipper = GradClipper(engine, 0.05)
    engine.backward(engine(torch.randn(4, 7)).square().sum())
    before = {name: param.detach().clone() for name, param in trained(engine).items()}
    engine.step()
    change = {name: before[name] - param.detach() for name, param in trained(engine).items()}
    own = sum(d.double().square().sum() for name, d in change.items() if "deepspeed_experts" in name)
    dense = sum(d.double().square().sum() for name, d in change.items() if "deepspeed_experts" not in name)
    assert isinstance(own, Tensor)
    dist.all_reduce(own)
    assert float((own + dense).sqrt()) == pytest.approx(0.05, rel=1e-4)
    assert clipper.report is not None
    assert_same_bits(clipper.report.total_norm)


@ranks(2, timeout=120)
@pytest.mark.parametrize("name", ["zero2-fp32", "zero3-fp32"])
@pytest.mark.parametrize("check", ["first", pytest.param("never", marks=pytest.mark.slow)])
def test_a_rank_that_cannot_find_its_gradients_tells_the_others(name: str, check: Literal["first", "never"]) -> None:
    engine = make_engine(BY_NAME[name])
    clipper = GradClipper(engine, 0.5, check=check)
    backward(engine, 0)
    if dist.get_rank() == 1:
        engine.optimizer.averaged_gradients[0].clear()
    with pytest.raises(LookupError if dist.get_rank() else Failure):
        engine.step()
    assert clipper.steps == 0


@ranks(1, timeout=120)
def test_what_cannot_be_clipped_is_refused() -> None:
    engine = make_engine(BY_NAME["zero2-fp32"])
    engine.optimizer.swap_optimizer = True
    with pytest.raises(NotImplementedError, match="offloaded to NVMe"):
        GradClipper(engine, 1.0)
    del engine.optimizer.swap_optimizer
    del engine.optimizer.single_partition_of_fp32_groups
    with pytest.raises(RuntimeError, match=rf"lacks single_partition_of_fp32_groups. Install deepspeed=={TESTED}"):
        GradClipper(engine, 1.0)


def test_the_internals_are_those_of_the_version_that_is_tested() -> None:
    import deepspeed
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    classes = (
        DeepSpeedZeroOptimizer,
        DeepSpeedZeroOptimizer_Stage3,
        BF16_Optimizer,
        FP16_Optimizer,
        FP16_UnfusedOptimizer,
    )
    assert {made.__name__ for made in classes} == set(NEEDED)

    def arguments(function: Any) -> list[str]:
        return list(inspect.signature(inspect.unwrap(function)).parameters)

    if deepspeed.__version__ == TESTED:
        assert arguments(DeepSpeedEngine._take_model_step) == ["self", "lr_kwargs"]
        assert arguments(DeepSpeedZeroOptimizer.check_overflow) == ["self", "partition_gradients"]
        assert arguments(DeepSpeedZeroOptimizer.scaled_global_norm) == ["self", "norm_type"]
        assert arguments(DeepSpeedZeroOptimizer.unscale_and_clip_grads) == ["self", "grad_groups_flat", "total_norm"]
        assert arguments(FP16_Optimizer.unscale_and_clip_grads)[:3] == ["self", "grad_groups_flat", "total_norm"]
        assert arguments(FP16_UnfusedOptimizer.unscale_and_clip_grads)[:2] == ["self", "total_norm"]
        assert arguments(BF16_Optimizer.get_grads_for_norm) == ["self", "for_clipping"]
