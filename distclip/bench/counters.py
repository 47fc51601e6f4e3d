"""What time does not show: collectives, waits for the device, memory. Each runs a way once more, untimed."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_HELPERS = ("wait_tensor", "_wrap_tensor_autograd")
_SYNC = "called a synchronizing CUDA operation"


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            # Its turn first: what it then does with local tensors comes back here, its collectives among it.
            return NotImplemented
        # Both ways lead here: torch.distributed's own calls, and the functional ones that DTensor makes.
        if func.namespace in ("c10d", "_c10d_functional") and not set(_HELPERS) & set(
            func._schema.name.split("::")[1:]
        ):
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded_collectives() -> Iterator[list[str]]:
    """The names of all collectives that this rank starts in the block."""
    with _Recorder() as recorder:
        yield recorder.names


def host_syncs(way: Callable[[], object]) -> int:
    """How often the host waits for a CUDA device."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            way()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum(_SYNC in str(each.message) for each in caught)


def peak_memory(way: Callable[[], object], device: torch.device) -> int:
    """The most bytes that tensors made meanwhile take at any moment, temporaries inside operators included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return _peak_on_cpu(way)


def _peak_on_cpu(way: Callable[[], object]) -> int:
    with (
        _silent(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        way()
    results: Any = profiler.profiler
    changes = [
        (event.start_ns(), event.nbytes())
        for event in results.kineto_results.events()
        if event.name() == "[memory]" and event.device_type().name == "CPU"
    ]
    now = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        now += change
        peak = max(peak, now)
    return peak


@contextmanager
def _silent() -> Iterator[None]:
    """torch 2.13 tells, past Python, of a profiler's start and stop, and of memory that is older than the profiler."""
    sys.stderr.flush()
    before = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
