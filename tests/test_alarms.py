"""Each alarm speaks where it should, once, with numbers; and stays silent in a run where all is well."""

import math
import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distclip.alarms import (
    Alarm,
    ClipsOften,
    Exploding,
    Jump,
    NeverClips,
    NonFinite,
    OneTensor,
    Vanishing,
    default_alarms,
)
from distclip.record import Event, Record
from distclip.rules import parse


def records(
    norms: Iterable[float], threshold: float = math.inf, per_tensor: dict[str, float] | None = None
) -> list[Record]:
    return [
        Record(
            step,
            0.0,
            {
                "grad_norm": norm,
                "clip_threshold": threshold,
                "clipped": float(norm > threshold),
                "nonfinite": float(not math.isfinite(norm)),
            },
            per_tensor,
        )
        for step, norm in enumerate(norms, 1)
    ]


def first(alarm: Alarm, run: Iterable[Record]) -> Event | None:
    return next((event for record in run if (event := alarm.look(record)) is not None), None)


def noisy(count: int, around: float = 1.0) -> list[float]:
    generator = random.Random(0)
    return [around * math.exp(generator.gauss(0, 0.2)) for _ in range(count)]


def test_all_is_well() -> None:
    run = records(noisy(2000), threshold=1.3, per_tensor={"a": 1.0, "b": 2.0, "c": 1.5, "d": 1.2})
    for alarm in default_alarms():
        assert first(alarm, run) is None, alarm


def test_a_loss_scale_overflows_now_and_then() -> None:
    def overflows(count: int) -> list[Record]:
        metrics = {"grad_norm": math.inf, "nonfinite": 1.0, "skipped": 1.0}
        return [*[Record(step, 0.0, metrics) for step in range(1, count + 1)], *records(noisy(50))]

    assert first(NonFinite(), overflows(9)) is None
    event = first(NonFinite(), overflows(10))
    assert event is not None
    assert event.step == 10


@pytest.mark.parametrize(
    ("alarm", "run", "step", "message"),
    [
        (NonFinite(), records([1.0, math.nan, 1.0]), 2, "in 1 of the last 2 steps"),
        (NonFinite(count=3), records([math.inf, 1.0, math.inf, 1.0, math.inf]), 5, "in 3 of the last 5 steps"),
        (
            NonFinite(),
            records([math.nan], per_tensor={"a": 1.0, "b": math.nan, "c": math.inf}),
            1,
            "the first tensor with one: b",
        ),
        (Jump(), records([*noisy(30), 9.0]), 31, "the gradient norm jumped to 9; the 30 before were 1.0"),
        (Exploding(), records([1.2**step for step in range(40)]), 20, "1 to 31.9 within 20 steps, 1.20-fold a step"),
        (Vanishing(), records([*noisy(20), *[1e-6] * 30]), 40, "has vanished: 1e-06, where the first 20 steps had"),
        (Vanishing(), records([*noisy(20), *[0.0] * 30]), 40, "has vanished: 0, "),
        (ClipsOften(), records([2.0] * 200, threshold=1.0), 100, "100% of the last 100 steps were clipped"),
        (
            NeverClips(),
            records([2.0] * 1000, threshold=100.0),
            1000,
            "the threshold of 100 is idle, the largest norm was 2",
        ),
        (
            OneTensor(),
            records([2.0] * 9, per_tensor={"head": 100.0, "a": 1.0, "b": 1.0, "c": 1.0}),
            5,
            "head makes up 100% of the squared gradient norm",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Alarm) else "",
)
def test_speaks(alarm: Alarm, run: list[Record], step: int, message: str) -> None:
    event = first(alarm, run)
    assert event is not None
    assert event.step == step
    assert event.alarm == alarm.name
    assert message in event.message


@pytest.mark.parametrize(
    ("alarm", "run"),
    [
        (NonFinite(count=3, window=4), records([math.inf, 1.0, 1.0, 1.0] * 5)),
        (Jump(), records([*noisy(10), 9.0])),
        (Jump(), records([1.0] * 30 + [1.5])),
        (Jump(), records([*noisy(30), math.inf])),
        # Larger, but not steadily: one step up, and a slow rise.
        (Exploding(), records([*noisy(15), *noisy(15, 20.0)])),
        (Exploding(), records([1.05**step for step in range(40)])),
        (Vanishing(), records([*noisy(20), *([1e-6] * 19 + [1.0]) * 3])),
        (ClipsOften(), records([2.0] * 50, threshold=1.0)),
        (ClipsOften(), records([2.0, 0.5] * 200, threshold=1.0)),
        (NeverClips(), records([2.0] * 5000)),
        (NeverClips(), records(([2.0] * 999 + [200.0]) * 3, threshold=100.0)),
        (OneTensor(), records([2.0] * 9, per_tensor={"head": 100.0, "a": 1.0})),
        (OneTensor(), records([2.0] * 9)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Alarm) else "",
)
def test_stays_silent(alarm: Alarm, run: list[Record]) -> None:
    assert first(alarm, run) is None


@given(st.lists(st.floats(min_value=0) | st.just(math.nan), max_size=150), st.floats(0, 1e300))
def test_no_run_breaks_an_alarm(norms: list[float], threshold: float) -> None:
    tensors = dict(zip("abcdef", norms, strict=False))
    run = records(norms, threshold, tensors or None)
    for alarm in default_alarms():
        first(alarm, run)


@pytest.mark.parametrize(
    ("rule", "alone"),
    [
        ("global_norm=1", False),
        ("zclip", False),
        ("skip_on_spike | global_norm=1", False),
        ("skip_on_spike", True),
        ("agc=0.01", True),
        ("value=1", True),
        ("norm=1", True),
        ("normalize=1", True),
        ("a.* -> norm=1 ; * -> zclip", True),
    ],
)
def test_thresholds_that_are_not_of_the_global_norm_raise_no_alarm(rule: str, alone: bool) -> None:
    names = {alarm.name for alarm in default_alarms(parse(rule))}
    assert ({"clips_often", "never_clips"} & names == set()) is alone
    assert {"nonfinite", "jump", "exploding", "vanishing", "one_tensor"} <= names


def test_a_jump_among_norms_whose_squares_leave_float64() -> None:
    event = first(Jump(), records([*noisy(30, around=1e300), 1e302]))
    assert event is not None
    assert event.values["mean"] == pytest.approx(1e300, rel=0.2)
