"""What each rank of launch/scale.py runs: clips of ever more tensors or bytes, distclip next to torch, in turns."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import distclip
from distclip.bench.rounds import orders

#: Rounds of one case: at least, at most, and no more once it has taken so many seconds.
LEAST, MOST, SECONDS = 5, 50, 3.0
#: torch's first clip of so many DTensors takes half a minute (torch 2.13), and the time grows with their square.
MOST_FOR_TORCH = 3_000
#: Far above every norm: nothing is clipped.
HIGH = 1e30


@dataclass(frozen=True)
class Case:
    """One size. Everything is of one rank."""

    ranks: int
    tensors: int
    elements: int
    """Of each tensor; float32."""

    @property
    def nbytes(self) -> int:
        return 4 * self.tensors * self.elements


@dataclass(frozen=True)
class Timing:
    """How long one clip takes in one case: the median of all rounds, of the slowest rank in each."""

    case: Case
    way: str
    seconds: float


def main(out: str, text: str) -> None:
    """Measure the cases that ``text`` lists as JSON; rank 0 adds a line for each timing to the file ``out``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for fields in json.loads(text):
        timings = measured(Case(**fields))
        if dist.get_rank() == 0:
            with Path(out).open("a") as file:
                file.writelines(json.dumps(asdict(timing)) + "\n" for timing in timings)
    dist.barrier()
    dist.destroy_process_group()


def measured(case: Case) -> list[Timing]:
    """A timing of each way to clip; of torch's only where it ends in time. Collective."""
    params = sharded(case)
    # Of norm 1 all together.
    value = (case.ranks * case.tensors * case.elements) ** -0.5
    ways: dict[str, Callable[[], object]] = {
        "distclip": lambda: distclip.clip_grad_norm_(params, HIGH),
        "distclip, clipping": lambda: distclip.clip_grad_norm_(params, 0.5),
    }
    if case.tensors <= MOST_FOR_TORCH:
        ways["torch"] = lambda: nn.utils.clip_grad_norm_(params, HIGH)
    for clip in ways.values():
        restore(params, value)
        clip()
    taken: dict[str, list[float]] = {way: [] for way in ways}
    spent = 0.0
    for order in orders(list(ways), MOST):
        if len(taken["distclip"]) >= LEAST and spent >= SECONDS:
            break
        for way in order:
            restore(params, value)
            taken[way].append(slowest(ways[way]))
        spent = sum(map(sum, taken.values()))
    return [Timing(case, way, median(seconds)) for way, seconds in taken.items()]


def sharded(case: Case) -> list[nn.Parameter]:
    """Parameters of DTensors, cut along their first dimension, with gradients."""
    mesh = init_device_mesh("cpu", (case.ranks,))
    params = []
    for _ in range(case.tensors):
        # Parameter and gradient share their memory, which no clip minds.
        local = torch.empty(case.elements)
        param = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False))
        param.grad = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
        params.append(param)
    return params


def restore(params: Sequence[Tensor], value: float) -> None:
    """Fill the gradients, so that every clip meets the same."""
    for param in params:
        assert isinstance(param.grad, DTensor)
        param.grad.to_local().fill_(value)


def slowest(clip: Callable[[], object]) -> float:
    """Seconds that the slowest rank takes; the same number on all, so that all stop measuring together."""
    dist.barrier()
    start = time.perf_counter()
    clip()
    taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return taken.item()


def read(path: Path) -> list[Timing]:
    """What ``main`` wrote."""
    lines = map(json.loads, path.read_text().splitlines())
    return [Timing(Case(**line["case"]), line["way"], line["seconds"]) for line in lines]


def as_text(cases: Sequence[Case]) -> str:
    """What ``main`` takes."""
    return json.dumps([asdict(case) for case in cases])


if __name__ == "__main__":
    main(*sys.argv[1:])
