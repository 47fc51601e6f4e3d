"""Where a ``Monitor`` sends what it sees; one file a sink."""

from distclip.sinks.base import Sink, as_sink
from distclip.sinks.call import Call
from distclip.sinks.jsonl import JsonLines

__all__ = ["Call", "JsonLines", "Sink", "as_sink"]
