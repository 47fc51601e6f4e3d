"""DeepSpeed's ZeRO stages: the same bits on every rank, step after step, and the norms of one process."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.bits import assert_same_bits, assert_same_replicas
from tests.ranks import run_ranks
from tests.test_deepspeed import BY_NAME, Net, make_engine
from tests.test_equal_bits import STEPS, clippers, told

# DeepSpeed calls collectives under the names that torch has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning")
STAGES = [0, 1, 2, 3]


def batch(step: int) -> Tensor:
    return torch.randn(8, 7, generator=torch.Generator().manual_seed(step))


def train(stage: int) -> list[float]:
    """The norm of each step."""
    rank, size = dist.get_rank(), dist.get_world_size()
    case = BY_NAME[f"zero{stage}-fp32"]
    engine = make_engine(case, train_micro_batch_size_per_gpu=8 // size, gradient_accumulation_steps=1)
    norms: list[float] = []
    for clipper in clippers(engine):
        for _ in range(STEPS):
            engine.backward(20 * engine(batch(len(norms))[rank::size]).square().mean())
            engine.step()
            assert clipper.report is not None
            assert clipper.report.clipped
            assert_same_bits(told(clipper.report))
            # At stage 3 a rank keeps small parameters alone whole.
            assert assert_same_replicas([engine.module]) > 0
            norms.append(clipper.report.total_norm.item())
        clipper.detach()
    return norms


@functools.cache
def alone() -> list[float]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Net()
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=1.0)
    norms: list[float] = []
    for clipper in clippers(model):
        for _ in range(STEPS):
            optimizer.zero_grad()
            (20 * model(batch(len(norms))).square().mean()).backward()
            norms.append(clipper.clip().total_norm.item())
            optimizer.step()
    return norms


def train_all(stages: list[int]) -> list[list[float]]:
    return [train(stage) for stage in stages]


# Importing DeepSpeed takes longer than all steps.
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_stages(size: int) -> None:
    results = run_ranks(train_all, size, STAGES, timeout=120)
    for rank, norms in enumerate(results):
        assert norms == results[0], f"rank {rank}"
    for stage, norms in zip(STAGES, results[0], strict=True):
        assert norms == pytest.approx(alone(), rel=1e-6), f"stage {stage}"
