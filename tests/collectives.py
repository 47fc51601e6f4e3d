"""Counting what goes over the wire."""

from distclip.bench.counters import recorded_collectives

__all__ = ["recorded_collectives"]
