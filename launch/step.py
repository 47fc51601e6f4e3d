"""One optimizer step in numbers, as the JSON-lines file holds it."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Step:
    """`total_norm` is the norm of the gradients before clipping and `clipped_norm` after it; both span all ranks."""

    step: int
    loss: float
    total_norm: float
    clipped_norm: float
    coefficient: float
    threshold: float
    clipped: bool
    nonfinite: bool
    skipped: bool
    lr: float
    seconds: float

    def to_json(self) -> str:
        """One JSON object. JSON knows no infinity: "inf", "-inf" and "nan" stand as strings, which float() reads."""
        return json.dumps({name: _json_value(value) for name, value in asdict(self).items()}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Self:
        """The step that `to_json` wrote."""
        values: dict[str, Any] = json.loads(line)
        values |= {name: float(value) for name, value in values.items() if isinstance(value, str)}
        return cls(**values)


def _json_value(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
