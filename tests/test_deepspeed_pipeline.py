"""GradClipper inside ``train_batch()`` of DeepSpeed's PipelineEngine, against one float64 process with all layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip
from distclip import ClipByNorm, GradClipper, SkipAbove
from tests import oracle
from tests.collectives import recorded_collectives
from tests.nets import Block
from tests.ranks import ranks
from tests.test_deepspeed import RULES, allow_fp16_on_cpu, assert_same_bits, start_deepspeed

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = [
    # DeepSpeed calls collectives under the names that torch has renamed, and broadcasts the parameters it ties.
    pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:c10d.*an autograd kernel was not registered:UserWarning"),
]

VOCABULARY = 11


class Case(NamedTuple):
    """One of DeepSpeed's ways to step the stages of a pipeline."""

    stage: int
    dtype: str
    """As in ``test_deepspeed``."""
    optimizer: str
    """The class that DeepSpeed is to choose."""
    offload: bool = False

    def __str__(self) -> str:
        return f"zero{self.stage}-{self.dtype}{'-offload' * self.offload}"


ZERO = "DeepSpeedZeroOptimizer"
CASES = [
    Case(0, "fp32", "SGD"),
    Case(0, "bf16", "BF16_Optimizer"),
    Case(1, "fp32", ZERO),
    Case(1, "fp32", ZERO, offload=True),
    Case(1, "bf16", ZERO),
    Case(1, "bf16+fp32", "BF16_Optimizer"),
    Case(1, "fp16", ZERO),
]
BY_NAME = {str(case): case for case in CASES}


class Embedding(nn.Module):
    """Also the head, by ``predict``: what a TiedLayerSpec puts on the first stage and on the last."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCABULARY, 5, generator=torch.Generator().manual_seed(3)))

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.weight)


def predict(embedding: Embedding, x: Tensor) -> Tensor:
    return nn.functional.linear(x, embedding.weight)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return 10 * nn.functional.cross_entropy(
        logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten()
    )


class SeededBlock(Block):
    """The same wherever it is built."""

    def __init__(self, hidden: int) -> None:
        torch.manual_seed(hidden)
        super().__init__(hidden)


# Another number of elements on each stage, so that ZeRO cuts the tied weight elsewhere on each.
HIDDEN = (7, 3, 4, 6)


def make_engine(case: Case, stages: int = 2, module: Any = None, topology: Any = None, **config: Any) -> Any:
    """An engine with plain SGD at a rate of 1, so that a step subtracts the gradients."""
    deepspeed = start_deepspeed()
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    layers = [
        TiedLayerSpec("embedding", Embedding),
        *(LayerSpec(SeededBlock, hidden) for hidden in HIDDEN[:stages]),
        TiedLayerSpec("embedding", Embedding, forward_fn=predict),
    ]
    made = module or PipelineModule
    model = made(layers, num_stages=stages, topology=topology, loss_fn=loss_of, partition_method="uniform")
    zero: dict[str, Any] = {"stage": case.stage}
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        **config,
    }
    if case.dtype == "fp16":
        allow_fp16_on_cpu()
        settings["fp16"] = {"enabled": True, "initial_scale_power": 6, "hysteresis": 1}
    elif case.dtype != "fp32":
        settings["bf16"] = {"enabled": True}
    if case.dtype == "bf16+fp32":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=settings
    )
    assert type(engine.optimizer).__name__ == case.optimizer
    return engine


def batches(step: int, part: int, micro_batches: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches of a data parallel rank."""
    for micro in range(micro_batches):
        generator = torch.Generator().manual_seed(100 * step + 10 * micro + part)
        tokens = torch.randint(VOCABULARY, (2, 6), generator=generator)
        yield tokens, torch.randint(VOCABULARY, (2, 6), generator=generator)


def train(engine: Any, step: int) -> None:
    engine.train_batch(batches(step, engine.grid.get_data_parallel_id(), engine.micro_batches))


def over_stages(engine: Any, mine: oracle.Whole) -> oracle.Whole:
    """What all stages hold together; a tied tensor, which bears the same name on each, once."""
    group = engine.grid.get_pipe_parallel_group()
    told: list[oracle.Whole] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(told, mine, group=group)
    everything: oracle.Whole = {}
    for held in told:
        for name in held.keys() & everything.keys():
            np.testing.assert_array_equal(held[name], everything[name], err_msg=f"{name} differs between stages")
        everything |= held
    return everything


def whole_grads(engine: Any) -> oracle.Whole:
    """By DeepSpeed's own debugging function, without the loss scale."""
    from deepspeed.utils import safe_get_full_grad

    scale = float(getattr(engine.optimizer, "loss_scale", 1.0)) if engine.zero_optimization() else 1.0
    mine = {
        name: (safe_get_full_grad(param) if hasattr(param, "_hp_mapping") else param.grad).double().numpy() / scale
        for name, param in engine.module.named_parameters()
    }
    return over_stages(engine, mine)


def masters(engine: Any) -> oracle.Whole:
    """The float32 parameters that the optimizer steps."""
    from deepspeed.utils import safe_get_full_fp32_param

    mine = {
        name: (safe_get_full_fp32_param(param) if hasattr(param, "_hp_mapping") else param.detach()).double().numpy()
        for name, param in engine.module.named_parameters()
    }
    return over_stages(engine, {name: values.copy() for name, values in mine.items()})


def alone(params: oracle.Whole, step: int, parts: int = 1, micro_batches: int = 2) -> oracle.Whole:
    """The gradients of one float64 process that holds all layers and reads the whole batch."""
    embedding = Embedding()
    blocks = [SeededBlock(hidden) for hidden in HIDDEN[: len([name for name in params if name.endswith("up.weight")])]]
    named = {
        f"{place}.{name}": param for place, block in enumerate(blocks, 1) for name, param in block.named_parameters()
    }
    named["tied_modules.embedding.weight"] = embedding.weight
    assert named.keys() == params.keys()
    for module in (embedding, *blocks):
        module.double()
    with torch.no_grad():
        for name, param in named.items():
            param.copy_(torch.from_numpy(params[name]))
    data = [pair for part in range(parts) for pair in batches(step, part, micro_batches)]
    tokens, targets = (torch.cat(tensors) for tensors in zip(*data, strict=True))
    x: Tensor = embedding(tokens)
    for block in blocks:
        x = block(x)
    loss_of(predict(embedding, x), targets).backward()
    return {name: param.grad.numpy() for name, param in named.items() if param.grad is not None}


def clipped(rule: str, grads: oracle.Whole) -> oracle.Whole:
    if rule == "global":
        return oracle.clip_by_global_norm(grads, 0.5)
    return oracle.clip_by_norm(grads, 0.1) if rule == "norm" else oracle.clip_by_value(grads, -0.02, 0.01)


def before_each_step(engine: Any) -> list[oracle.Whole]:
    """Will hold the gradients of the last step as they were before the clip."""
    seen: list[oracle.Whole] = []
    take_step = engine._take_model_step

    def record(*args: Any) -> None:
        seen[:] = [whole_grads(engine)]
        take_step(*args)

    engine._take_model_step = record
    return seen


def check_step(engine: Any, clipper: GradClipper, rule: str, step: int, case: Case) -> None:
    before, take_step = masters(engine), engine._take_model_step
    seen = before_each_step(engine)
    train(engine, step)
    engine._take_model_step = take_step
    (grads,) = seen
    if case.dtype == "fp32":
        truth = alone(before, step, engine.grid.data_parallel_size, engine.micro_batches)
        for name, grad in truth.items():
            np.testing.assert_allclose(grads[name], grad, rtol=1e-4, atol=1e-6, err_msg=name)
    after = masters(engine)
    for name, grad in clipped(rule, grads).items():
        # At stage 0 DeepSpeed accumulates bf16 gradients in bf16, so that a clipped one is rounded.
        rtol = 2**-8 if str(case) == "zero0-bf16" else 1e-5
        np.testing.assert_allclose(before[name] - after[name], grad, rtol=rtol, atol=5e-7, err_msg=name)
    report = clipper.report
    assert report is not None
    assert report.total_norm.item() == pytest.approx(oracle.norm(grads), rel=1e-6)
    assert report.clipped
    assert engine.get_global_grad_norm().item() == report.total_norm.item()
    assert_same_bits(report.total_norm)


def step_as_one_process_would(engine: Any, case: Case) -> None:
    for number, (rule, made) in enumerate(RULES.items()):
        clipper = GradClipper(engine, made())
        for step in range(2):
            check_step(engine, clipper, rule, 10 * number + step, case)
        clipper.detach()
    # Not vacuous: a tied weight that counts for each stage makes another norm.
    grads = alone(masters(engine), 0)
    assert oracle.norm({**grads, "twice": grads["tied_modules.embedding.weight"]}) > 1.01 * oracle.norm(grads)


def slow_but(*quick: str) -> list[Any]:
    """All cases, marked as slow but for those named."""
    return [pytest.param(case, id=str(case), marks=[] if str(case) in quick else [pytest.mark.slow]) for case in CASES]


@ranks(2, timeout=120)
@pytest.mark.parametrize("case", slow_but("zero0-bf16", "zero1-bf16"))
def test_two_stages(case: Case) -> None:
    step_as_one_process_would(make_engine(case), case)


@ranks(4, timeout=120)
@pytest.mark.parametrize("case", slow_but("zero0-fp32", "zero1-bf16+fp32"))
def test_two_stages_of_two_replicas(case: Case) -> None:
    engine = make_engine(case)
    assert engine.grid.data_parallel_size == 2
    step_as_one_process_would(engine, case)


@ranks(4, timeout=120)
@pytest.mark.parametrize("case", [BY_NAME["zero0-fp32"], BY_NAME["zero1-fp32"]], ids=str)
def test_a_weight_tied_over_two_of_four_stages(case: Case) -> None:
    engine = make_engine(case, stages=4)
    assert ("tied_modules.embedding.weight" in dict(engine.module.named_parameters())) == (dist.get_rank() in (0, 3))
    clipper = GradClipper(engine, ClipByNorm(0.1))
    check_step(engine, clipper, "norm", 0, case)
    assert clipper.report is not None
    assert set(clipper.report.per_tensor or {}) == {name for name, _ in engine.module.named_parameters()}
    clipper.detach()
    check_step(engine, GradClipper(engine, 0.5), "global", 1, case)


@ranks(2, timeout=120)
def test_collectives_of_one_step() -> None:
    """One all-reduce of ours, over stages and replicas together."""
    engine = make_engine(BY_NAME["zero1-fp32"])
    clipper = GradClipper(engine, 0.5)
    original, counted = clipper._judge, []

    def judge(grad_scale: Tensor | None) -> Any:
        with recorded_collectives() as names:
            verdict = original(grad_scale)
        counted.append(list(names))
        return verdict

    clipper._judge = judge  # type: ignore[method-assign]
    for step in range(2):
        train(engine, step)
    assert counted[1:] == [["allreduce_"]]


@ranks(2, timeout=120)
@pytest.mark.parametrize("case", [BY_NAME["zero1-fp16"], BY_NAME["zero1-bf16"]], ids=str)
@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_inf_on_one_stage_skips_the_step_on_all(case: Case, stage: int) -> None:
    engine = make_engine(case)
    clipper = GradClipper(engine, 0.5, nonfinite="propagate" if case.dtype == "fp16" else "skip")
    train(engine, 0)
    before = masters(engine)
    scale = float(getattr(engine.optimizer, "loss_scale", 1.0))
    hook = poison(engine) if engine.stage_id == stage else None
    train(engine, 1)
    after = masters(engine)
    for name, values in before.items():
        np.testing.assert_array_equal(values, after[name], err_msg=name)
    assert clipper.report is not None
    assert clipper.report.skipped
    assert clipper.report.nonfinite
    assert engine.skipped_steps == 1
    if case.dtype == "fp16":
        assert engine.optimizer.loss_scale == scale / 2
    if hook is not None:
        hook.remove()
    clipper.detach()
    check_step(engine, GradClipper(engine, 0.5), "global", 2, case)


def poison(engine: Any) -> Any:
    """One element of one gradient becomes inf from now on."""
    block = next(module for module in engine.module.modules() if isinstance(module, Block))

    def hook(grad: Tensor) -> Tensor:
        return torch.where(torch.arange(grad.numel()).view_as(grad) == 0, math.inf, grad).to(grad.dtype)

    return block.up.weight.register_hook(hook)


@ranks(2, timeout=120)
@pytest.mark.parametrize(
    "case",
    [
        BY_NAME["zero0-bf16"],
        *(pytest.param(BY_NAME[name], marks=pytest.mark.slow) for name in ("zero0-fp32", "zero1-fp32")),
    ],
    ids=str,
)
def test_a_rule_skips_the_step_on_all_stages(case: Case) -> None:
    engine = make_engine(case)
    clipper = GradClipper(engine, SkipAbove(1e-3))
    before = masters(engine)
    train(engine, 0)
    after = masters(engine)
    for name, values in before.items():
        np.testing.assert_array_equal(values, after[name], err_msg=name)
    assert clipper.report is not None
    assert clipper.report.skipped
    assert not clipper.report.nonfinite


@ranks(2, timeout=120)
def test_copies_of_a_tied_weight_that_differ_are_told() -> None:
    """As where somebody forgets to add up their gradients."""
    engine = make_engine(BY_NAME["zero0-fp32"])
    engine._INSTRUCTION_MAP = {
        kind: (lambda *_: None) if kind.__name__ == "ReduceTiedGrads" else run
        for kind, run in engine._INSTRUCTION_MAP.items()
    }
    GradClipper(engine, 0.5)
    with pytest.warns(distclip.AuditWarning, match="tied_modules.embedding.weight"):
        train(engine, 0)


@ranks(2, timeout=120)
@pytest.mark.parametrize("case", [BY_NAME["zero0-fp32"], BY_NAME["zero1-fp16"]], ids=str)
def test_two_stages_a_rank(case: Case) -> None:
    """DualPipeV: rank 0 has the first stage and the last, so that the tied weight is one tensor."""
    start_deepspeed()
    from deepspeed.pipe import DualPipeVModule

    engine = make_engine(case, module=DualPipeVModule, gradient_accumulation_steps=4)
    assert not engine.module.tied_comms or len(engine.module.tied_comms["embedding"]["ranks"]) == 1
    clipper = GradClipper(engine, 0.5)
    for step in range(2):
        check_step(engine, clipper, "global", step, case)


@ranks(2, timeout=120)
def test_what_is_refused() -> None:
    float16 = make_engine(Case(0, "fp16", "FP16_UnfusedOptimizer"))
    with pytest.raises(NotImplementedError, match=r"float16 at stage 0.*set zero_optimization.stage to 1"):
        GradClipper(float16, 0.5)
    engine = make_engine(BY_NAME["zero0-fp32"])
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    with pytest.raises(
        ValueError, match=r"stages of this PipelineEngine lie on ranks \(0, 1\): leave pipeline_group out"
    ):
        GradClipper(engine, 0.5, pipeline_group=alone)
    clipper = GradClipper(engine, 0.5, pipeline_group=dist.group.WORLD)
    with pytest.raises(RuntimeError, match="do not call clip"):
        clipper.clip()
    clipper.detach()


@ranks(4, timeout=120)
def test_tensor_parallel_stages_are_refused() -> None:
    start_deepspeed()
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=1)
    engine = make_engine(BY_NAME["zero0-fp32"], topology=topology)
    with pytest.raises(NotImplementedError, match="tensor parallel stages"):
        GradClipper(engine, 0.5)
