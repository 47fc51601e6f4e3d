"""What ``distclip check`` tells."""

from __future__ import annotations

import os
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distclip.check.facts import Facts, Finding
from distclip.check.layouts import clips, collectives, layout_of
from distclip.check.read import read
from distclip.check.traps import TRAPS
from distclip.config import ClipConfig

_WIDTH = 110


@dataclass(frozen=True)
class Checked:
    """A config, as distclip understands it. Printed, a few lines to read."""

    path: str
    kind: str
    """Accelerate or DeepSpeed."""
    starts: str
    layout: str
    """The layout that distclip will see."""
    collectives: int
    """All-reduces that a clip costs."""
    clips: str
    """What clips while the script does nothing about it."""
    settings: dict[str, Any]
    """distclip's own, from its file and the environment."""
    findings: tuple[Finding, ...]

    @property
    def works(self) -> bool:
        """Whether there is no finding of level error."""
        return all(finding.level != "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "findings": [asdict(finding) for finding in self.findings], "works": self.works}

    def __str__(self) -> str:
        many = "no collective" if self.collectives == 0 else "one all-reduce"
        head = {
            "config": f"{self.path} ({self.kind})",
            "starts": self.starts,
            "layout": f"{self.layout}; {many} a clip",
            "clips": self.clips,
            "distclip": _told(self.settings),
        }
        lines = [*(f"{name:<12}{text}" for name, text in head.items()), ""]
        for finding in self.findings:
            text = f"{finding.key}: {finding.message}" if finding.key else finding.message
            lines += textwrap.wrap(
                text, _WIDTH, initial_indent=f"{finding.level:<12}", subsequent_indent=" " * 12, break_long_words=False
            )
        return "\n".join([*lines, *([] if self.findings else ["Nothing amiss."])])


def check_config(path: str | os.PathLike[str]) -> Checked:
    """Read a config of Accelerate (YAML, JSON) or DeepSpeed (JSON), and find what it means for clipping.

    Starts nothing.

    Raises:
        ValueError: the file, or distclip's own settings, cannot be read.
        ImportError: a YAML file without PyYAML.
    """
    facts = read(Path(path))
    return Checked(
        str(path),
        facts.kind,
        _starts(facts),
        layout_of(facts),
        collectives(facts),
        clips(facts),
        ClipConfig.load().to_dict(),
        tuple(finding for trap in TRAPS for finding in trap(facts)),
    )


def _starts(facts: Facts) -> str:
    count = "the launcher's number of" if facts.processes is None else str(facts.processes)
    processes = f"{count} process{'' if facts.processes == 1 else 'es'}"
    machines = f" on {facts.machines} machines" if facts.machines > 1 else ""
    precision = "float32" if facts.precision == "no" else facts.precision
    return f"{processes}{machines}, {'CPU' if facts.cpu else 'accelerators'}, {precision}"


def _told(settings: dict[str, Any]) -> str:
    default = ClipConfig().to_dict()
    changed = {name: value for name, value in settings.items() if value != default[name] and name != "rule"}
    return ", ".join([f"rule {settings['rule']}", *(f"{name} {value}" for name, value in changed.items())])
