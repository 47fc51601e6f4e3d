"""A log in JSON lines: safe to read while it grows, and whole up to its last line if the run is killed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distclip.record import Event, Record, to_json
from distclip.sinks.base import Sink


class JsonLines(Sink):
    """Appends one line for the run (``"kind": "run"``), each step (``"step"``) and each alarm (``"alarm"``).

    Whole lines are written at once and handed to the system at once, so that a reader sees no half lines but, after a
    crash of the machine, a last one. Metrics stand without the run's prefix, which the run's line names. A log that is
    there already is added to, as a resumed run wants; ``distclip.runs.read_run`` passes over what it does again.

    Args:
        path: the file; its folder is made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: int | None = None

    def start(self, run: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        if not _ends_whole(self.path):
            # What a crash left of a line stays a line of its own.
            self._append("\n")
        self._append(to_json({"kind": "run", **run}) + "\n")

    def write(self, records: Sequence[Record]) -> None:
        lines = []
        for record in records:
            told: dict[str, Any] = {"kind": "step", "step": record.step, "time": record.time, **record.metrics}
            if record.per_tensor is not None:
                told["per_tensor"] = record.per_tensor
            lines.append(to_json(told) + "\n")
        self._append("".join(lines))

    def event(self, event: Event) -> None:
        told = {"kind": "alarm", "step": event.step, "alarm": event.alarm, "message": event.message}
        self._append(to_json(told | {"values": event.values}) + "\n")

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _append(self, text: str) -> None:
        assert self._file is not None, "start() comes first"
        data = memoryview(text.encode())
        while data:
            data = data[os.write(self._file, data) :]


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
