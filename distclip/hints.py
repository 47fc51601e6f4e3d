"""What errors say so that the next try works, and the checks that several places share."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any, TypeGuard


def closest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown ``name``: the known one that is nearest, or all of them."""
    names = list(known)
    match = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {match[0]!r}?" if match else f"; known are {', '.join(names)}"


def several(value: object) -> TypeGuard[Iterable[Any]]:
    """Whether it can be iterated over. Tensors and arrays without a dimension only look like it."""
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0


def checked_flag(name: str, value: object) -> bool:
    """``value`` as a bool; whatever Python has a truth for will do.

    Raises:
        TypeError: it has none: a tensor or an array of several.
    """
    try:
        return bool(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be True or False, got {shown(value)}") from None


def shown(value: object, most: int = 200) -> str:
    """``repr(value)`` for an error, cut short; the type of what has none (Python prints no int of 5000 digits)."""
    try:
        text = repr(value)
    except Exception:  # whatever a repr of somebody else's raises, the error that is being told matters more
        return f"<{type(value).__name__}>"
    return text if len(text) <= most else f"{text[:most]}..."


def optional(module: str, extra: str) -> ModuleType:
    """Import what only an extra of distclip brings.

    Raises:
        ImportError: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != module.partition(".")[0]:
            raise
        raise ImportError(f"this needs {module.partition('.')[0]}: pip install 'distclip[{extra}]'") from error
