"""A pytest plugin for ``launch/strangers.py``: distclip in torch's place, what came of each test, and calls counted.

``STRANGERS_RESULTS`` names the file that gets both; with ``STRANGERS_PATCH=1`` torch's functions are distclip's.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import distclip
from distclip.patch import _REPLACEMENTS, _cell

outcomes: dict[str, str] = {}
calls = 0
inside = False


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Calls from outside: torch's functions call each other."""

    def call(*args: Any, **kwargs: Any) -> Any:
        global calls, inside
        if inside:
            return function(*args, **kwargs)
        calls, inside = calls + 1, True
        try:
            return function(*args, **kwargs)
        finally:
            inside = False

    return call


def pytest_configure() -> None:
    if os.environ.get("STRANGERS_PATCH") == "1":
        distclip.patch()
    for name in _REPLACEMENTS:
        cell = _cell(name)
        cell.cell_contents = counted(cell.cell_contents)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # A failed teardown counts against the test, a passed setup says nothing yet.
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    Path(os.environ["STRANGERS_RESULTS"]).write_text(json.dumps({"outcomes": outcomes, "calls": calls}))
