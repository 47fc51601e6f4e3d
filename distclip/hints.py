"""What errors add so that the next try works."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


def closest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown ``name``: the known one that is nearest, or all of them."""
    names = list(known)
    match = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {match[0]!r}?" if match else f"; known are {', '.join(names)}"


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
