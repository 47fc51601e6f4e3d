"""Who takes part: the closure over overlapping groups, against a union-find on one process."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import distributed_c10d

from distclip.groups import comm_device
from distclip.layout import RankGroup
from distclip.participants import connect
from tests.ranks import ranks, run_ranks

WORLD = 5
some_ranks = st.sets(st.integers(0, WORLD - 1), min_size=2, max_size=3).map(sorted)


def connected(groups: list[list[int]]) -> tuple[int, ...]:
    handles = [(group, dist.new_group(group)) for group in groups]
    mine = [RankGroup.of(handle) for group, handle in handles if dist.get_rank() in group]
    participants = connect(mine)
    if participants.group is not None:
        total = torch.ones(1)
        dist.all_reduce(total, group=participants.group)
        assert total.item() == len(participants)
        assert participants.ranks[participants.index] == dist.get_rank()
    return participants.ranks


def components(groups: list[list[int]]) -> dict[int, tuple[int, ...]]:
    member: dict[int, set[int]] = {rank: {rank} for rank in range(WORLD)}
    for group in groups:
        union = set().union(*(member[rank] for rank in group))
        for rank in union:
            member[rank] = union
    return {rank: tuple(sorted(ranks)) for rank, ranks in member.items()}


@settings(max_examples=10, deadline=None)
@given(groups=st.lists(some_ranks, max_size=5))
def test_closure(groups: list[list[int]]) -> None:
    expected = components(groups)
    for rank, got in enumerate(run_ranks(connected, WORLD, groups)):
        alone = not any(rank in group for group in groups)
        assert got == ((0,) if alone else expected[rank])


@ranks(2)
def test_a_new_process_group_is_noticed() -> None:
    group = dist.group.WORLD
    assert group is not None
    participants = connect([RankGroup.of(group)])
    seen = [participants.is_current]
    store = PrefixStore("again", distributed_c10d._get_default_store())
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    seen.append(participants.is_current)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    seen.append(participants.is_current)
    assert seen == [True, False, False]


@ranks(5)
def test_groups_are_made_where_members_are_in_different_numbers_of_groups() -> None:
    """torch's own `use_local_synchronization` hangs here: pytorch issue 173608."""
    connected([[0, 2, 4], [1, 2, 4]])


@ranks(1)
def test_comm_device() -> None:
    group = dist.group.WORLD
    assert group is not None
    assert comm_device(group, accelerated=False) == torch.device("cpu")


@pytest.mark.parametrize(
    ("served", "accelerated", "expected"),
    [
        (["cuda"], False, "cuda"),  # offloaded gradients, a group of NCCL alone: by way of the GPU
        (["cpu"], True, "cpu"),
        (["cpu", "cuda"], True, "cuda"),
        (["cpu", "cuda"], False, "cpu"),
    ],
)
def test_comm_device_by_backend(
    served: list[str], accelerated: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group: Any = SimpleNamespace(_device_types=[torch.device(kind) for kind in served])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    assert comm_device(group, accelerated=accelerated).type == expected


def test_one_process_needs_no_group() -> None:
    alone = connect([])
    assert len(alone) == 1
    assert alone.group is None
    assert alone.is_current


@pytest.mark.parametrize("size", [2, 3])
def test_groups_of_equal_ranks_are_equal(size: int) -> None:
    assert all(run_ranks(two_handles, size))


def two_handles() -> bool:
    everybody = list(range(dist.get_world_size()))
    return RankGroup.of(dist.new_group(everybody)) == RankGroup.of(dist.new_group(everybody))
