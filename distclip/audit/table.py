"""What ``audit`` returns, and how it is printed."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distclip.audit.findings import Finding, ranges, rank_names, told_together

_WIDTH = 120
_HEAD = ("name", "shape", "dtype", "local shape", "system", "sharded over", "replicated over", "holders", "gradient")


@dataclass(frozen=True)
class AuditRow:
    """One tensor of which this rank has a piece (FSDP1 packs several into a parameter)."""

    name: str
    shape: tuple[int, ...]
    """Whole, as one process would hold it."""
    dtype: torch.dtype
    local_shape: tuple[int, ...]
    """Of this rank's piece."""
    system: str
    """Who laid it out: plain, DDP, FSDP1, DTensor ...; ``+ declare`` where ``declare`` said more."""
    sharded: tuple[tuple[int, ...], ...]
    """The ranks of each group along which it is distinct."""
    replicated: tuple[int, ...]
    """The asked ranks that hold this same piece, this one included."""
    gradient: bool
    """Whether this rank has a gradient of it, be it of an empty piece."""

    @property
    def holders(self) -> int:
        """How many of the asked ranks hold this piece."""
        return len(self.replicated)

    def cells(self) -> tuple[str, ...]:
        """What the table shows, in its columns."""
        return (
            self.name,
            _shape(self.shape),
            str(self.dtype).removeprefix("torch."),
            _shape(self.local_shape),
            self.system,
            " x ".join(ranges(group) for group in self.sharded) or "-",
            ranges(self.replicated) if self.holders > 1 else "-",
            str(self.holders),
            "yes" if self.gradient else "no",
        )


@dataclass(frozen=True)
class Audit:
    """What distclip takes this rank's model for, and what all asked ranks found of it together."""

    rows: tuple[AuditRow, ...]
    """The tensors of this rank."""
    findings: tuple[Finding, ...]
    """Everything that is not as the rows of the ranks say; the same on every asked rank."""
    rank: int
    ranks: tuple[int, ...]
    """The asked ranks."""
    stages: tuple[int, ...]
    """The ranks of the pipeline; empty without one."""
    backward: bool
    """Whether any asked rank has a gradient, so that more than the layouts could be looked at."""
    tolerance: float
    total_norm: float | None
    """The norm that distclip computes on this rank; None before a backward, or where it cannot be computed."""
    slow_norm: float | None
    """That of every distinct piece of the asked ranks, gathered and added up in float64; None before a backward."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def __str__(self) -> str:
        stages = f", pipeline over {rank_names(self.stages)}" if self.stages else ""
        asked = f", {rank_names(self.ranks)} asked" if len(self.ranks) > 1 else ""
        lines = [f"rank {self.rank}{asked}{stages}", *_aligned([_HEAD, *(row.cells() for row in self.rows)])]
        if self.findings:
            lines.append(f"{len(self.findings)} finding{'s' if len(self.findings) > 1 else ''}:")
            for text in told_together(self.findings):
                lines += textwrap.wrap(
                    text, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_long_words=False
                )
        else:
            lines += textwrap.wrap(self._checked(), _WIDTH)
        return "\n".join(lines)

    def _checked(self) -> str:
        if not self.backward:
            return "No finding. No rank has a gradient: after a backward() audit also compares the gradients."
        replicas = f"equal within {self.tolerance:g}" if self.tolerance else "equal bit by bit"
        return (
            f"No finding. Replicas are {replicas}, distinct pieces are not, nothing is counted twice or left out; the "
            f"norm, {self.total_norm:.6g}, is that of all pieces gathered."
        )


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
