"""Two ranks on this machine clip one model under every layout, and compare the norm with one process.

``python -m torch.distributed.run --nproc-per-node 2 -m distclip.doctor.selftest FILE`` is what each rank runs;
``self_test()`` starts it and reads what rank 0 wrote.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distclip.doctor.facts import installed
from distclip.handshake import Wire
from distclip.local_ranks import run_ranks

_RANKS = 2
# A rank that waits for one which has failed gives up after so many seconds; the whole test after the other number.
_TIMEOUT, _PATIENCE = 30, 240
# Of float32 gradients, which every layout adds up in another order.
_TOLERANCE = 1e-5
_MAX_NORM = 0.1
_SUMS = "This torch's gloo adds gradients up where FSDP2 averages them (pytorch issue 162338)"


@dataclass(frozen=True)
class Outcome:
    """One layout on this machine."""

    layout: str
    works: bool
    message: str
    """How far the norm is from that of one process; or what went wrong."""
    seconds: float


def self_test(deepspeed: bool | None = None) -> list[Outcome]:
    """Start two ranks on this machine's CPU and clip under every layout. Takes some ten seconds, or a minute.

    Args:
        deepspeed: whether to test ZeRO as well; None: where DeepSpeed is installed.
    """
    wanted = list(LAYOUTS)
    if installed("deepspeed") if deepspeed is None else deepspeed:
        wanted += ZERO
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outcomes.jsonl"
        reason = run_ranks(
            _RANKS,
            "distclip.doctor.selftest",
            [str(out), *wanted],
            patience=_PATIENCE,
            environment={"DS_ACCELERATOR": "cpu"},
        )
        lines = out.read_text().splitlines() if out.exists() else []
    found = [Outcome(**json.loads(line)) for line in lines]
    return found + [Outcome(name, False, f"not reached: {reason}", 0.0) for name in wanted[len(found) :]]


class _Net(nn.Module):
    """Sizes that two ranks divide, and one that they do not; two experts that share a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5)
        self.experts = nn.ModuleList(nn.Linear(5, 3) for _ in range(_RANKS))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down(torch.relu(self.up(x)))
        return torch.stack([expert(hidden) for expert in self.experts]).sum(0)


def _net(dtype: torch.dtype = torch.float32) -> _Net:
    torch.manual_seed(0)
    return _Net().to(dtype)


def _loss(model: nn.Module, dtype: torch.dtype = torch.float32, part: bool = True) -> Tensor:
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6).sin().to(dtype)
    mine = x[dist.get_rank() :: _RANKS] if part else x
    result: Tensor = model(mine).square().sum(1).mean()
    return result


def _backward(model: nn.Module, part: bool = True) -> nn.Module:
    _loss(model, part=part).backward()
    return model


def _ddp() -> tuple[nn.Module, dict[str, Any]]:
    return _backward(nn.parallel.DistributedDataParallel(_net())), {}


def _fsdp1() -> tuple[nn.Module, dict[str, Any]]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return _backward(FullyShardedDataParallel(_net(), device_id=torch.device("cpu"))), {}


def _fsdp2(*shape: int) -> tuple[nn.Module, dict[str, Any]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _net()
    names = ("replicate", "shard") if shape else None
    fully_shard(model, mesh=init_device_mesh("cpu", shape or (_RANKS,), mesh_dim_names=names))
    return _backward(model), {}


def _tp() -> tuple[nn.Module, dict[str, Any]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return _backward(parallelize_module(_net(), init_device_mesh("cpu", (_RANKS,)), plan), part=False), {}


def _pipeline() -> tuple[nn.Module, dict[str, Any]]:
    # Each rank computes all and keeps the layers of its own stage.
    model = _backward(_net(), part=False)
    assert isinstance(model, _Net)
    stage = (nn.ModuleList([model.up, model.down]), model.experts)[dist.get_rank()]
    return stage, {"pipeline_group": dist.group.WORLD}


def _experts() -> tuple[nn.Module, dict[str, Any]]:
    from distclip.declare import declare

    model = _backward(_net(), part=False)
    assert isinstance(model, _Net)
    model.experts = nn.ModuleList([model.experts[dist.get_rank()]])
    assert dist.group.WORLD is not None
    declare(model.experts, sharded=dist.group.WORLD)
    return model, {}


LAYOUTS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "DDP": _ddp,
    "FSDP1": _fsdp1,
    "FSDP2": _fsdp2,
    "HSDP": lambda: _fsdp2(_RANKS, 1),
    "tensor parallel": _tp,
    "pipeline": _pipeline,
    "experts": _experts,
}
ZERO = [f"ZeRO {stage}" for stage in range(4)]


def _norm_under(layout: str) -> float:
    """The norm of one clip under this layout. Collective."""
    from distclip.clipper import GradClipper

    if layout in ZERO:
        return _norm_under_zero(int(layout[-1]))
    model, options = LAYOUTS[layout]()
    norm = float(GradClipper(model, _MAX_NORM, check="never", **options).clip().total_norm)
    clipped = float(GradClipper(model, math.inf, check="never", **options).clip().total_norm)
    if abs(clipped - _MAX_NORM) > _TOLERANCE * _MAX_NORM:
        raise ValueError(f"clipped to {_MAX_NORM}, gradients have a norm of {clipped:.6g}")
    return norm


def _norm_under_zero(stage: int) -> float:
    import deepspeed

    from distclip.clipper import GradClipper

    # Its collectives through shared memory want a compiler, and a minute, at the first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.logger.setLevel("CRITICAL")
    deepspeed.init_distributed("gloo", verbose=False)
    model = _net()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), config=config)
    clipper = GradClipper(engine, _MAX_NORM, check="never")
    engine.backward(_loss(engine))
    engine.step()
    assert clipper.report is not None
    return float(clipper.report.total_norm)


def _outcome(layout: str) -> Outcome:
    before = time.perf_counter()
    alone = _net(torch.float64)
    _loss(alone, torch.float64, part=False).backward()
    expected = float(torch.cat([p.grad.flatten() for p in alone.parameters() if p.grad is not None]).norm())
    try:
        norm = _norm_under(layout)
        error = abs(norm - expected) / expected
        message = f"norm {norm:.6g}, {error:.0e} from one process" if error else f"norm {norm:.6g}, as one process"
        works = error < _TOLERANCE
        if layout == "FSDP2" and math.isclose(norm, _RANKS * expected, rel_tol=_TOLERANCE):
            message += f". {_SUMS}"
    except Exception as failure:  # whatever it is, the user wants to read it
        traceback.print_exc()
        message, works = f"{type(failure).__name__}: {failure}".splitlines()[0], False
    return Outcome(layout, works, message, time.perf_counter() - before)


def _everybody_s(mine: Outcome) -> Outcome:
    """The worst of the ranks' outcomes. Collective."""
    told = Wire(tuple(range(_RANKS)), dist.group.WORLD).texts(json.dumps(asdict(mine)))
    return min((Outcome(**json.loads(text)) for text in told), key=lambda outcome: outcome.works)


def main(out: str, *layouts: str) -> None:
    """What each rank runs."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=_TIMEOUT))
    for layout in layouts:
        outcome = _everybody_s(_outcome(layout))
        if dist.get_rank() == 0:
            with Path(out).open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
