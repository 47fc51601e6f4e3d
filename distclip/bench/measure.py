"""One case from end to end, on this rank."""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from distclip.bench.cases import Case
from distclip.bench.counters import host_syncs, peak_memory, recorded_collectives
from distclip.bench.layouts import spread_of
from distclip.bench.rounds import Times, middle, quartiles, ratios, slowest, timed
from distclip.bench.sides import LIMIT, OURS, STEP, TORCH, sides_of
from distclip.handshake import Wire

# Of the gradients' bytes, and a clip's collectives: what this project allows itself in every case.
MEMORY_SHARE, COLLECTIVES, HOST_SYNCS = 0.01, 1, 0


@dataclass(frozen=True)
class Row:
    """What came out for one case. Times are medians over the rounds, of the slowest rank of each."""

    case: Case
    threads: int
    """Of each rank."""
    rounds: int
    torch_way: str
    """What ``torch_seconds`` is the time of; "none" where torch has no way."""
    torch_seconds: float | None
    distclip_seconds: float
    limit_seconds: float
    """Of a read of as many bytes as the gradients have."""
    step_seconds: float | None
    """Of the optimizer's step alone, which the two ratios do without; None where there is no step in them."""
    ratio: float | None
    """distclip / torch; the median of the rounds' ratios."""
    ratio_low: float | None
    ratio_high: float | None
    """A quarter of the rounds' ratios is below the one, a quarter above the other."""
    limit_ratio: float | None
    """distclip / limit; likewise."""
    whole_ratio: float | None
    """distclip / torch with the step, where there is one; else as ``ratio``."""
    collectives: int
    """That distclip starts in one clip, on the rank that starts most."""
    torch_collectives: int | None
    host_syncs: int | None
    """Waits of the host for the GPU in one clip of distclip's; None on the CPU, where there is none to wait for."""
    torch_host_syncs: int | None
    gradient_bytes: int
    """Of one rank, that with the largest ``memory_bytes``."""
    memory_bytes: int
    """The most that new tensors take at any moment of distclip's clip (and step, where one belongs to it)."""
    torch_memory_bytes: int | None

    @property
    def memory_share(self) -> float:
        """Of the gradients' bytes."""
        return self.memory_bytes / self.gradient_bytes

    @property
    def misses(self) -> list[str]:
        """Which targets are not met."""
        found = []
        target = self.case.target
        if target is not None:
            got = self.ratio if target.of == "torch" else self.limit_ratio
            if got is None or got > target.most:
                found.append("time")
        if self.collectives > COLLECTIVES:
            found.append("collectives")
        if self.host_syncs is not None and self.host_syncs > HOST_SYNCS:
            found.append("host syncs")
        if self.case.judged and self.memory_share >= MEMORY_SHARE:
            found.append("memory")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        told = asdict(self)
        case = told.pop("case")
        target = case.pop("target")
        judged = case.pop("judged")
        return {
            **case,
            **told,
            "memory_share": self.memory_share,
            "target": target,
            "memory_target": MEMORY_SHARE if judged else None,
            "misses": self.misses,
        }


def measure(case: Case, rounds: int) -> Row:
    """Build, time and count one case. Collective on all ranks of the job where there are several."""
    found = _observed(case, rounds)
    # Wrapped models sit in reference cycles, and the next case wants the memory.
    gc.collect()
    return _row(case, _gathered(found, case.ranks))


@dataclass(frozen=True)
class _Observed:
    """What one rank has to say of a case."""

    torch_way: str
    base: str | None
    times: Times
    counts: dict[str, _Counts]
    gradient_bytes: int


def _observed(case: Case, rounds: int) -> _Observed:
    on_gpu = case.device == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    spread = spread_of(case, device)
    sides = sides_of(case, spread)
    wait = torch.cuda.synchronize if on_gpu else _nothing

    def settle() -> None:
        # The same before each way, for the caches' sake too. Without it clipped values would shrink round by round.
        sides.values.restore()
        wait()
        if case.ranks > 1:
            dist.barrier()

    for way in sides.ways.values():  # makes plans, the optimizer's moments, what allocators keep
        settle()
        way()
    times = timed(sides.ways, rounds, before=settle, after=wait)
    counts = {name: _counted(sides.ways[name], settle, device) for name in (TORCH, OURS) if name in sides.ways}
    return _Observed(spread.way, sides.base, times, counts, sides.values.nbytes)


@dataclass(frozen=True)
class _Counts:
    collectives: int
    host_syncs: int | None
    memory: int


def _counted(way: Callable[[], object], settle: Callable[[], object], device: torch.device) -> _Counts:
    settle()
    with recorded_collectives() as started:
        way()
    settle()
    syncs = host_syncs(way) if device.type == "cuda" else None
    settle()
    return _Counts(len(started), syncs, peak_memory(way, device))


def _gathered(mine: _Observed, ranks: int) -> list[_Observed]:
    if ranks == 1:
        return [mine]
    told = map(json.loads, Wire(tuple(range(ranks)), dist.group.WORLD).texts(json.dumps(asdict(mine))))
    return [
        _Observed(**{**each, "counts": {name: _Counts(**counts) for name, counts in each["counts"].items()}})
        for each in told
    ]


def _row(case: Case, everyone: Sequence[_Observed]) -> Row:
    times, base = slowest([each.times for each in everyone]), everyone[0].base
    compared = ratios(times, OURS, TORCH, less=base, over_less=base) if TORCH in times else []
    whole = ratios(times, OURS, TORCH) if TORCH in times else []
    low, high = quartiles(compared)
    ours = [each.counts[OURS] for each in everyone]
    theirs = [each.counts[TORCH] for each in everyone if TORCH in each.counts]
    worst = max(everyone, key=lambda each: each.counts[OURS].memory)
    return Row(
        case=case,
        threads=torch.get_num_threads(),
        rounds=len(times[OURS]),
        torch_way=worst.torch_way,
        torch_seconds=middle(times.get(TORCH, ())),
        distclip_seconds=statistics.median(times[OURS]),
        limit_seconds=statistics.median(times[LIMIT]),
        step_seconds=middle(times.get(STEP, ())),
        ratio=middle(compared),
        ratio_low=low,
        ratio_high=high,
        limit_ratio=middle(ratios(times, OURS, LIMIT, less=base)),
        whole_ratio=middle(whole),
        collectives=max(each.collectives for each in ours),
        torch_collectives=max((each.collectives for each in theirs), default=None),
        host_syncs=_most(ours),
        torch_host_syncs=_most(theirs),
        gradient_bytes=worst.gradient_bytes,
        memory_bytes=worst.counts[OURS].memory,
        torch_memory_bytes=max((each.memory for each in theirs), default=None),
    )


def _most(counts: Sequence[_Counts]) -> int | None:
    return max((each.host_syncs for each in counts if each.host_syncs is not None), default=None)


def _nothing() -> None:
    pass
