"""Watching a run: what clips did goes to sinks and alarms, and nothing waits for the device until they are asked.

A clip's report stays a handful of 0-d tensors in a list. Every ``log_every`` clips all of them become numbers at once,
with one copy from the device.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.alarms import Alarm, default_alarms
from distclip.clipper import GradClipper
from distclip.hints import checked_flag, several, shown
from distclip.layout.dtensor import is_dtensor
from distclip.record import RESERVED, Event, Record
from distclip.report import ClipReport, metrics_of, read
from distclip.rules.thresholds import as_number, checked_count
from distclip.sinks.base import Sink, as_sink
from distclip.warning import warn

# Steps over which clip_fraction is taken.
_FRACTION = 100


class AlarmWarning(UserWarning):
    """Something about the gradients should make a user look."""


@dataclass
class _Waiting:
    """A clip that nobody has read yet."""

    step: int
    time: float
    report: ClipReport
    values: dict[str, Tensor | float] = field(default_factory=dict)


class Monitor:
    """Sends what a clipper does to sinks, and speaks up where it should make a user look.

    Every rank may have one; those that are not the main process do nothing. Also a context manager.

    Args:
        clipper: whose clips are watched, wherever they happen. ``GradClipper(details_every=...)`` adds norms of single
            tensors.
        sinks: where records go: Sinks, paths that end in ``.jsonl``, functions of (step, metrics).
        log_every: sinks and alarms see clips this many at a time; the device is waited for as often.
        prefix: what names of metrics begin with where trackers show them.
        alarms: None for one of each kind that makes sense of the rule (``distclip.alarms``), () for none. Each
            speaks once, as an ``AlarmWarning`` and an event in every sink.
        main: whether this process writes; None: rank 0 does.

    Raises:
        ValueError: ``log_every`` is below 1, or a path of another kind.
        TypeError: an argument, a sink or an alarm is of another type.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> clipper = GradClipper(model, 1.0)
        >>> with Monitor(clipper, [lambda step, metrics: print(step, metrics["train/grad_norm"])]):
        ...     model(torch.tensor([[3.0, 4.0]])).sum().backward()
        ...     report = clipper.clip()
        1 5.0
    """

    def __init__(
        self,
        clipper: GradClipper,
        sinks: Iterable[Sink | Any] = (),
        *,
        log_every: int = 10,
        prefix: str = "train/",
        alarms: Iterable[Alarm] | None = None,
        main: bool | None = None,
    ) -> None:
        if not isinstance(clipper, GradClipper):
            raise TypeError(f"clipper must be a GradClipper, got {shown(clipper)}")
        if not isinstance(prefix, str):
            raise TypeError(f"prefix must be a text, got {shown(prefix)}")
        if isinstance(sinks, str | os.PathLike) or not several(sinks):
            raise TypeError(f"sinks must be a list of Sinks, paths or functions, got {shown(sinks)}")
        if alarms is not None and not several(alarms):
            raise TypeError(f"alarms must be a list of objects of distclip.alarms, got {shown(alarms)}")
        self.log_every = checked_count("log_every", log_every)
        self._main = (not dist.is_initialized() or dist.get_rank() == 0) if main is None else checked_flag("main", main)
        self._sinks = [as_sink(sink) for sink in sinks]
        self._alarms = default_alarms(clipper.rule) if alarms is None else list(alarms)
        self._waiting: list[_Waiting] = []
        self._clipped: deque[bool] = deque(maxlen=_FRACTION)
        for alarm in self._alarms:
            if not isinstance(alarm, Alarm):
                raise TypeError(f"alarms must hold objects of distclip.alarms, got {shown(alarm)}")
        self._rule = clipper.rule
        self._prefix = prefix
        self._started = False
        self._process = os.getpid()
        self._handle = clipper.register_report_hook(self._after) if self._main else None
        # At the end of the process, or of the clipper, if nobody closes it. Nothing here refers to that.
        self._finalizer = weakref.finalize(clipper, self.close) if self._main else None

    def log(self, **values: Tensor | float) -> None:
        """Add numbers (``loss``, ``lr``, ...) to the record of the latest clip. Tensors are not waited for.

        Raises:
            ValueError: a tensor of several numbers; a name that records have already.
            TypeError: a value that is no number; a DTensor that is not replicated, which one rank alone cannot read.
        """
        # Before asking whether this process writes: all ranks are to fail alike.
        checked = {name: _value(name, value) for name, value in values.items()}
        if self._waiting:
            self._waiting[-1].values |= checked

    def flush(self) -> None:
        """Hand all that waits to sinks and alarms now. Waits for the device."""
        records = self._read() if os.getpid() == self._process else []
        if not records:
            return
        if not self._started:
            self._started = True
            self._to_sinks(lambda sink: sink.start(self._run()))
            # What is registered last ends first: before the trackers, which have begun by now, close their runs.
            atexit.register(self.close)
        self._to_sinks(lambda sink: sink.write(records))
        events = self._events(records)
        # All of them first: warnings may be errors.
        for event in events:
            self._to_sinks(lambda sink, event=event: sink.event(event))  # type: ignore[misc]
        for event in events:
            warn(f"step {event.step}: {event.message}", AlarmWarning)

    def close(self) -> None:
        """Flush, and close the sinks. Called at the end of the clipper or the process if nobody does."""
        if os.getpid() != self._process:
            return  # a fork: what waits, and the sinks, are its parent's
        if self._handle is not None:
            self._handle.remove()
        try:
            self.flush()
        finally:
            if self._started:
                self._to_sinks(lambda sink: sink.close())
            self._sinks = []
            atexit.unregister(self.close)
            if self._finalizer is not None:
                self._finalizer.detach()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _after(self, clipper: GradClipper, report: ClipReport, loss: Tensor | None) -> None:
        if os.getpid() != self._process:
            return  # a fork that clips a model of its own: the log is its parent's
        # Before, not after: what log() says of the latest clip is to be in its record.
        if len(self._waiting) >= self.log_every:
            self.flush()
        self._rule = clipper.rule
        self._waiting.append(_Waiting(clipper.steps, time.time(), report, _loss(loss)))

    def _read(self) -> list[Record]:
        """All that waits, as numbers, with one wait for the device."""
        waiting, self._waiting = self._waiting, []
        told = read([each.report for each in waiting])
        values = _numbers([each.values for each in waiting])
        records = []
        for each, numbers, added in zip(waiting, told, values, strict=True):
            self._clipped.append(numbers["clipped"])
            metrics = metrics_of(numbers) | {"clip_fraction": sum(self._clipped) / len(self._clipped)} | added
            records.append(Record(each.step, each.time, metrics, numbers.get("per_tensor")))
        return records

    def _events(self, records: list[Record]) -> list[Event]:
        found = []
        for record in records:
            for alarm in list(self._alarms):
                try:
                    event = alarm.look(record)
                except Exception as error:  # whatever an alarm does, training goes on
                    self._alarms.remove(alarm)
                    warn(f"{type(alarm).__name__} failed and watches no more: {type(error).__name__}: {error}")
                    continue
                if event is not None:
                    self._alarms.remove(alarm)
                    found.append(event)
        return found

    def _run(self) -> Mapping[str, Any]:
        from distclip import __version__

        return {
            "time": time.time(),
            "version": __version__,
            "torch": torch.__version__,
            "rule": str(self._rule),
            "prefix": self._prefix,
            "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        }

    def _to_sinks(self, call: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:  # whatever a sink does, training goes on
                self._sinks.remove(sink)
                with contextlib.suppress(Exception):  # it may hold a file
                    sink.close()
                warn(f"{type(sink).__name__} failed and gets no more records: {type(error).__name__}: {error}")


def _value(name: str, value: Any) -> Tensor | float:
    """What ``log`` was given, as it is now: a script may add to its tensor, or a CUDA graph write to it, before it is
    read."""
    if name in RESERVED:
        raise ValueError(f"log({name}=...): every record has a {name!r} of its own; take another name")
    if not isinstance(value, Tensor):
        return as_number(f"log({name}=...)", value)
    if is_dtensor(value):
        if not all(placement.is_replicate() for placement in value.placements):
            raise TypeError(
                f"log({name}=...) got a DTensor {value.placements}, which one rank alone cannot read: pass "
                f"{name}.full_tensor()"
            )
        value = value.to_local()
    if value.numel() != 1:
        raise ValueError(f"log({name}=...) takes single numbers, got a tensor of shape {tuple(value.shape)}")
    if value.is_complex() or value.is_meta or value.layout != torch.strided:
        # Else the error would come from a later flush, in the middle of training.
        raise TypeError(f"log({name}=...) takes real numbers, got a {value.layout} {value.dtype} on {value.device}")
    number: Tensor = value.detach().clone()
    return number


def _loss(loss: Tensor | None) -> dict[str, Tensor | float]:
    """What was passed to ``clip(loss=...)``, where this rank can read it alone."""
    try:
        return {} if loss is None else {"loss": _value("loss", loss)}
    except TypeError:
        return {}


def _numbers(given: list[dict[str, Tensor | float]]) -> list[dict[str, float]]:
    tensors = [value for values in given for value in values.values() if isinstance(value, Tensor)]
    device = tensors[-1].device if tensors else None
    read_out = iter(
        torch.stack([each.to(device, torch.float64).view(()) for each in tensors]).tolist() if tensors else []
    )
    return [
        {name: next(read_out) if isinstance(value, Tensor) else value for name, value in values.items()}
        for values in given
    ]
