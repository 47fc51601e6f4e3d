"""The terminal: a live panel with the norms as a sparkline."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from distclip.hints import optional
from distclip.record import Event, Record
from distclip.sinks.base import Sink

_BARS = "▁▂▃▄▅▆▇█"


class Terminal(Sink):
    """A panel that is drawn anew with every batch of records; where the output is no terminal, a line a batch.

    Args:
        console: a ``rich.console.Console``; None for one on stderr, where it does not mix with what a script prints.
        width: how many steps the sparkline shows.
    """

    def __init__(self, console: Any = None, width: int = 60) -> None:
        self._console = console
        self._records: deque[Record] = deque(maxlen=width)
        self._rule = ""
        self._alarms: list[str] = []
        self._live: Any = None
        self._skipped = 0

    def start(self, run: Mapping[str, Any]) -> None:
        optional("rich", "cli")
        from rich.console import Console
        from rich.live import Live

        self._rule = run["rule"]
        self._console = self._console or Console(stderr=True)
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()

    def write(self, records: Sequence[Record]) -> None:
        self._records.extend(records)
        self._skipped += sum(record.is_set("skipped") for record in records)
        if self._live is None:
            self._console.print(" ".join(self._facts()), highlight=False, markup=False, soft_wrap=True)
        else:
            self._live.update(self._panel(), refresh=True)

    def event(self, event: Event) -> None:
        self._alarms.append(f"step {event.step}: {event.message}")
        if self._live is not None:
            self._live.update(self._panel(), refresh=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _facts(self) -> list[str]:
        last = self._records[-1]
        facts = [f"step {last.step}", f"norm {last.norm:.4g}"]
        known = {"clip_threshold": "threshold", "clip_coef": "coefficient", "loss": "loss"}
        facts += [f"{name} {last.metrics[key]:.4g}" for key, name in known.items() if key in last.metrics]
        facts.append(f"clipped {last.metrics.get('clip_fraction', 0.0):.0%}")
        return [*facts, f"skipped {self._skipped}"] if self._skipped else facts

    def _panel(self) -> Any:
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        lines = [Text("  ".join(self._facts())), self._sparkline()]
        lines += [Text(alarm, style="yellow") for alarm in self._alarms[-3:]]
        return Panel(Group(*lines), title=Text(f"gradient norm, {self._rule}"), title_align="left", expand=False)

    def _sparkline(self) -> Any:
        from rich.text import Text

        text = Text()
        bars = sparkline([record.norm for record in self._records])
        for record, bar in zip(self._records, bars, strict=True):
            style = "red" if record.is_set("skipped") or record.is_set("nonfinite") else ""
            text.append(bar, style=style or ("yellow" if record.is_set("clipped") else "green"))
        return text


def sparkline(norms: Sequence[float]) -> str:
    """A bar a norm, on a logarithmic scale from the smallest to the largest; ``x`` where it is not finite."""
    logs = [math.log(norm) if 0 < norm < math.inf else math.nan for norm in norms]
    known = [value for value in logs if not math.isnan(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    # Within a factor of 1.5 a run is flat.
    spread = max(high - low, math.log(1.5))

    def bar(norm: float, value: float) -> str:
        if math.isnan(value):
            return _BARS[0] if norm == 0 else "x"
        return _BARS[min(int((value - low) / spread * len(_BARS)), len(_BARS) - 1)]

    return "".join(map(bar, norms, logs))
