"""For ``launch/strangers.py``: what Transformers' tests of FSDP ask about ranks, answered for the CPU.

Its source distribution has the tests without this module of helpers. Ranks clip as the process does that starts them.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

import distclip


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    """The CPU has no number."""


def _start_rank_processes(function: Callable[..., None], args: tuple[Any, ...], nprocs: int) -> None:
    spawn(_rank, (function, args), nprocs)


def _rank(rank: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    if os.environ.get("STRANGERS_PATCH") == "1":
        distclip.patch()
    function(rank, *args)
