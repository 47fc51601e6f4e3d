"""Where and when it was measured."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """The processor, its cores and threads, GPUs, versions and the day, as plain values."""
    from distclip import __version__

    return {
        "date": datetime.datetime.now().astimezone().date().isoformat(),
        "cpu": _cpu(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpus": [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())],
        "torch": torch.__version__,
        "distclip": __version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


def told(found: dict[str, Any]) -> str:
    """The same in one line."""
    gpus = f"; {', '.join(found['gpus'])}" if found["gpus"] else ""
    return (
        f"{found['date']}: {found['cpu']}, {_many(found['cores'], 'core')}, {_many(found['threads'], 'thread')}{gpus}; "
        f"{found['system']}, torch {found['torch']}, distclip {found['distclip']}"
    )


def busy(found: dict[str, Any]) -> str:
    """A warning, where the processor was in use in the minute before; "" where it was not."""
    load, cores = found["load"], found["cores"]
    if load is None or load < max(1, cores / 2):
        return ""
    return (
        f"This machine was in use in the minute before (load {load:.1f} on {_many(cores, 'core')}): these times "
        "and ratios are rough. Measure again when it is idle, or with fewer --threads."
    )


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
