"""The numbers that rules are given: checked when a rule is made, and looked up when they are schedules."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from distclip.hints import shown

Threshold = float | Callable[[int], float]
"""A number, or a function of the step (0, 1 ...) that returns one."""

LARGEST_COUNT = 2**53
"""Up to here float64, in which rules count, knows every whole number."""


def schedule_name(schedule: Callable[..., Any]) -> str:
    """What a schedule is called, the same on every rank (its ``repr`` holds an address)."""
    return str(getattr(schedule, "__qualname__", type(schedule).__qualname__))


def as_number(name: str, value: object) -> float:
    """``value`` as a float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is an int that no float can hold.
    """
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        raise ValueError(f"{name} must be a number that a float can hold (or inf), got {shown(value)}") from None
    # RuntimeError: what tensors of several elements, or without data, say.
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a number, got {shown(value)}") from error


def checked(name: str, value: object, *, above_zero: bool = False) -> float:
    """``value`` as a float that can serve as a threshold.

    Raises:
        ValueError: it is NaN or negative (or 0, where it must be above).
        TypeError: it is not a number.
    """
    number = as_number(name, value)
    if number > 0 or (number == 0 and not above_zero):
        return number
    raise ValueError(f"{name} must be {'above 0' if above_zero else 'at least 0'}, got {shown(value)}")


def checked_choice(name: str, value: object, known: Sequence[str]) -> str:
    """``value`` as one of the names that are ``known``.

    Raises:
        ValueError: it is none of them.
    """
    # Asked for its type first: arrays answer == with arrays.
    if isinstance(value, str) and value in known:
        return value
    raise ValueError(f"{name} must be one of {', '.join(known)}, got {shown(value)}")


def checked_threshold(name: str, value: Threshold, *, above_zero: bool = False) -> Threshold:
    """As ``checked``; a schedule is looked at when its step comes."""
    return value if callable(value) else checked(name, value, above_zero=above_zero)


def threshold_at(name: str, value: Threshold, step: int, *, above_zero: bool = False) -> float:
    """The number that a threshold is in this step; errors as for ``checked``."""
    return checked(f"{name}({step})", value(step), above_zero=above_zero) if callable(value) else value


def checked_decay(name: str, value: float) -> float:
    """``value`` as the factor of a moving average.

    Raises:
        ValueError: it is not between 0 and 1 (1 excluded).
        TypeError: it is not a number.
    """
    if checked(name, value) < 1:
        return float(value)
    raise ValueError(f"{name} must be at least 0 and below 1, got {shown(value)}")


def checked_every(name: str, value: Any, least: int) -> int:
    """``value`` as every how many steps; unlike ``checked_count`` takes no floats.

    Raises:
        ValueError: it is no int, or below ``least``.
    """
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: what tensors without data say
        number = -1
    if number < least:
        raise ValueError(f"{name} must be a whole number from {least} on, got {shown(value)}")
    if number > LARGEST_COUNT:
        raise ValueError(f"{name} must be at most 2**53, got {shown(value)}")
    return number


def checked_count(name: str, value: object, least: int = 1, most: int = LARGEST_COUNT) -> int:
    """``value`` as a number of steps; a float that is whole will do.

    Raises:
        ValueError: it is no whole number, below ``least`` or above ``most``.
        TypeError: it is not a number.
    """
    number = as_number(name, value)
    if isinstance(value, bool | str) or not number.is_integer() or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {shown(value)}")
    if number > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(value)}")
    return int(number)


def checked_window(name: str, value: object, least: int = 1) -> int:
    """``value`` as a number of steps whose norms are all kept; errors as ``checked_count``."""
    return checked_count(name, value, least, most=2**24)
