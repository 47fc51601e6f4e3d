"""Random shapes, dtypes, meshes, world sizes and missing gradients, on tensors sharded by hand."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

import distclip
from tests import oracle
from tests.ranks import run_ranks


@dataclass(frozen=True)
class Drawn:
    """One parameter. `missing` are the ranks on which its gradient is None (for a tensor that is sharded)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    placement: str
    scale: float
    missing: tuple[int, ...]

    def grad(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(self.shape, generator=generator, dtype=torch.float64) * self.scale).to(self.dtype)


MESHES: dict[int, list[tuple[int, ...]]] = {1: [(1,)], 2: [(2,), (1, 2), (2, 1)], 3: [(3,)], 4: [(4,), (2, 2)]}


@st.composite
def jobs(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Drawn]]:
    size = draw(st.sampled_from(list(MESHES)))
    mesh: tuple[int, ...] = draw(st.sampled_from(MESHES[size]))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    params = []
    for _ in range(draw(st.integers(1, 5))):
        shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
        placement = draw(st.sampled_from(["shard", "replicate", "plain"]))
        # Replicas that miss a gradient which others have are broken training, not a layout.
        missing = tuple(draw(st.sets(st.integers(0, size - 1)))) if placement == "shard" and len(mesh) == 1 else ()
        params.append(Drawn(shape, draw(dtypes), placement, draw(st.sampled_from([1e-3, 1.0, 100.0])), missing))
    return mesh, params


def clip_drawn(shape: tuple[int, ...], drawn: list[Drawn], p: float, max_norm: float) -> tuple[float, list[object]]:
    """The norm that this rank gets, and its local gradients after the clip."""
    mesh = init_device_mesh("cpu", shape)
    params = []
    for seed, one in enumerate(drawn):
        grad = one.grad(seed)
        if one.placement != "plain":
            last: Placement = Shard(0) if one.placement == "shard" else Replicate()
            grad = distribute_tensor(grad, mesh, [*([Replicate()] * (len(shape) - 1)), last])
        param = nn.Parameter(torch.zeros_like(grad))
        param.grad = None if dist.get_rank() in one.missing else grad
        params.append(param)
    norm = distclip.clip_grad_norm_(params, max_norm, p)
    local = [p.grad if p.grad is None else getattr(p.grad, "_local_tensor", p.grad).double().numpy() for p in params]
    return norm.item(), local


def truth(mesh: tuple[int, ...], drawn: list[Drawn]) -> oracle.Whole:
    """Whole gradients; where a rank misses its shard, zeros stand in its rows."""
    whole = {}
    for seed, one in enumerate(drawn):
        grad = one.grad(seed).double()
        rows = grad.chunk(mesh[-1])
        for rank in one.missing:
            if rank < len(rows):
                rows[rank].zero_()
        whole[str(seed)] = grad.numpy()
    return whole


@settings(max_examples=60, deadline=None)
@given(job=jobs(), p=st.sampled_from([1.0, 2.0, 3.5, math.inf]), fraction=st.sampled_from([0.3, 2.0]))
def test_random_jobs(job: tuple[tuple[int, ...], list[Drawn]], p: float, fraction: float) -> None:
    mesh, drawn = job
    before = truth(mesh, drawn)
    norm = oracle.norm(before, p)
    max_norm = norm * fraction
    results = run_ranks(clip_drawn, math.prod(mesh), mesh, drawn, p, max_norm)
    assert len({got for got, _ in results}) == 1, "the same bits on every rank"
    assert results[0][0] == pytest.approx(norm, rel=1e-6)
    after = oracle.clip_by_global_norm(before, max_norm, p)
    for rank, (_, local) in enumerate(results):
        for place, one in enumerate(drawn):
            if rank in one.missing:
                assert local[place] is None
                continue
            want = torch.from_numpy(after[str(place)])
            if one.placement == "shard":
                rows = want.chunk(mesh[-1])
                mine = rank % mesh[-1]
                want = rows[mine] if mine < len(rows) else want[:0]
            got = local[place]
            assert got is not None
            oracle.assert_same({"g": got}, {"g": want.numpy()}, one.dtype)
