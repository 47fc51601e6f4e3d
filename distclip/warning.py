"""Warnings that point at the user's line, whatever lies between."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

_INNER = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


class AuditWarning(UserWarning):
    """What ranks hold is not what the layouts say: a norm may be wrong."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """``warnings.warn`` at the first caller outside distclip and torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INNER):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
