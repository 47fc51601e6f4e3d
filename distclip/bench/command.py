"""What ``distclip bench`` does with its options."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distclip.bench.cases import MI, RANKS, Case, default_cases, product_of
from distclip.bench.machine import busy, machine, told
from distclip.bench.picture import checked_picture, draw
from distclip.bench.ranks import has_gpu_each, joined
from distclip.bench.run import Results, bench, checked_count
from distclip.bench.table import HEAD, NUMBERS, WIDTH, cells, legend
from distclip.bench.watching import watching

_ROUNDS, _WATCHED_ROUNDS, _WATCHED_STEPS = 11, 20, 30
_QUICK_ROUNDS, _QUICK_STEPS, _QUICK_TENSORS, _QUICK_NUMEL = 3, 3, 24, 1024


@dataclass(frozen=True)
class Options:
    """The command line; None for what is not on it."""

    asked: Mapping[str, Sequence[Any] | None]
    """``layout``, ``kind``, ``tensors``, ``numel``, ``dtype``: each as often as it is given."""
    ranks: int | None = None
    threads: int | None = None
    rounds: int | None = None
    device: str | None = None
    quick: bool = False
    monitor: bool = False
    picture: Path | None = None


@dataclass(frozen=True)
class Told:
    """What the command prints."""

    content: dict[str, Any]
    """As JSON."""
    head: str
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    works: bool = True
    columns: Sequence[str] = HEAD
    numbers: Sequence[int] = NUMBERS
    width: int = WIDTH
    """Of a table that no terminal limits."""


def run(options: Options) -> Told | None:
    """Measure what the options ask for. Collective in a job that torchrun has started; None but on rank 0.

    Raises:
        ValueError: an option does not fit; names it, its value, and what fits. Before anything is measured.
        ImportError: ``--plot`` without matplotlib.
    """
    checked_count("--rounds", options.rounds)
    checked_count("--threads", options.threads)
    checked_count("--ranks", options.ranks)
    if options.device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {options.device!r}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU that torch can use here")
    if options.picture is not None:
        checked_picture(options.picture)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and options.ranks not in (None, world):
        raise ValueError(f"--ranks {options.ranks}: the job that this runs in has {world} ranks; leave --ranks out")
    if options.monitor:
        return _watching(options, world)
    cases = cases_of(options, world)
    with joined():
        results = bench(
            cases,
            rounds=options.rounds or (_QUICK_ROUNDS if options.quick else _ROUNDS),
            threads=options.threads,
            progress=_say,
        )
        if dist.is_initialized() and dist.get_rank() > 0:
            return None
    return _told(results, options)


def cases_of(options: Options, world: int = 1) -> list[Case]:
    """The cases that the options name; of a job of ``world`` ranks, those that it can run.

    Raises:
        ValueError: there are none, or one does not fit.
    """
    ranks = world if world > 1 else options.ranks
    if any(options.asked.values()):
        return _product(options, ranks)
    devices = [options.device] if options.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = default_cases(quick=options.quick, ranks=ranks, devices=devices)
    if world > 1:
        found = [case for case in found if case.ranks == world]
    return [case for case in found if case.ranks == 1 or case.device == "cpu" or _fits_gpus(case.ranks)]


def _product(options: Options, ranks: int | None) -> list[Case]:
    layouts = options.asked["layout"] or (["single"] if ranks in (None, 1) else ["fsdp2"])
    most = max(RANKS.get(layout, 1) for layout in layouts) if ranks is None else ranks
    on_gpu = torch.cuda.is_available() and _fits_gpus(most)
    if options.device == "cuda" and not on_gpu:
        raise ValueError(f"--device cuda: {most} ranks need a GPU each, there are {torch.cuda.device_count()}")
    found = product_of(
        layouts,
        options.asked["kind"] or ["unclipped"],
        options.asked["tensors"] or [_QUICK_TENSORS if options.quick else 120],
        options.asked["numel"] or [_QUICK_NUMEL if options.quick else MI],
        options.asked["dtype"] or ["float32"],
        ranks=ranks,
        device=options.device or ("cuda" if on_gpu else "cpu"),
    )
    return [replace(case, judged=not options.quick) for case in found]


def _fits_gpus(ranks: int) -> bool:
    return has_gpu_each(int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))


def _told(results: Results, options: Options) -> Told:
    notes = ["", *textwrap.wrap(busy(results.machine), WIDTH), *legend(results.rows)]
    notes += [*(f"failed: {failure}" for failure in results.failures)]
    content = results.to_dict()
    if options.picture is not None:
        content["plot"] = str(draw(results, options.picture))
        notes.append(content["plot"])
    return Told(content, told(results.machine), [cells(row) for row in results.rows], notes, not results.failures)


def _watching(options: Options, world: int) -> Told:
    given = [
        name for name, value in {**options.asked, "ranks": options.ranks, "plot": options.picture}.items() if value
    ]
    if given:
        names = ", ".join("--case" if name == "kind" else f"--{name}" for name in given)
        raise ValueError(f"--monitor trains a model of its own in one process: leave out {names}")
    if world > 1:
        raise ValueError(f"--monitor is for one process, this is a job of {world} ranks")
    found = watching(
        rounds=options.rounds or (_QUICK_ROUNDS if options.quick else _WATCHED_ROUNDS),
        steps=_QUICK_STEPS if options.quick else _WATCHED_STEPS,
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        threads=options.threads or 1,
    )
    here = machine()
    content = {"machine": here, "monitor": [asdict(each) for each in found]}
    return Told(content, told(here), notes=[str(each) for each in found])


def _say(text: str) -> None:
    """What comes next, to whoever waits at a terminal."""
    if sys.stderr.isatty():
        print(f"... {text}", file=sys.stderr)
