"""Training through a real ``Accelerator`` on gloo, and the same on one process in float64.

On a CPU Accelerate starts DDP by itself. For its FSDP and DeepSpeed modes it takes a GPU for granted and falls back to
one process; ``start`` corrects what it believes (the kind of job, its size, the device), and from there on all is
Accelerate's own: how it wraps, runs backward, unscales, steps, saves and loads.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.optim import Optimizer

from distclip.rules.norm import ClipByGlobalNorm
from tests.amp_runs import SCALERS, whole_params
from tests.nets import loss_of, make_batch, make_net
from tests.test_deepspeed import start_deepspeed

MICRO = 2
"""Micro-batches a step."""
RATE = 0.01
KINDS = ("ddp", "fsdp1", "fsdp2")


class Prepared(NamedTuple):
    """What a script has after ``accelerator.prepare``."""

    accelerator: Any
    model: Any
    optimizer: Any


def start(kind: str, **options: Any) -> Any:
    """An Accelerator on the ranks that stand: "ddp", "fsdp1", "fsdp2", "hsdp", "tp", or "zero0" ... "zero3"."""
    if kind.startswith("zero"):
        return _start_deepspeed(int(kind[-1]), **options)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO, **options)
    assert accelerator.distributed_type == DistributedType.MULTI_CPU
    if kind == "tp":
        _believe(accelerator, distributed_type=DistributedType.MULTI_GPU, device=torch.device("cpu"))
        _set_axes(accelerator, ParallelismConfig(tp_size=dist.get_world_size()))
    elif kind != "ddp":
        # FSDP will not have "cpu:0" for the device of parameters on "cpu".
        _believe(accelerator, distributed_type=DistributedType.FSDP, device=torch.device("cpu"))
        if kind == "hsdp":
            _set_axes(accelerator, ParallelismConfig(dp_replicate_size=2, dp_shard_size=dist.get_world_size() // 2))
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=1 if kind == "fsdp1" else 2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            use_orig_params=True if kind == "fsdp1" else None,
            cpu_ram_efficient_loading=False,
        )
    return accelerator


def _start_deepspeed(stage: int, clipping: float | str | None = "auto", **options: Any) -> Any:
    start_deepspeed()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": MICRO,
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        **({} if clipping is None else {"gradient_clipping": clipping}),
    }
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=MICRO, **options)
    assert accelerator.distributed_type == DistributedType.DEEPSPEED
    _believe(accelerator, num_processes=dist.get_world_size(), process_index=dist.get_rank())
    return accelerator


def _believe(accelerator: Any, **facts: Any) -> None:
    # Accelerate copies the one into the other again and again.
    for state in (PartialState(), accelerator.state):
        for name, value in facts.items():
            setattr(state, name, value)


def _set_axes(accelerator: Any, axes: Any) -> None:
    accelerator.state.parallelism_config = axes
    accelerator.state.device_mesh = axes.get_device_mesh("cpu")


def put_scaler(accelerator: Any, kind: str) -> None:
    """fp16 as on a GPU: with ``mixed_precision="fp16"`` on a CPU Accelerate trains in float32 without a word.

    Args:
        accelerator: one that has prepared nothing yet.
        kind: "torch" or "sharded".
    """
    assert accelerator.mixed_precision == "fp16"
    assert accelerator.scaler is None
    accelerator.native_amp = True
    accelerator.scaler = SCALERS[kind]("cpu", init_scale=64.0)


def prepare(accelerator: Any) -> Prepared:
    net = make_net()
    return Prepared(accelerator, *accelerator.prepare(net, make_sgd(net)))


def make_sgd(net: nn.Module) -> Optimizer:
    return torch.optim.SGD([param for param in net.parameters() if param.requires_grad], lr=RATE, momentum=0.9)


def micro_batch(step: int, micro: int) -> tuple[Tensor, Tensor]:
    """Of the whole job."""
    return make_batch(seed=10 * step + micro)


def backward(made: Prepared, step: int, micro: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    tokens, targets = micro_batch(step, micro)
    loss = _growth(step) * loss_of(made.model, (tokens[rank::world], targets[rank::world]))
    made.accelerator.backward(loss)


def _growth(step: int) -> float:
    """Training makes norms smaller, and rules that look for spikes would find none."""
    return 1.0 + step


class Alone(NamedTuple):
    """The same training on one process, in float64 but for the loss."""

    norms: list[float]
    params: dict[str, Tensor]


def alone(steps: int, max_norm: float = math.inf, value: float = math.inf) -> Alone:
    """torch's functions, value first."""
    net = make_net().double()
    optimizer, norms = make_sgd(net), []
    for step in range(steps):
        for micro in range(MICRO):
            (_growth(step) * loss_of(net, micro_batch(step, micro)) / MICRO).backward()
        grads = [param.grad for param in net.parameters() if param.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(grads).item())
        torch.nn.utils.clip_grad_value_(net.parameters(), value)
        torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return Alone(norms, {name: param.detach() for name, param in net.named_parameters()})


def params_of(made: Prepared) -> dict[str, Tensor]:
    """Whole; collective."""
    if hasattr(made.model, "zero_optimization"):
        from deepspeed.utils import safe_get_full_fp32_param

        named = dict(made.model.module.named_parameters())
        if made.model.zero_optimization_partition_weights():
            return {name: safe_get_full_fp32_param(param) for name, param in named.items() if param.requires_grad}
        return {name: param.detach() for name, param in named.items()}
    return whole_params(made.model)


def assert_trained_alike(made: Prepared, truth: Alone) -> None:
    for name, param in params_of(made).items():
        torch.testing.assert_close(param.double(), truth.params[name], rtol=1e-4, atol=1e-5, msg=name)


def holds(rule: Any, max_norm: float) -> bool:
    return isinstance(rule, ClipByGlobalNorm) and rule.max_norm == max_norm
