"""Files of settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distclip.hints import optional


def load_mapping(path: Path) -> dict[str, Any]:
    """What a YAML file, or a JSON file (by its suffix), holds: names and values; {} where it is empty.

    Raises:
        ValueError: it cannot be read, is neither, or holds something else.
        ImportError: it is YAML, and PyYAML is not installed.
    """
    content = _parsed(path, read_text(path))
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path}: must hold settings, `name: value`, got {type(content).__name__}")
    return content


def read_text(path: Path, errors: str = "strict") -> str:
    """A file's text; ``errors`` as for ``bytes.decode``.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8", errors=errors)
    except (OSError, ValueError) as error:  # ValueError: no UTF-8; a path that holds a zero byte
        raise ValueError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _parsed(path: Path, text: str) -> Any:
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: is no JSON: {error}") from None
    yaml = optional("yaml", "config")
    try:
        return load_yaml(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: is no YAML: {' '.join(str(error).split())}") from None


def load_yaml(text: str) -> Any:
    """``yaml.safe_load``, but for keys that stand twice, of which that would silently take the last.

    Raises:
        ImportError: PyYAML is not installed.
        yaml.YAMLError: no YAML, or the same key twice in a mapping.
    """
    yaml = optional("yaml", "config")

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names: set[str] = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in names:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", node.start_mark)
                names.add(key.value)
            return super().construct_mapping(node, deep)

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            except (ValueError, LookupError, AttributeError) as error:
                # What PyYAML lets through of what int(), float() and datetime say: `2001-99-99`, `!!int ""`; and what
                # Python says of PyYAML: `!!bool x`, `!!timestamp x`.
                why = str(error) if isinstance(error, ValueError) else f"is no {node.tag.rpartition(':')[2]}"
                raise yaml.constructor.ConstructorError(None, None, f"{node.value!r}: {why}", node.start_mark) from None

    return yaml.load(text, Loader)
