"""All cases, wherever they have to run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist

from distclip.bench.cases import KINDS, Case
from distclip.bench.machine import machine
from distclip.bench.measure import Row, measure
from distclip.bench.ranks import measure_on_ranks


@dataclass(frozen=True)
class Results:
    """What came out, and on which machine."""

    machine: dict[str, Any]
    rows: tuple[Row, ...]
    failures: tuple[str, ...] = ()
    """Of ranks that were started: which case they did not come to the end of, and why."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        kinds = {row.case.kind for row in self.rows}
        return {
            "machine": self.machine,
            "cases": {kind: text for kind, text in KINDS.items() if kind in kinds},
            "rows": [row.to_dict() for row in self.rows],
            "failures": list(self.failures),
        }


def bench(
    cases: Sequence[Case],
    *,
    rounds: int = 11,
    threads: int | None = None,
    progress: Callable[[str], object] = lambda _: None,
) -> Results:
    """Time these cases, one after the other, in the order in which they are given.

    In one process, cases of several ranks are measured on ranks that are started on this machine. In a job that stands
    (``torch.distributed`` is initialised) all ranks call this, with cases of as many ranks.

    Args:
        cases: what to time.
        rounds: how often each way of a case runs.
        threads: of this process while it measures, and of each rank that it starts; None: as this process has them,
            one for each rank.
        progress: told what comes next.

    Raises:
        ValueError: ``rounds`` or ``threads`` is below 1, there are no cases, or a case is not for this job.
    """
    checked_count("rounds", rounds)
    checked_count("threads", threads)
    if not cases:
        raise ValueError("there is no case to measure")
    world = dist.get_world_size() if dist.is_initialized() else 1
    for case in cases:
        if world > 1 and case.ranks != world:
            raise ValueError(f"a case of {case.ranks} ranks ({case.layout}) cannot run in this job of {world} ranks")
    rows: list[Row] = []
    failures: list[str] = []
    with _threads(threads), _quiet():
        told = machine()
        for ranks, group in groupby(cases, key=lambda case: case.ranks):
            if ranks > world:
                together = list(group)
                progress(f"{', '.join(dict.fromkeys(case.layout for case in together))} on {ranks} ranks")
                found, failure = measure_on_ranks(together, rounds, threads)
                rows += found
                failures += [failure] if failure else []
                continue
            for case in group:
                progress(f"{case.layout}, {case.dtype}, {case.kind}")
                rows.append(measure(case, rounds))
    return Results(told, tuple(rows), tuple(failures))


def checked_count(name: str, number: int | None) -> None:
    """Raise ValueError for a number below 1."""
    if number is not None and number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if wanted is None else wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # torch's own, of wrappers on the CPU and of private calls to itself. distclip's are left to be seen.
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=r"torch\.")
        yield
