"""What each setting of ``ClipConfig`` may be, and how it is read from a text and written as one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from distclip.audit.clips import WHEN
from distclip.engine import NONFINITE
from distclip.hints import shown
from distclip.rules.base import Rule
from distclip.rules.compose import Chain, PerGroup, as_rule, refused_if_endless
from distclip.rules.text import parse
from distclip.rules.thresholds import checked_choice, checked_every


def _same(name: str, text: str) -> Any:
    return text


def _plain(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Kind:
    """One kind of setting. Functions are called with the setting's name, for errors, and its value."""

    help: str
    check: Callable[[str, Any], Any]
    """The value as ClipConfig keeps it. Raises ValueError or TypeError."""
    read: Callable[[str, str], Any] = _same
    """A value of a text, for environment and command line."""
    write: Callable[[Any], Any] = _plain
    """The value as YAML and JSON take it."""


def rule_of(value: Any) -> Rule:
    """A new Rule of what a user wrote: a number, a text, a Rule, a list (``Chain``), a mapping (``PerGroup``).

    Raises:
        ValueError, TypeError: it describes none.
    """
    if isinstance(value, Rule):
        return copy.deepcopy(value)
    if isinstance(value, str):
        return parse(value) if (number := _as_number(value)) is None else as_rule(number)
    if isinstance(value, list | tuple):
        with refused_if_endless(value):
            return Chain([rule_of(part) for part in value])
    if isinstance(value, Mapping):
        with refused_if_endless(value):
            return PerGroup({_patterns(key): rule_of(part) for key, part in value.items()})
    return as_rule(value)


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _patterns(key: Any) -> Any:
    if not isinstance(key, str | tuple):
        raise TypeError(f"a pattern of parameter names must be a text, got {shown(key)}")
    return tuple(part.strip() for part in key.split(":")) if isinstance(key, str) else key


def _check_rule(name: str, value: Any) -> Any:
    if value is None:
        raise ValueError(f"{name} must be a number or a rule, got None; rule=inf only measures")
    rule_of(value)
    return value


def _write_rule(value: Any) -> Any:
    return value if isinstance(value, int | float | str) else str(rule_of(value))


def _check_groups(name: str, value: Any) -> dict[Any, Any]:
    if isinstance(value, str):
        value = _read_groups(name, value)
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must map patterns of parameter names to rules, got {shown(value)}")
    if value:
        rule_of(value)
    return {_patterns(key): rule for key, rule in value.items()}


def _read_groups(name: str, text: str) -> Any:
    rule = parse(text)
    if not isinstance(rule, PerGroup):
        raise ValueError(f"{name} must be 'pattern -> rule ; pattern -> rule', got {text!r}")
    return rule.rules


def _write_groups(value: Mapping[Any, Any]) -> dict[str, Any]:
    return {":".join(key): _write_rule(rule) for key, rule in value.items()}


def _check_axis(name: str, value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value == "none"):
        return None
    if not (isinstance(value, str) and value):
        raise TypeError(f"{name} must be the name of an axis of a DeviceMesh, got {shown(value)}")
    return value


def _read_optional(name: str, text: str) -> str | None:
    return None if text == "none" else text


def _check_axes(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(part, str) for pair in value.items() for part in pair):
        raise TypeError(f"{name} must map patterns of parameter names to axes of a DeviceMesh, got {shown(value)}")
    return dict(value)


def _read_axes(name: str, text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(pattern.strip() and axis.strip() for pattern, _, axis in pairs):
        raise ValueError(f"{name} must be 'pattern=axis,pattern=axis', got {text!r}")
    return {pattern.strip(): axis.strip() for pattern, _, axis in pairs}


def _read_count(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} must be a whole number, got {text!r}") from None


def _check_switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {shown(value)}")
    return value


def _read_switch(name: str, text: str) -> bool:
    if text.lower() not in _SWITCHES:
        raise ValueError(f"{name} must be true or false, got {text!r}")
    return _SWITCHES[text.lower()]


_SWITCHES = {"true": True, "1": True, "false": False, "0": False}


def _check_log(name: str, value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and value.endswith(".jsonl")):
        raise ValueError(f"{name} must be a file that ends in .jsonl, got {shown(value)}")
    return value


def _check_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text, got {shown(value)}")
    return value


def _every(least: int) -> Callable[[str, Any], int]:
    return partial(checked_every, least=least)


_AXES = partial(Kind, check=_check_axes, read=_read_axes)
KINDS: dict[str, Kind] = {
    "rule": Kind("a number, or a rule such as zclip or 'skip_above=9 | norm=1'", _check_rule, write=_write_rule),
    "groups": Kind("rules of their own: 'head.* -> norm=1 ; ...'", _check_groups, _read_groups, _write_groups),
    "nonfinite": Kind(f"what an inf or NaN does: {', '.join(NONFINITE)}", partial(checked_choice, known=NONFINITE)),
    "check": Kind(f"when to compare ranks: {', '.join(WHEN)}", partial(checked_choice, known=WHEN)),
    "pipeline_group": Kind("mesh axis of the pipeline's stages, or none", _check_axis, _read_optional),
    "sharded": _AXES("plain parameters that differ from rank to rank: 'experts.*=ep'"),
    "replicated": _AXES("parameters that pipeline stages share: 'embed.*=pp'"),
    "details_every": Kind("tell of each tensor every so many steps, 0: never", _every(0), _read_count),
    "overlap": Kind("measure while backward() runs: true or false", _check_switch, _read_switch),
    "log": Kind("a file for the run's log, in JSON lines: FILE.jsonl, or none", _check_log, _read_optional),
    "log_every": Kind("log every so many steps", _every(1), _read_count),
    "log_prefix": Kind("what names of metrics begin with", _check_text),
}
