"""Rules from a short text, for command lines."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable

from distclip.rules.base import Rule
from distclip.rules.norm import ClipByGlobalNorm, ClipByNorm, ClipByValue

_NAMES: dict[str, Callable[..., Rule]] = {"global_norm": ClipByGlobalNorm, "norm": ClipByNorm, "value": ClipByValue}


def parse(text: str) -> Rule:
    """The rule that ``text`` names: ``name=threshold[,option=value ...]``.

    Example:
        >>> parse("global_norm=1.0")
        ClipByGlobalNorm(max_norm=1.0, norm_type=2.0)
        >>> parse("global_norm=1.0,norm_type=inf")
        ClipByGlobalNorm(max_norm=1.0, norm_type=inf)
        >>> parse("value=-0.1:0.5")
        ClipByValue(clip_value=(-0.1, 0.5))

    Raises:
        ValueError: an unknown rule or option (the closest known one is named), or a value that is no number.
    """
    head, *options = text.split(",")
    name, _, threshold = head.partition("=")
    rule = _NAMES.get(name.strip())
    if rule is None:
        raise ValueError(f"rule {text!r}: unknown name {name.strip()!r}{_closest(name.strip(), list(_NAMES))}")
    known = list(inspect.signature(rule).parameters)
    arguments = {}
    for option in options:
        key, _, value = option.partition("=")
        if key.strip() not in known:
            raise ValueError(f"rule {text!r}: unknown option {key.strip()!r}{_closest(key.strip(), known)}")
        arguments[key.strip()] = _number(text, value)
    try:
        return rule(_number(text, threshold), **arguments)
    except TypeError as error:
        raise ValueError(f"rule {text!r}: {error}") from None


def _number(text: str, value: str) -> float | tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in value.split(":"))
    except ValueError:
        raise ValueError(f"rule {text!r}: {value.strip()!r} is not a number (or lo:hi)") from None
    return numbers[0] if len(numbers) == 1 else numbers


def _closest(name: str, known: list[str]) -> str:
    match = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {match[0]!r}?" if match else f"; known are {', '.join(known)}"
