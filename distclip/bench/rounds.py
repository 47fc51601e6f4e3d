"""Timing several ways in turns, and the ratios of what was timed.

A machine that others use is slow for a while and fast again. So every round runs every way once, each round in another
order, and a ratio is the median of the ratios of single rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles

Times = Mapping[str, Sequence[float]]
"""Seconds of each way, one number a round."""


def orders(names: Sequence[str], rounds: int) -> list[list[str]]:
    """In which order the ways run, round by round: in turn each is first, and each round turns back the other way."""
    found = []
    for place in range(rounds):
        start = place // 2 % len(names)
        turned = [*names[start:], *names[:start]]
        found.append(turned if place % 2 == 0 else turned[::-1])
    return found


def timed(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    before: Callable[[], object] = lambda: None,
    after: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Run every way once a round.

    Args:
        ways: what to run, by name.
        rounds: how often.
        before: runs before each way, outside its time.
        after: runs after each way, inside its time: what waits until a device has done it.
        clock: seconds.

    Returns:
        Seconds of each way, one number a round.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    for order in orders(list(ways), rounds):
        for name in order:
            before()
            start = clock()
            ways[name]()
            after()
            found[name].append(clock() - start)
    return found


def slowest(ranks: Sequence[Times]) -> dict[str, list[float]]:
    """Of the ranks' times, those of the slowest rank of each round."""
    return {name: [max(each) for each in zip(*(times[name] for times in ranks), strict=True)] for name in ranks[0]}


def ratios(times: Times, way: str, over: str, *, less: str | None = None, over_less: str | None = None) -> list[float]:
    """How many times as long one way takes as another, round by round.

    Args:
        times: of all ways.
        way: what is judged.
        over: what it is judged by.
        less: a way that is taken off ``way``, so that only what it adds counts.
        over_less: the same of ``over``. Rounds where nothing is left of it are left out: they have no ratio.
    """
    above = _extra(times, way, less)
    below = _extra(times, over, over_less)
    return [upper / lower for upper, lower in zip(above, below, strict=True) if lower > 0]


def middle(values: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    return median(values) if values else None


def quartiles(values: Sequence[float]) -> tuple[float | None, float | None]:
    """A quarter of the values is below the first, a quarter above the second; None of nothing."""
    if len(values) < 2:
        return (values[0], values[0]) if values else (None, None)
    first, _, third = quantiles(values, method="inclusive")
    return first, third


def _extra(times: Times, way: str, less: str | None) -> list[float]:
    if less is None:
        return list(times[way])
    return [whole - part for whole, part in zip(times[way], times[less], strict=True)]
