"""``torch.compile`` around a clip: the graph breaks once there, and what distclip does runs as it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def eager(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Have ``torch.compile`` leave this function and all that it calls alone.

    Traced, a clip breaks dozens of times, compiles each part for each model, and where warnings are errors it ends in
    one of the compiler's own.
    """
    return _untraced(function, recursive=True)


def eager_frame(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Have ``torch.compile`` leave this function alone, but not what it calls: an optimizer's step, say."""
    return _untraced(function, recursive=False)


def _untraced(function: Callable[_Given, _Result], recursive: bool) -> Callable[_Given, _Result]:
    disabled: list[Callable[_Given, _Result]] = []

    @wraps(function)
    def call(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        # Importing the compiler costs a second, and nobody compiles without.
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            reason = "distclip clips outside of compiled graphs"
            disabled.append(torch.compiler.disable(function, recursive, reason=reason))
        return disabled[0](*args, **kwargs)

    return call
