"""Loss parallel: logits stay cut along the vocabulary, and so does the gradient of the head."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

import distclip
from tests import oracle
from tests.ranks import ranks


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 12, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.embed(tokens)))
        return logits


def make_tagger() -> Tagger:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tagger()


@ranks(2, 4)
def test_loss_parallel() -> None:
    tokens, targets = (torch.randint(12, (10,), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    alone = make_tagger()
    nn.functional.cross_entropy(alone(tokens), targets).backward()
    truth = oracle.norm(oracle.whole_grads(alone))

    model = make_tagger()
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    with loss_parallel():
        nn.functional.cross_entropy(model(tokens), targets).backward()
    before = oracle.whole_grads(model)
    norm = distclip.clip_grad_norm_(model, truth / 2)
    assert norm.item() == pytest.approx(truth, rel=1e-5)
    assert norm.item() == pytest.approx(oracle.norm(before), rel=1e-6)
    oracle.assert_same(oracle.whole_grads(model), oracle.clip_by_global_norm(before, truth / 2))
