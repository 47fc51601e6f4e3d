"""Remembering things of tensors for as long as these live, without weak references to them.

``Module.to()`` and its kin may swap what a parameter is (always, where it is a DTensor), and torch refuses to swap a
tensor that is weakly referenced. So a mark hangs on the tensor, and what is remembered hangs on the mark; a tensor
that was swapped has lost it, and is a new one here.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any, Generic, TypeVar

from torch import Tensor

_NAME = "_distclip_mark"

Value = TypeVar("Value")


class Mark:
    """Stands for one tensor. A copy of the tensor is another one; in a file the mark means nothing."""

    def __copy__(self) -> Mark:
        return Mark()

    def __deepcopy__(self, memo: Any) -> Mark:
        return Mark()

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # which torch.load(weights_only=True) knows


def mark_of(tensor: Tensor) -> Mark:
    """The tensor's mark, made if it has none."""
    mark = getattr(tensor, _NAME, None)
    if not isinstance(mark, Mark):
        mark = Mark()
        setattr(tensor, _NAME, mark)
    return mark


class Memory(Generic[Value]):
    """A dictionary by tensor, that neither keeps its tensors alive nor outlives them."""

    def __init__(self) -> None:
        self._values: weakref.WeakKeyDictionary[Mark, Value] = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._values)

    def __setitem__(self, tensor: Tensor, value: Value) -> None:
        self._values[mark_of(tensor)] = value

    def get(self, tensor: Tensor) -> Value | None:
        mark = getattr(tensor, _NAME, None)
        return self._values.get(mark) if isinstance(mark, Mark) else None

    def pop(self, tensor: Tensor) -> Value | None:
        mark = getattr(tensor, _NAME, None)
        return self._values.pop(mark, None) if isinstance(mark, Mark) else None

    def values(self) -> list[Value]:
        return list(self._values.values())
