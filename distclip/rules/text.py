"""Rules as short texts, for command lines and files of settings."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from itertools import accumulate
from typing import Any

from distclip.hints import closest, shown
from distclip.rules.adaptive import AdaptiveGradientClipping, CentralizeGradient
from distclip.rules.base import Rule
from distclip.rules.compose import Chain, PerGroup
from distclip.rules.history import AutoClip, QuantileClip, ZClip
from distclip.rules.norm import ClipByAverageNorm, ClipByBlockRMS, ClipByGlobalNorm, ClipByNorm, NormalizeGradient
from distclip.rules.skip import SkipAbove, SkipOnSpike
from distclip.rules.spam import StableSPAM
from distclip.rules.tensor_history import AdaGC, EMARatioClip
from distclip.rules.thresholds import schedule_name
from distclip.rules.value import ClipByValue

NAMES: dict[str, type[Rule]] = {
    "global_norm": ClipByGlobalNorm,
    "norm": ClipByNorm,
    "value": ClipByValue,
    "average_norm": ClipByAverageNorm,
    "block_rms": ClipByBlockRMS,
    "agc": AdaptiveGradientClipping,
    "normalize": NormalizeGradient,
    "centralize": CentralizeGradient,
    "autoclip": AutoClip,
    "quantile": QuantileClip,
    "zclip": ZClip,
    "adagc": AdaGC,
    "ema_ratio": EMARatioClip,
    "stable_spam": StableSPAM,
    "skip_above": SkipAbove,
    "skip_on_spike": SkipOnSpike,
}

# What a parsed rule remembers of how it was written.
_WRITTEN = "_written"
# Levels of parentheses: nobody reads more, and Python's stack has an end.
_DEEPEST = 20


def parse(text: str) -> Rule:
    """The rule that ``text`` describes; ``str(rule)`` gives the text back.

    ``name=value,option=value ...``: the value after the name is the rule's first argument, and can be left out where
    that has a default. A pair is ``lo:hi``, several patterns are ``a.*:b.*``. ``rule | rule`` is a ``Chain``,
    ``pattern -> rule ; pattern -> rule`` a ``PerGroup``; parentheses group.

    Example:
        >>> parse("global_norm=1.0,norm_type=inf")
        ClipByGlobalNorm(max_norm=1.0, norm_type=inf)
        >>> parse("value=-0.1:0.5")
        ClipByValue(clip_value=(-0.1, 0.5))
        >>> parse("agc=0.01,exclude=head.*")
        AdaptiveGradientClipping(clip_factor=0.01, eps=0.001, exclude=('head.*',))
        >>> print(parse("skip_on_spike,sigma=6 | global_norm=1.0"))
        skip_on_spike,sigma=6 | global_norm=1.0

    Raises:
        ValueError: an unknown rule or option (the closest known one is named), one that stands twice, a value that
            does not fit, or parentheses in more than 20 levels.
        TypeError: ``text`` is no text.
    """
    if not isinstance(text, str):
        raise TypeError(f"a rule must be written as a text, got {shown(text)}")
    if max(_depths(text)) > _DEEPEST:
        raise ValueError(f"rule {shown(text)}: parentheses in more than {_DEEPEST} levels")
    rule = _parsed(text)
    setattr(rule, _WRITTEN, text.strip())
    return rule


def text_of(rule: Rule) -> str:
    """A text that ``parse`` makes the same rule of; of a user's own rule, its ``repr``.

    A schedule stands as its name in angle brackets, which ``parse`` cannot read.
    """
    written = getattr(rule, _WRITTEN, None)
    if written is not None and _parsed(written) == rule:
        return str(written)
    if isinstance(rule, Chain):
        return " | ".join(_bracketed(part, "|;") for part in rule.rules)
    if isinstance(rule, PerGroup):
        return " ; ".join(f"{':'.join(key)} -> {_bracketed(part, ';')}" for key, part in rule.rules.items())
    name = next((name for name, known in NAMES.items() if type(rule) is known), None)
    return repr(rule) if name is None else _simple_text(name, rule)


def _parsed(text: str) -> Rule:
    text = _unwrapped(text.strip())
    groups = [part for part in _split(text, ";") if part.strip()]
    if groups and len(_split(groups[0], "->")) > 1:
        chosen: dict[tuple[str, ...], Rule] = {}
        for patterns, rule in [_group(text, part) for part in groups]:
            if patterns in chosen:
                raise ValueError(f"rule {text!r}: {':'.join(patterns)!r} stands twice")
            chosen[patterns] = rule
        return PerGroup(chosen)
    chain = _split(text, "|")
    if len(chain) > 1:
        return Chain([_parsed(part) for part in chain])
    return _simple(text)


def _group(text: str, part: str) -> tuple[tuple[str, ...], Rule]:
    patterns, *rest = _split(part, "->")
    if len(rest) != 1:
        raise ValueError(f"rule {text!r}: {part.strip()!r} must be 'pattern -> rule'")
    return tuple(pattern.strip() for pattern in patterns.split(":")), _parsed(rest[0])


def _simple(text: str) -> Rule:
    head, *options = text.split(",")
    name, equals, value = (part.strip() for part in head.partition("="))
    rule = NAMES.get(name)
    if rule is None:
        raise ValueError(f"rule {text!r}: unknown name {name!r}{closest(name, NAMES)}")
    known = {field.name: field for field in fields(rule)}  # type: ignore[arg-type]  # all of NAMES are dataclasses
    arguments: dict[str, Any] = {}
    first = next(iter(known.values()), None)
    if first is None and equals:
        raise ValueError(f"rule {text!r}: {name} takes no value, got {value!r}")
    if first is not None and (equals or first.default is MISSING):
        arguments[first.name] = _value(text, first, value)
    for option in options:
        key, _, value = (part.strip() for part in option.partition("="))
        if key not in known:
            raise ValueError(f"rule {text!r}: unknown option {key!r}{closest(key, known)}")
        if key in arguments:
            raise ValueError(f"rule {text!r}: {key!r} stands twice")
        arguments[key] = _value(text, known[key], value)
    try:
        return rule(**arguments)
    except TypeError as error:
        raise ValueError(f"rule {text!r}: {error}") from None


def _value(text: str, field: Field[Any], value: str) -> object:
    """What a text means for a field, by the field's type."""
    kind = str(field.type)
    if value == "none" and kind.endswith("| None"):
        return None
    if kind == "bool":
        if value not in ("true", "false"):
            raise ValueError(f"rule {text!r}: {field.name} must be true or false, got {value!r}")
        return value == "true"
    if kind == "str":
        return value
    if kind.startswith("Patterns"):
        return tuple(value.split(":"))
    return _number(text, value)


def _number(text: str, value: str) -> float | tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in value.split(":"))
    except ValueError:
        raise ValueError(f"rule {text!r}: {value!r} is not a number (or lo:hi)") from None
    return numbers[0] if len(numbers) == 1 else numbers


def _simple_text(name: str, rule: Rule) -> str:
    known = fields(rule)  # type: ignore[arg-type]  # all of NAMES are dataclasses
    changed = [field.name for field in known if getattr(rule, field.name) != field.default]
    head, *options = [f"{key}={_told(getattr(rule, key))}" for key in changed] or [name]
    if changed and changed[0] == known[0].name:
        return ",".join([f"{name}={head.partition('=')[2]}", *options])
    return ",".join([name, head, *options] if changed else [name])


def _told(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ":".join(map(_told, value))
    return f"<{schedule_name(value)}>" if callable(value) else str(value)


def _bracketed(rule: Rule, separators: str) -> str:
    text = str(rule)
    return f"({text})" if any(len(_split(text, each)) > 1 for each in (*separators, "->")) else text


def _split(text: str, separator: str) -> list[str]:
    """``text`` at each separator that stands outside of parentheses."""
    parts, depth, start, place = [], 0, 0, 0
    while place < len(text):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0 and text.startswith(separator, place):
            parts.append(text[start:place])
            place = start = place + len(separator)
        else:
            place += 1
    return [*parts, text[start:]]


def _unwrapped(text: str) -> str:
    """Without parentheses around all of it."""
    inner = text[1:-1]
    while text.startswith("(") and text.endswith(")") and _balanced(inner):
        text = inner.strip()
        inner = text[1:-1]
    return text


def _depths(text: str) -> list[int]:
    """How many parentheses are open before the first letter, and after each."""
    return list(accumulate(((letter == "(") - (letter == ")") for letter in text), initial=0))


def _balanced(text: str) -> bool:
    depths = _depths(text)
    return min(depths) == depths[-1] == 0
