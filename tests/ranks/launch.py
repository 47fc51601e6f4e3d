"""The parent's half: start the ranks of one case, watch them all at once, and let none outlive it."""

import functools
import inspect
import os
import pickle
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import report
from tests.ranks.child import GRACE, Task
from tests.ranks.process import Rank, ask_for_stacks, kill

TIMEOUT = 60.0
"""Seconds that one case may take, from start to the end of its last rank."""


class RanksFailed(AssertionError):
    """Some rank raised, died or did not end, or only some skipped; the message is the whole report."""


def ranks(
    *world_sizes: int, timeout: float = TIMEOUT, backend: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a module-level function a test that every rank runs, one case for each of `world_sizes`.

    Args:
        world_sizes: how many ranks; a body that has a parameter `world_size` is told.
        timeout: seconds for the whole case.
        backend: of the process group; by default gloo, and on CUDA NCCL if each rank has a GPU. "nccl" marks it `gpu`.
    """
    if not world_sizes or min(world_sizes) < 1:
        raise ValueError(f"ranks() expects one or more world sizes of at least 1, got {world_sizes}")

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(body)

        @functools.wraps(body)
        def case(world_size: int, **arguments: Any) -> None:
            if "world_size" in signature.parameters:
                arguments["world_size"] = world_size
            try:
                _run(body, world_size, (), arguments, timeout, backend)
            except RanksFailed as failure:
                raise pytest.fail.Exception(str(failure), pytrace=False) from None

        case.rank_body = body  # type: ignore[attr-defined]  # what a rank looks for under the case's name
        own = inspect.Parameter("world_size", inspect.Parameter.KEYWORD_ONLY)
        others = [p for p in signature.parameters.values() if p.name != own.name]
        case.__signature__ = signature.replace(parameters=[*others, own])  # type: ignore[attr-defined]  # for pytest
        test: Callable[..., None] = pytest.mark.parametrize("world_size", world_sizes, ids=_case_id)(case)
        return pytest.mark.gpu(test) if backend == "nccl" else test

    return decorate


def run_ranks(
    body: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = TIMEOUT,
    backend: str | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Call the module-level function `body(*args, **kwargs)` on every rank: for tests that need many calls, or results.

    Returns:
        What each rank returned, in rank order.

    Raises:
        RanksFailed: the body failed on a rank, whatever the way.
        pytest.skip.Exception: all ranks skipped.
    """
    __tracebackhide__ = True
    return _run(body, world_size, args, kwargs, timeout, backend)


def _case_id(world_size: int) -> str:
    return f"{world_size} rank{'s' if world_size > 1 else ''}"


def _run(
    body: Callable[..., Any],
    world_size: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    timeout: float,
    backend: str | None,
) -> list[Any]:
    __tracebackhide__ = True
    device = "cuda" if backend == "nccl" else torch.device(kwargs.get("device", "cpu")).type
    one_gpu_each = device == "cuda" and world_size <= torch.cuda.device_count()
    with tempfile.TemporaryDirectory(prefix="distclip-ranks-") as folder:
        backend = backend or ("nccl" if one_gpu_each else "gloo")
        task = task_of(body, args, kwargs, world_size, timeout, folder, device, backend)
        started: list[Rank] = []
        try:
            started.extend(Rank.start(task, number) for number in range(world_size))
            _watch(started, timeout)
            ask_for_stacks(started)
            failure = report.failure(started, timeout)
        finally:
            kill(started)
    if failure is not None:
        raise RanksFailed(failure)
    outcomes = [rank.outcome for rank in started if rank.outcome is not None]
    if outcomes[0].kind == "skipped":
        pytest.skip(outcomes[0].message)
    return [outcome.value for outcome in outcomes]


def task_of(
    body: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    world_size: int,
    timeout: float,
    folder: str,
    device: str = "cpu",
    backend: str = "gloo",
) -> Task:
    """What ranks are told that run `body(*args, **kwargs)` as this process would now."""
    __tracebackhide__ = True
    return Task(
        module=body.__module__,
        name=_importable_name(body),
        arguments=_pickled(body, args, kwargs),
        world_size=world_size,
        device=device,
        backend=backend,
        timeout=timeout,
        folder=Path(folder),
        environ=dict(os.environ),
        warning_filters=list(warnings.filters),
    )


def _importable_name(body: Callable[..., Any]) -> str:
    __tracebackhide__ = True
    found = getattr(sys.modules[body.__module__], body.__qualname__, None)
    if body not in (found, getattr(found, "rank_body", None)):
        raise TypeError(f"a rank's body must be a function of a module, found there by its name; got {body!r}")
    return body.__qualname__


def _pickled(body: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    __tracebackhide__ = True
    try:
        return pickle.dumps((args, kwargs))
    except Exception as error:
        raise TypeError(f"arguments of {body.__qualname__} must pickle to reach the ranks: {error}") from None


def _watch(ranks: Sequence[Rank], timeout: float) -> None:
    """Hear all ranks out until their processes have ended, or until a moment after the first failure."""
    deadline = time.monotonic() + timeout
    failed = False
    while (news := [one for rank in ranks for one in rank.news()]) and (left := deadline - time.monotonic()) > 0:
        wait(news, left)
        for rank in ranks:
            rank.look()
        if not failed and any(rank.raised or rank.died for rank in ranks):
            failed, deadline = True, min(deadline, time.monotonic() + GRACE)
        if all(rank.outcome for rank in ranks):
            for rank in ranks:
                rank.pipe.close()  # the word that all are done
