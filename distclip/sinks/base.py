"""What every sink is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from distclip.hints import shown
from distclip.record import Event, Record


class Sink:
    """Gets the records of a run in order, some steps at a time, on the main process alone.

    A subclass defines ``write``, and what else it cares for. What it raises ends the sink with a warning, never the
    training.
    """

    def start(self, run: Mapping[str, Any]) -> None:
        """Before the first record: ``rule``, ``version``, ``world_size``, ``prefix`` and other facts of the run."""

    def write(self, records: Sequence[Record]) -> None:
        """The records since the last call, never none."""
        raise NotImplementedError(f"{type(self).__name__} must define write(records)")

    def event(self, event: Event) -> None:
        """An alarm, after the record that raised it."""

    def close(self) -> None:
        """The run is over. Called once."""


def as_sink(sink: Any) -> Sink:
    """What a user passed for a sink: one, a path that ends in ``.jsonl``, or a function of a record.

    Raises:
        TypeError: it is something else.
        ValueError: a path with another ending.
    """
    from distclip.sinks.call import Call
    from distclip.sinks.jsonl import JsonLines

    if isinstance(sink, Sink):
        return sink
    if isinstance(sink, str | os.PathLike):
        path = os.fsdecode(sink)
        if not path.endswith(".jsonl"):
            raise ValueError(f"sinks: a path must end in .jsonl, got {path!r}")
        return JsonLines(path)
    if callable(sink):
        return Call(sink)
    raise TypeError(f"sinks must be Sinks, paths or functions, got {type(sink).__name__}: {shown(sink, 80)}")
