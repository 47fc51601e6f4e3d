"""The life of one rank, in the rank's own process."""

import faulthandler
import importlib
import os
import pickle
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

from tests.ranks import older_torch

GRACE = 1.0
"""Seconds that ranks give each other: to finish after the first one has returned, to fail after the first one has."""


@dataclass(frozen=True)
class Task:
    """All that a rank is told. The environment is part of it: a forked rank has the server's, not its test's."""

    module: str
    name: str
    arguments: bytes  # pickled apart, so that an argument which cannot be loaded is an error of the rank like any other
    world_size: int
    device: str
    backend: str
    timeout: float
    folder: Path
    environ: dict[str, str]
    warning_filters: list[Any]

    def log(self, rank: int) -> Path:
        """The file with everything that `rank` prints."""
        return self.folder / f"rank{rank}.log"

    def stacks(self, rank: int) -> Path:
        """The file into which `rank` writes its threads' stacks on SIGUSR1."""
        return self.folder / f"rank{rank}.stacks"


@dataclass(frozen=True)
class Outcome:
    """How a body ended on one rank; `when` is on the clock that all processes of a machine share."""

    kind: Literal["returned", "skipped", "raised"]
    value: Any = None
    message: str = ""
    traceback: str = ""
    when: float = field(default_factory=time.monotonic)


def main(task: Task, rank: int, pipe: Connection) -> None:
    """Run the task's body as `rank` and send its `Outcome`."""
    try:
        _redirect_output(task, rank)
        os.environ.clear()
        os.environ.update(task.environ, **_rank_variables(task, rank))
        _join(task, rank)
        report = pickle.dumps(Outcome("returned", _call_body(task)))
    except pytest.skip.Exception as skip:
        report = pickle.dumps(Outcome("skipped", message=skip.msg or ""))
    except BaseException as error:
        pipe.send_bytes(pickle.dumps(_raised(error)))
        os._exit(1)  # no teardown: peers may sit in a collective, and it would wait for them
    pipe.send_bytes(report)
    # Peers may still need this rank's half of the last collective, so wait for the parent's word that all are done.
    # Not for ever: a peer that waits in a collective which this rank never joined fails as soon as this rank hangs up.
    pipe.poll(GRACE)
    if dist.is_initialized():
        dist.destroy_process_group()


def _redirect_output(task: Task, rank: int) -> None:
    log = os.open(task.log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)  # by line: a rank that is killed flushes nothing
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable(sys.stderr)
    faulthandler.register(signal.SIGUSR1, task.stacks(rank).open("w"), all_threads=True)


def _rank_variables(task: Task, rank: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(task.world_size),
        "LOCAL_WORLD_SIZE": str(task.world_size),
        "MASTER_ADDR": "localhost",  # nobody listens there; some frameworks want to see that it is set
        "MASTER_PORT": "29500",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _join(task: Task, rank: int) -> None:
    torch.set_num_threads(1)
    if task.backend == "gloo":
        older_torch.average_over_gloo()
    random.seed(0)
    torch.manual_seed(0)
    if task.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        task.backend,
        init_method=f"file://{task.folder}/store",
        rank=rank,
        world_size=task.world_size,
        timeout=timedelta(seconds=0.9 * task.timeout),  # a collective's own error says more than the parent's limit
    )


def _call_body(task: Task) -> Any:
    found = getattr(importlib.import_module(task.module), task.name)
    body: Callable[..., Any] = getattr(found, "rank_body", found)
    args, kwargs = pickle.loads(task.arguments)
    with warnings.catch_warnings():  # the test's own policy: pyproject's, its marks' and whatever it set itself
        warnings.resetwarnings()
        list.extend(warnings.filters, task.warning_filters)  # type: ignore[arg-type]  # typeshed: a Sequence
        return body(*args, **kwargs)


def _raised(error: BaseException) -> Outcome:
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next  # begin at the body; an error of this file itself keeps all its frames
    message = f"{type(error).__name__}: {error}".rstrip(": ").splitlines()[0]
    lines = traceback.format_exception(error.with_traceback(frames or error.__traceback__))
    return Outcome("raised", message=message, traceback="".join(lines).rstrip())
