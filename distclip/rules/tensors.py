"""What rules know of the tensors themselves: their names and shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

Patterns = tuple[str, ...]
"""Shell patterns (``fnmatch``) on parameter names."""


class Tensors:
    """What is known of the tensors whose norms a rule sees. The same object in every step, while the model is the same.

    A *unit* is one row of a tensor (along dim 0) if it has two dimensions or more, else the whole tensor.
    """

    def __init__(self, names: Sequence[str], shapes: Sequence[torch.Size], device: torch.device) -> None:
        self.names = tuple(names)
        """Unique over the job. Where stages or experts reuse a name, their place follows it after a comma."""
        self.shapes = tuple(shapes)
        self.numels = torch.tensor([shape.numel() for shape in shapes], dtype=torch.float64, device=device)
        counts = torch.tensor([units_in(shape) for shape in shapes], dtype=torch.int64)
        self.first_units: list[int] = (counts.cumsum(0) - counts).tolist()
        """The place of each tensor's first unit among all units."""
        self.unit_count = int(counts.sum())
        self.owners = torch.repeat_interleave(torch.arange(len(counts)), counts).to(device)
        """For each unit, the place of its tensor."""
        sizes = torch.tensor([shape.numel() / units_in(shape) for shape in shapes], dtype=torch.float64)
        self.unit_numels = sizes.to(device)[self.owners]
        """The number of elements of each unit."""
        self._parts: dict[tuple[int, ...], Part] = {}
        self._matching: dict[tuple[Patterns, ...], list[tuple[int, ...]]] = {}
        self._to: dict[torch.device, Tensors] = {device: self}

    def to(self, device: torch.device) -> Tensors:
        """The same on another device."""
        if device not in self._to:
            self._to[device] = Tensors(self.names, self.shapes, device)
        return self._to[device]

    def spread(self, values: Tensor) -> Tensor:
        """One value for each unit from one for each tensor (what is for each unit, or for all, stays as it is)."""
        return values[self.owners] if values.ndim and values.numel() == len(self.names) else values

    def matched(self, groups: tuple[Patterns, ...]) -> list[tuple[int, ...]]:
        """The places of the tensors that each group of patterns is the first to match."""
        if groups not in self._matching:
            found: list[list[int]] = [[] for _ in groups]
            for place, name in enumerate(self.names):
                first = next((order for order, patterns in enumerate(groups) if matches(name, patterns)), None)
                if first is not None:
                    found[first].append(place)
            self._matching[groups] = [tuple(places) for places in found]
        return self._matching[groups]

    def part(self, places: tuple[int, ...]) -> Part:
        """Some of the tensors."""
        if places not in self._parts:
            device = self.owners.device
            index = torch.tensor(places, dtype=torch.int64, device=device)
            units = torch.isin(self.owners, index).nonzero().flatten()
            chosen = Tensors([self.names[place] for place in places], [self.shapes[place] for place in places], device)
            self._parts[places] = Part(index, units, chosen)
        return self._parts[places]


@dataclass(frozen=True, eq=False)
class Part:
    """Some of the tensors: their places, those of their units, and what is known of them."""

    index: Tensor
    units: Tensor
    tensors: Tensors


def units_in(shape: torch.Size) -> int:
    """How many units a tensor of this shape has; at least 1."""
    return max(shape[0], 1) if len(shape) > 1 else 1


def matches(name: str, patterns: Patterns) -> bool:
    """Whether any pattern matches the name that the user's model gives, whichever stage or expert it is on."""
    own, _, _ = name.partition(", ")
    return any(fnmatchcase(own, pattern) for pattern in patterns)
