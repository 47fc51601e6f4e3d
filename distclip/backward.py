"""The ``backward()`` that is running."""

from __future__ import annotations

from collections.abc import Callable

import torch


def task() -> int:
    """Its number; -1 where none runs."""
    return int(torch._C._current_graph_task_id())


def at_the_end(callback: Callable[[], None]) -> None:
    """Call back after it, and after all that was queued so far; at once where none runs."""
    if task() < 0:
        callback()
    else:
        torch.autograd.Variable._execution_engine.queue_callback(callback)
