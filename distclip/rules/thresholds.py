"""The numbers that rules are given: checked when a rule is made, and looked up when they are schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Threshold = float | Callable[[int], float]
"""A number, or a function of the step (0, 1 ...) that returns one."""


def schedule_name(schedule: Callable[..., Any]) -> str:
    """What a schedule is called, the same on every rank (its ``repr`` holds an address)."""
    return str(getattr(schedule, "__qualname__", type(schedule).__qualname__))


def checked(name: str, value: object, *, above_zero: bool = False) -> float:
    """``value`` as a float that can serve as a threshold.

    Raises:
        ValueError: it is NaN or negative (or 0, where it must be above).
        TypeError: it is not a number.
    """
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, got {value!r}") from error
    if number > 0 or (number == 0 and not above_zero):
        return number
    raise ValueError(f"{name} must be {'above 0' if above_zero else 'at least 0'}, got {value!r}")


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
    raise ValueError(f"{name} must be at least 0 and below 1, got {value!r}")


def checked_every(name: str, value: Any, least: int) -> int:
    """``value`` as every how many steps; unlike ``checked_count`` takes no floats.

    Raises:
        ValueError: it is no int, or below ``least``.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number from {least} on, got {value!r}")
    return value


def checked_count(name: str, value: int, least: int = 1) -> int:
    """``value`` as a number of steps.

    Raises:
        ValueError: it is no whole number, or below ``least``.
    """
    if isinstance(value, bool) or int(value) != value or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(value)
