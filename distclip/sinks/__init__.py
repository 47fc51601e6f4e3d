"""Where a ``Monitor`` sends what it sees; one file a kind."""

from distclip.sinks.base import Sink, as_sink
from distclip.sinks.call import Call
from distclip.sinks.jsonl import JsonLines
from distclip.sinks.tensorboard import TensorBoard
from distclip.sinks.terminal import Terminal
from distclip.sinks.trackers import MLflow, Tracker, Wandb

__all__ = ["Call", "JsonLines", "MLflow", "Sink", "TensorBoard", "Terminal", "Tracker", "Wandb", "as_sink"]
