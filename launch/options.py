"""What launch/train.py was asked to do. `arguments` reads it from the command line."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """What the user asked for; defaults that depend on other arguments are filled in."""

    model: str
    experts: int
    data: str
    text: Path | None
    parallel: str
    rule: str
    lr: float
    batch: int
    accumulate: int
    precision: str
    steps: int
    seed: int
    out: Path
    checkpoint: Path | None
    save_every: int | None
    resume: bool
    compare: bool
