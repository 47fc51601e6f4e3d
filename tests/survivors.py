"""Ranks of which some are lost: killed with SIGKILL, as the kernel does when memory runs out or a node goes down."""

import os
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any, NoReturn

from tests.ranks import RanksFailed, report
from tests.ranks.launch import task_of
from tests.ranks.process import Rank, kill


def die() -> NoReturn:
    """End this process at once: no exception, no cleanup, no goodbye to the peers."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("survived SIGKILL")


def survivors(
    body: Callable[..., Any], world_size: int, lost: int, *arguments: Any, timeout: float = 10.0
) -> list[Any]:
    """Run the module-level function `body(*arguments)` on every rank, of which rank `lost` calls `die()`.

    Args:
        timeout: seconds; a collective gives up a little earlier. A rank that still runs then has hung.

    Returns:
        What the other ranks returned, in rank order.

    Raises:
        RanksFailed: one of them raised or hung, or `lost` lives.
    """
    with tempfile.TemporaryDirectory(prefix="distclip-survivors-") as folder:
        task = task_of(body, arguments, {}, world_size, timeout, folder)
        started: list[Rank] = []
        try:
            started.extend(Rank.start(task, number) for number in range(world_size))
            deadline = time.monotonic() + 2 * timeout
            while (news := [one for rank in started for one in rank.news()]) and time.monotonic() < deadline:
                wait(news, deadline - time.monotonic())
                for rank in started:
                    rank.look()
            others = [rank for rank in started if rank.number != lost]
            ended = all(rank.outcome and rank.outcome.kind == "returned" for rank in others)
            if not ended or started[lost].exitcode != -signal.SIGKILL:
                raise RanksFailed(report.failure(started, timeout) or f"rank {lost} was not killed")
            return [rank.outcome.value for rank in others if rank.outcome is not None]
        finally:
            kill(started)
