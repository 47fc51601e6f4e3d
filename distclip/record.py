"""One clip as sinks, alarms and files know it: plain numbers under the names that trackers show."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RESERVED = frozenset({"kind", "step", "time", "per_tensor"})
"""What a record's line in a file holds besides metrics."""


@dataclass(frozen=True)
class Record:
    """One clip."""

    step: int
    """Which clip of the GradClipper it was, counted from 1."""
    time: float
    """Seconds since the epoch."""
    metrics: Mapping[str, float]
    """``grad_norm``, ``clip_coef`` ... (see ``ClipReport.metrics``), ``clip_fraction``, and what the script added."""
    per_tensor: Mapping[str, float] | None = None
    """Norms of single tensors before clipping, by name, where they were measured."""

    @property
    def norm(self) -> float:
        """The global norm before clipping; NaN where nobody knows."""
        return self.metrics.get("grad_norm", math.nan)

    def prefixed(self, prefix: str) -> dict[str, float]:
        """The metrics as trackers show them: ``train/grad_norm``."""
        return {prefix + name: value for name, value in self.metrics.items()}

    def is_set(self, flag: str) -> bool:
        """Whether ``clipped``, ``skipped`` or ``nonfinite`` is."""
        return bool(self.metrics.get(flag, 0.0))


@dataclass(frozen=True)
class Event:
    """What an alarm has to say."""

    step: int
    alarm: str
    message: str
    values: Mapping[str, float] = field(default_factory=dict)


def to_json(content: Mapping[str, Any]) -> str:
    """One line. JSON knows no infinity: "inf", "-inf" and "nan" stand as texts, which ``float()`` reads."""
    return json.dumps(_plain(content), allow_nan=False, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
