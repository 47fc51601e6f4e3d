"""TensorBoard: scalars for every step, histograms of norms."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from distclip.hints import optional
from distclip.record import Event, Record
from distclip.sinks.base import Sink

# Norms span decades: histograms are of their logarithms.
_SMALLEST = 1e-30


class TensorBoard(Sink):
    """Scalars under their metric names, and histograms of log10 of the norms: of the last steps, and of the tensors.

    Args:
        target: a folder, or a ``SummaryWriter``, which is then left open at the end.
    """

    def __init__(self, target: str | os.PathLike[str] | Any) -> None:
        self._folder = os.fspath(target) if isinstance(target, str | os.PathLike) else None
        self._writer: Any = None if self._folder else target
        self._prefix = ""

    def start(self, run: Mapping[str, Any]) -> None:
        self._prefix = run["prefix"]
        if self._folder is not None:
            optional("tensorboard", "tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._folder)
        self._writer.add_text(f"{self._prefix}clipping", f"rule `{run['rule']}`, distclip {run['version']}")

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            for name, value in record.prefixed(self._prefix).items():
                self._writer.add_scalar(name, value, record.step, record.time)
            if record.per_tensor:
                self._histogram("tensor_norms_log10", list(record.per_tensor.values()), record.step)
        self._histogram("grad_norm_log10", [record.norm for record in records], records[-1].step)
        self._writer.flush()

    def event(self, event: Event) -> None:
        self._writer.add_text(f"{self._prefix}alarms", event.message, event.step)

    def close(self) -> None:
        if self._folder is not None:
            self._writer.close()

    def _histogram(self, name: str, norms: list[float], step: int) -> None:
        import torch

        logs = [math.log10(norm) for norm in norms if _SMALLEST < norm < math.inf]
        if logs:
            self._writer.add_histogram(self._prefix + name, torch.tensor(logs), step)
