"""What should make a user look: each alarm follows a run's records and speaks up once."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median, pstdev
from typing import ClassVar

from distclip.record import Event, Record
from distclip.report import dominant
from distclip.rules.base import Rule
from distclip.rules.norm import NormalizeGradient
from distclip.rules.thresholds import checked, checked_count


class Alarm:
    """Base of all alarms. A subclass has a ``name`` and a ``look`` that tells what is wrong, if anything."""

    name: ClassVar[str]

    def look(self, record: Record) -> Event | None:
        """Called for every record in order; the first event that is returned is the last call."""
        raise NotImplementedError(f"{type(self).__name__} must define look(record)")

    def event(self, record: Record, message: str, **values: float) -> Event:
        """An event of this alarm."""
        return Event(record.step, self.name, message, values)


@dataclass
class NonFinite(Alarm):
    """Gradients held an inf or NaN in ``count`` of the last ``window`` steps.

    Steps that were skipped for it, as a GradScaler does as a matter of course, count from the ``skipped``-th on.
    """

    count: int = 1
    window: int = 100
    skipped: int = 10
    name = "nonfinite"
    _found: deque[bool] = field(init=False, repr=False)
    _stepped: deque[bool] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.count, self.window = checked_count("count", self.count), checked_count("window", self.window)
        self.skipped = checked_count("skipped", self.skipped)
        self._found, self._stepped = deque(maxlen=self.window), deque(maxlen=self.window)

    def look(self, record: Record) -> Event | None:
        self._found.append(record.is_set("nonfinite"))
        self._stepped.append(record.is_set("nonfinite") and not record.is_set("skipped"))
        if sum(self._stepped) < self.count and sum(self._found) < max(self.count, self.skipped):
            return None
        where = ""
        if record.per_tensor is not None:
            first = next((name for name, norm in record.per_tensor.items() if not math.isfinite(norm)), None)
            where = f" (the first tensor with one: {first})" if first else ""
        return self.event(
            record,
            f"a gradient held an inf or NaN in {sum(self._found)} of the last {len(self._found)} steps{where}. "
            "nonfinite='skip' leaves such steps out on all ranks; lower the learning rate, or look at the data and the "
            "loss of this step.",
            count=sum(self._found),
        )


@dataclass
class Jump(Alarm):
    """The norm lies more than ``sigma`` standard deviations above the mean of the last ``window`` norms."""

    sigma: float = 6.0
    window: int = 50
    min_history: int = 20
    name = "jump"
    _norms: deque[float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.sigma = checked("sigma", self.sigma)
        self.min_history = checked_count("min_history", self.min_history, 2)
        self._norms = deque(maxlen=checked_count("window", self.window, 2))

    def look(self, record: Record) -> Event | None:
        norm, before = record.norm, list(self._norms)
        if not math.isfinite(norm):
            return None
        self._norms.append(norm)
        if len(before) < self.min_history:
            return None
        # In parts of the largest: squares of float64 norms may leave float64.
        largest = max(before) or 1.0
        parts = [norm / largest for norm in before]
        mean, deviation = fmean(parts) * largest, pstdev(parts) * largest
        if norm <= mean + self.sigma * deviation or norm <= 2 * mean:
            return None
        return self.event(
            record,
            f"the gradient norm jumped to {norm:.4g}; the {len(before)} before were {mean:.4g} +- {deviation:.2g}. "
            "Look at this step's batch. SkipOnSpike or ZClip keep such steps from doing harm.",
            norm=norm,
            mean=mean,
            std=deviation,
        )


@dataclass
class Exploding(Alarm):
    """The norm has grown exponentially for ``window`` steps, and ``factor``-fold in all."""

    factor: float = 10.0
    window: int = 20
    name = "exploding"
    _norms: deque[float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.factor = checked("factor", self.factor)
        self._norms = deque(maxlen=checked_count("window", self.window, 3))

    def look(self, record: Record) -> Event | None:
        if not math.isfinite(record.norm) or record.norm <= 0:
            return None
        self._norms.append(record.norm)
        logs = [math.log(norm) for norm in self._norms]
        if len(logs) < self.window or logs[-1] - logs[0] < math.log(self.factor):
            return None
        rising = sum(after > before for before, after in pairwise(logs)) / (len(logs) - 1)
        if rising < 0.75 or _straightness(logs) < 0.8:
            return None
        growth = math.exp((logs[-1] - logs[0]) / (len(logs) - 1))
        return self.event(
            record,
            f"the gradient norm is growing exponentially: {self._norms[0]:.3g} to {self._norms[-1]:.3g} within "
            f"{len(logs)} steps, {growth:.2f}-fold a step. Training is about to diverge: lower the learning rate, or "
            "clip at a norm from before.",
            growth=growth,
            norm=self._norms[-1],
        )


@dataclass
class Vanishing(Alarm):
    """The norm has stayed below ``share`` of its median over the first ``window`` steps, for ``window`` steps."""

    share: float = 1e-4
    window: int = 20
    name = "vanishing"
    _first: list[float] = field(init=False, repr=False, default_factory=list)
    _below: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        self.share, self.window = checked("share", self.share), checked_count("window", self.window)

    def look(self, record: Record) -> Event | None:
        if not math.isfinite(record.norm):
            return None
        if len(self._first) < self.window:
            self._first.append(record.norm)
            return None
        usual = median(self._first)
        self._below = self._below + 1 if record.norm < self.share * usual or record.norm == 0 else 0
        if self._below < self.window:
            return None
        return self.event(
            record,
            f"the gradient norm has vanished: {record.norm:.3g}, where the first {self.window} steps had {usual:.3g}. "
            "Look for saturated activations, a learning rate that ran out, or a loss cut off from the parameters.",
            norm=record.norm,
            usual=usual,
        )


@dataclass
class ClipsOften(Alarm):
    """More than ``share`` of the last ``window`` steps were clipped: the threshold sets the step size."""

    share: float = 0.9
    window: int = 100
    name = "clips_often"
    _clipped: deque[bool] = field(init=False, repr=False)
    _norms: deque[float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.share = checked("share", self.share)
        self._clipped = deque(maxlen=checked_count("window", self.window))
        self._norms = deque(maxlen=self.window)

    def look(self, record: Record) -> Event | None:
        self._clipped.append(record.is_set("clipped"))
        if math.isfinite(record.norm):
            self._norms.append(record.norm)
        share = sum(self._clipped) / len(self._clipped)
        if len(self._clipped) < self.window or share <= self.share:
            return None
        usual = median(self._norms or [math.nan])
        return self.event(
            record,
            f"{share:.0%} of the last {self.window} steps were clipped: the threshold is too low to catch only "
            f"outliers, and scales the learning rate instead. The median norm was {usual:.3g}; "
            "`distclip suggest` names thresholds.",
            share=share,
        )


@dataclass
class NeverClips(Alarm):
    """None of the last ``window`` steps was clipped or skipped: the threshold is idle."""

    window: int = 1000
    name = "never_clips"
    _since: int = field(init=False, repr=False, default=0)
    _largest: float = field(init=False, repr=False, default=0.0)

    def __post_init__(self) -> None:
        self.window = checked_count("window", self.window)

    def look(self, record: Record) -> Event | None:
        threshold = record.metrics.get("clip_threshold", math.inf)
        idle = not record.is_set("clipped") and not record.is_set("skipped") and math.isfinite(threshold)
        self._since = self._since + 1 if idle else 0
        self._largest = max(self._largest, record.norm) if idle and math.isfinite(record.norm) else 0.0
        if self._since < self.window:
            return None
        return self.event(
            record,
            f"none of the last {self.window} steps was clipped: the threshold of {threshold:.3g} is idle, the largest "
            f"norm was {self._largest:.3g}. A spike must be larger than the threshold to be stopped; `distclip "
            "suggest` names lower ones.",
            largest=self._largest,
            threshold=threshold,
        )


@dataclass
class OneTensor(Alarm):
    """One tensor makes up more than ``share`` of the squared norm in ``count`` measured steps one after the other."""

    share: float = 0.9
    count: int = 5
    name = "one_tensor"
    _last: str = field(init=False, repr=False, default="")
    _times: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        self.share, self.count = checked("share", self.share), checked_count("count", self.count)

    def look(self, record: Record) -> Event | None:
        if record.per_tensor is None or len(record.per_tensor) < 4:
            return None
        leading = dominant(record.per_tensor, 1)
        if not leading or leading[0][1] <= self.share:
            self._times = 0
            return None
        ((name, share),) = leading
        self._times = self._times + 1 if name == self._last else 1
        self._last = name
        if self._times < self.count:
            return None
        return self.event(
            record,
            f"{name} makes up {share:.0%} of the squared gradient norm: clipping by the global norm scales all other "
            f"tensors for its sake. Give it a rule of its own ({{{name!r}: ..., '*': ...}}), or clip each tensor "
            "(ClipByNorm, AGC).",
            share=share,
        )


def default_alarms(rule: Rule | None = None) -> list[Alarm]:
    """One of each, as a Monitor has them; without those on thresholds where the rule's are not of the global norm."""
    found: list[Alarm] = [NonFinite(), Jump(), Exploding(), Vanishing()]
    if rule is None or _holds_global_norm(rule):
        found += [ClipsOften(), NeverClips()]
    # Shares are those of squares.
    return [*found, OneTensor()] if rule is None or rule.stages[0].norm_type == 2.0 else found


def _holds_global_norm(rule: Rule) -> bool:
    """Whether being clipped often, or never, tells of the threshold: not of rules of elements, rows or single tensors,
    whose work that is, nor of those that only skip spikes."""
    closer = ("needs_per_tensor", "needs_tensors", "needs_units", "needs_means", "needs_extremes", "reshapes")
    stages = [stage for stage in rule.stages if not stage.may_skip]
    if any(isinstance(stage, NormalizeGradient) for stage in stages):
        return False  # which scales every step
    return bool(stages) and not any(getattr(stage, need) for stage in stages for need in closer)


def _straightness(values: list[float]) -> float:
    """The share of the variance that a straight line explains (R squared)."""
    middle, mean = (len(values) - 1) / 2, fmean(values)
    spread = math.fsum((place - middle) ** 2 for place in range(len(values)))
    slope = math.fsum((place - middle) * (value - mean) for place, value in enumerate(values)) / spread
    variance = math.fsum((value - mean) ** 2 for value in values)
    return 0.0 if variance == 0 else slope**2 * spread / variance
