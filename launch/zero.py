"""DeepSpeed's ZeRO: an engine that averages and cuts gradients, clips and steps by itself. Imported when asked for."""

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from options import Options
from ranks import Job
from spread import Spread, make_optimizer

#: A file that stands in a checkpoint once every rank has written its part.
COMPLETE = "complete"


def zero(stage: int, model: nn.Module, job: Job, options: Options) -> Spread:
    """Each rank keeps its part of the optimizer's state (1), of the gradients too (2), of the parameters too (3)."""
    os.environ.setdefault("DS_ACCELERATOR", job.device.type)
    import deepspeed

    # torch 2.13 has renamed the collectives that DeepSpeed 0.19 calls.
    warnings.filterwarnings("ignore", message=".torch.distributed.* is deprecated", category=FutureWarning)
    # Its collectives through shared memory want a compiler, and a minute, at the first use. These models do without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.logger.setLevel("ERROR")
    deepspeed.init_distributed(verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": options.batch // job.world // options.accumulate,
        "gradient_accumulation_steps": options.accumulate,
        "gradient_clipping": 0.0,  # distclip's work
        "bf16": {"enabled": options.precision == "bf16"},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model, options), config=config)
    return Spread(engine, engine=engine)


def check(options: Options, world: int) -> None:
    """Raise ValueError where there is no DeepSpeed."""
    found = importlib.util.find_spec("deepspeed")
    # Without the package the folder launch/deepspeed is found, which has no file of its own.
    if found is None or found.origin is None:
        raise ValueError(f"--parallel {options.parallel} needs DeepSpeed: pip install 'distclip[deepspeed]'")


def is_engine(model: nn.Module) -> bool:
    """Whether DeepSpeed made it."""
    return type(model).__name__ == "DeepSpeedEngine"


def backward(engine: Any, loss: Tensor, *, last: bool) -> None:
    """Of one micro-batch, whose loss is divided by their number already. The step's last one is left to step."""
    engine.backward(loss, scale_wrt_gas=False)
    if not last:
        engine.step()


def full_parameters(engine: Any) -> dict[str, Tensor]:
    """The whole model's float32 parameters. All ranks must call."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(param).cpu() for name, param in engine.module.named_parameters()}


def save(engine: Any, folder: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint of the engine, and ``state`` beside it. All ranks must call."""
    engine.save_checkpoint(str(folder.parent), tag=folder.name, client_state=state)
    dist.barrier()
    (folder / COMPLETE).touch()


def load(engine: Any, folder: Path) -> dict[str, Any]:
    """Read what ``save`` wrote; returns the state. All ranks must call."""
    _, state = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    return dict(state)
