"""A plain function as a sink."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distclip.record import Record
from distclip.sinks.base import Sink


class Call(Sink):
    """Calls ``function(step, metrics)`` for every record, the names of the metrics behind the run's prefix."""

    def __init__(self, function: Callable[[int, dict[str, float]], Any]) -> None:
        self._function = function
        self._prefix = ""

    def start(self, run: Mapping[str, Any]) -> None:
        self._prefix = run.get("prefix", "")

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            self._function(record.step, record.prefixed(self._prefix))
