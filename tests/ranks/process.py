"""One rank as its parent sees it."""

import functools
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import torch

from tests.ranks import child
from tests.ranks.child import GRACE, Outcome, Task


@dataclass
class Rank:
    """A rank's process; `outcome` and `exitcode` are as of the last `look`."""

    number: int
    process: BaseProcess
    pipe: Connection
    log: Path
    stacks: Path
    outcome: Outcome | None = None
    exitcode: int | None = None  # None while it runs

    @classmethod
    def start(cls, task: Task, number: int) -> "Rank":
        """Fork it (or spawn it, see `_context`)."""
        context = _context(task.device)
        here, there = context.Pipe()
        process = context.Process(target=child.main, args=(task, number, there), name=f"rank {number}")
        process.start()
        there.close()
        return cls(number, process, here, task.log(number), task.stacks(number))

    def look(self) -> None:
        """Take in what the rank has sent, and whether it has ended."""
        self.exitcode = self.process.exitcode  # before the pipe: a process that has ended has said all it will say
        if not self.pipe.closed and self.pipe.poll():
            try:
                self.outcome = pickle.loads(self.pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                self.pipe.close()

    def news(self) -> list[Connection | int]:
        """What becomes readable when there is something to look at: nothing once the process has ended."""
        if self.exitcode is not None:
            return []
        unheard = [self.pipe] if self.outcome is None and not self.pipe.closed else []
        return [*unheard, self.process.sentinel]

    @property
    def raised(self) -> bool:
        """Whether the body ended in an exception."""
        return self.outcome is not None and self.outcome.kind == "raised"

    @property
    def died(self) -> bool:
        """Whether the process ended otherwise than it said, or without a word."""
        return self.exitcode is not None and not self.raised and (self.outcome is None or self.exitcode != 0)

    @property
    def state(self) -> str:
        """One phrase for a report."""
        said = f"{self.outcome.kind} {self.outcome.message}".rstrip() if self.outcome else ""
        if self.raised:
            return said
        if self.exitcode is None:
            return f"{said}, but its process does not end" if said else "still running"
        if not self.died:
            return said
        end = f"exited with code {self.exitcode}"
        if self.exitcode < 0:
            end = f"killed by {signal.Signals(-self.exitcode).name}"
        return f"{said}, then {end}" if said else end


def ask_for_stacks(ranks: Sequence[Rank]) -> None:
    """Have every process that still runs write down where it is."""
    asked = []
    for rank in ranks:
        # Before the file is there, nothing handles the signal, and it would kill.
        if rank.exitcode is None and rank.process.pid is not None and rank.stacks.exists():
            os.kill(rank.process.pid, signal.SIGUSR1)
            asked.append(rank.stacks)
    deadline = time.monotonic() + GRACE
    while not all(file.stat().st_size for file in asked) and time.monotonic() < deadline:
        time.sleep(0.01)
    if asked:
        time.sleep(0.05)  # every file is begun; let it be finished


def kill(ranks: Sequence[Rank]) -> None:
    """Let no process outlive its test."""
    for rank in ranks:
        rank.process.kill()
    for rank in ranks:
        rank.process.join()
        rank.process.close()
        rank.pipe.close()


@functools.cache
def _context(device: str) -> ForkServerContext | SpawnContext:
    """Fork from a server; on CUDA only where a fork of it can use CUDA, else spawn."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks.preload"])
    packages = {"distclip", "tests", "hypothesis", "numpy"}
    variables = {
        "DISTCLIP_TESTS_PRELOAD": " ".join(name for name in sys.modules if name.split(".")[0] in packages),
        "PYTHONPATH": os.pathsep.join(sys.path),  # Python 3.11's server is not told where to find `tests`
        "OMP_NUM_THREADS": "1",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a server that asks CUDA itself spoils CUDA for its forks
    }
    with mock.patch.dict(os.environ, variables):
        forkserver.ensure_running()
    if device == "cuda":
        probe = context.Process(target=torch.cuda.init)
        probe.start()
        probe.join()
        if probe.exitcode != 0:
            return multiprocessing.get_context("spawn")
    return context
