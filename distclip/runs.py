"""Logged runs, read back from the JSON lines that ``sinks.JsonLines`` wrote."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distclip.files import read_text
from distclip.record import RESERVED, Event, Record
from distclip.rules.thresholds import LARGEST_COUNT


@dataclass(frozen=True)
class Run:
    """One log."""

    path: Path
    info: Mapping[str, Any]
    """What its last line of kind ``run`` says: ``rule``, ``version``, ``world_size`` ..."""
    records: tuple[Record, ...]
    """Ordered by step. Of a run that resumed, or began anew in the same file, those from before its first step."""
    events: tuple[Event, ...]
    broken_lines: int = 0
    """Lines that could not be read: what a crash left of one."""

    @property
    def name(self) -> str:
        """What to call it: its file, or the folder of a file that is called like all others."""
        return (
            self.path.parent.name
            if self.path.stem in ("run", "steps", "log") and self.path.parent.name
            else self.path.stem
        )

    def series(self, metric: str) -> list[float]:
        """A metric in every record; NaN where a record has none."""
        return [record.metrics.get(metric, math.nan) for record in self.records]

    @property
    def steps(self) -> list[int]:
        """The number of every record's step."""
        return [record.step for record in self.records]


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a log, also one that is still being written.

    Raises:
        ValueError: the file cannot be read, or holds no steps of a run.
    """
    path = Path(path)
    lines = read_text(path, errors="replace").splitlines()
    info: dict[str, Any] = {}
    records: dict[int, Record] = {}
    events: list[Event] = []
    broken, anew = 0, False
    for line in filter(str.strip, lines):
        told = _parsed(line)
        kind = told.get("kind")
        if kind == "run":
            info, anew = told, True
        elif kind == "alarm":
            events.append(_event(told))
        elif kind == "step":
            if anew:
                # A run that resumes, or begins again: what an earlier one did from here on is history no more.
                first, anew = told["step"], False
                records = {step: record for step, record in records.items() if step < first}
                events = [event for event in events if event.step < first]
            records[told["step"]] = _record(told)
        else:
            broken += 1
    if not records:
        what = f"none of its {len(lines)} lines is one" if broken else "it has none"
        raise ValueError(f'{path}: is no log of a run ({what} with "kind": "step"): write one with sinks.JsonLines')
    return Run(path, info, tuple(records[step] for step in sorted(records)), tuple(events), broken)


def _parsed(line: str) -> dict[str, Any]:
    """What a line holds; {} where that is not what distclip writes."""
    try:
        told = json.loads(line)
    except (ValueError, RecursionError):  # the second of what is nested deeper than Python's stack
        return {}
    if not isinstance(told, dict):
        return {}
    step = told.get("step")
    if told.get("kind") in ("step", "alarm") and (not isinstance(step, int) or isinstance(step, bool)):
        return {}
    return told if not isinstance(step, int) or 0 <= step <= LARGEST_COUNT else {}


def _record(told: dict[str, Any]) -> Record:
    per_tensor = told.get("per_tensor")
    metrics = {key: _number(value) for key, value in told.items() if key not in RESERVED}
    tensors = {str(key): _number(value) for key, value in per_tensor.items()} if isinstance(per_tensor, dict) else None
    return Record(told["step"], _number(told.get("time")), metrics, tensors)


def _event(told: dict[str, Any]) -> Event:
    values = told.get("values")
    return Event(
        told["step"],
        text_in(told, "alarm"),
        text_in(told, "message"),
        {str(key): _number(value) for key, value in values.items()} if isinstance(values, dict) else {},
    )


def text_in(told: Mapping[str, Any], key: str) -> str:
    """The text that stands under ``key``; none where something else does."""
    text = told.get(key)
    # Lone halves of a character, which JSON can hold, could not be printed.
    return text.encode(errors="replace").decode() if isinstance(text, str) else ""


def _number(value: Any) -> float:
    """A number, or one of the texts that stand for inf and NaN; NaN for all else."""
    if isinstance(value, bool | int | float):
        try:
            return float(value)
        except OverflowError:  # an int of hundreds of digits: no float that a sink wrote
            return math.nan
    return float(value) if isinstance(value, str) and value in ("inf", "-inf", "nan") else math.nan
