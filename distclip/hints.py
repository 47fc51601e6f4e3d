"""What errors add so that the next try works."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any


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


def load_yaml(text: str) -> Any:
    """``yaml.safe_load``, but for keys that stand twice, of which that would silently take the last.

    Raises:
        ImportError: PyYAML is not installed.
        yaml.YAMLError: no YAML, or the same key twice in a mapping.
    """
    yaml = optional("yaml", "config")

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for name in names:
                if names.count(name) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"{name!r} stands twice", node.start_mark)
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader)
