"""Ordinary tensors: one process, or replicas that the user keeps equal. Whole on every rank that takes part."""

from __future__ import annotations

from torch import Tensor

from distclip.layout.base import GradLayout, Piece


def resolve(param: Tensor) -> GradLayout:
    return GradLayout("plain", (Piece(param.shape),))
