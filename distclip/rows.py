"""The rows of tensors in what this rank has of them: reading and changing them one by one, wherever they are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from distclip.kernels.common import real, summed
from distclip.layout import Piece

# Elements looked at in one go, which bounds the memory that wider copies take.
_BLOCK = 1 << 18


class Rows(NamedTuple):
    """Some rows, or parts of rows, of one tensor."""

    elements: Tensor
    """One row for each place in dim 0. A view: writing to it writes to the gradient."""
    units: Tensor | slice
    """Their places among the tensor's rows."""

    def blocks(self) -> Iterator[Rows]:
        """The same in parts of bounded size."""
        count = self.elements.shape[0]
        size = max(1, _BLOCK * count // max(self.elements.numel(), 1))
        if size >= count:
            yield from (Rows(part, self.units) for part in self._columns())
            return
        for start in range(0, count, size):
            stop = min(start + size, count)
            units: Tensor | slice
            if isinstance(self.units, slice):
                units = slice(self.units.start + start, self.units.start + stop)
            else:
                units = self.units[start:stop]
            yield from (Rows(part, units) for part in Rows(self.elements[start:stop], units)._columns())

    def _columns(self) -> Iterator[Tensor]:
        """Parts of single rows that are too long by themselves."""
        if self.elements.numel() <= _BLOCK or self.elements.shape[0] > 1:
            yield self.elements
        else:
            length = self.elements.shape[1]
            yield from self.elements.split(max(1, _BLOCK * length // self.elements.numel()), dim=1)

    def moved(self, first: int) -> Tensor | slice:
        """``units`` among the rows of all tensors, where this one's begin at ``first``."""
        if isinstance(self.units, slice):
            return slice(self.units.start + first, self.units.stop + first)
        return self.units + first


def rows_of(local: Tensor, piece: Piece, index: Tensor | None) -> Iterator[Rows]:
    """The rows in a rank's part of a tensor.

    Args:
        local: the part, as ``gradients.parts_of`` gives it.
        piece: what of the tensor it is.
        index: which rows are in it, where not all are (a DTensor cut along dim 0).
    """
    shape = piece.shape
    if len(shape) < 2:
        yield Rows(local.view(1, -1) if local.ndim == 0 else local.unsqueeze(0), slice(0, 1))
    elif local.ndim == len(shape):
        yield Rows(local, slice(0, local.shape[0]) if index is None else index.to(local.device))
    else:
        yield from _in_span(local, piece.start, shape.numel() // max(shape[0], 1))


def _in_span(flat: Tensor, start: int, length: int) -> Iterator[Rows]:
    """The rows, of ``length`` elements each, in a flat part that begins at ``start`` of the flattened tensor."""
    row, within = divmod(start, length)
    head = min(length - within, flat.numel()) if within else 0
    if head:
        yield Rows(flat[:head].unsqueeze(0), slice(row, row + 1))
        row += 1
    whole = (flat.numel() - head) // length
    if whole:
        yield Rows(flat[head : head + whole * length].view(whole, length), slice(row, row + whole))
        row += whole
    rest = flat[head + whole * length :]
    if rest.numel():
        yield Rows(rest.unsqueeze(0), slice(row, row + 1))


def squares(rows: Rows) -> Tensor:
    """Sum of the squares of each row's elements; float64."""
    # Of contiguous rows of real numbers torch makes each norm in one thread.
    norms: Tensor = torch.linalg.vector_norm(real(rows.elements).flatten(1).double().contiguous(), dim=1)
    return norms.square()


def sums(rows: Rows) -> Tensor:
    """Sum of each row's elements; float64."""
    elements = rows.elements.flatten(1)
    return summed(elements[0].double()).view(1) if len(elements) == 1 else elements.sum(1, dtype=torch.float64)


def blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Views that make up a tensor, of bounded size."""
    elements = tensor.view(1, -1) if tensor.ndim == 0 else tensor.unsqueeze(0) if tensor.ndim == 1 else tensor
    return (block.elements for block in Rows(elements, slice(0, len(elements))).blocks())


Change = Callable[[Rows, Tensor], None]


def scale_(rows: Rows, factors: Tensor) -> None:
    """Multiply each row in place by its factor."""
    _in_place(torch.mul, rows.elements, factors)


def shift_(rows: Rows, means: Tensor) -> None:
    """Subtract its value from each row's elements in place."""
    _in_place(torch.sub, rows.elements, means)


def _in_place(operation: Callable[[Tensor, Tensor], Tensor], elements: Tensor, values: Tensor) -> None:
    # In float64, so that the result alone is rounded; blocks keep the copy small.
    dtype = torch.complex128 if elements.is_complex() else torch.float64
    shaped = values.to(elements.device, dtype).view(-1, *[1] * (elements.ndim - 1))
    elements.copy_(operation(elements, shaped))
