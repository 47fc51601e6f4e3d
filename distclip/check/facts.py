"""What a config says, whatever kind of file said it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Engine = Literal["none", "ddp", "fsdp1", "fsdp2", "tp", "deepspeed", "megatron", "xla"]
SECTION = "deepspeed_config."
"""Accelerate's section about DeepSpeed, which has shorter names."""
Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing to know before starting a run."""

    level: Level
    """error: the run, or its clipping, cannot work; warning: it is not what one would think; note: good to know."""
    key: str
    """Where in the file, keys joined by dots."""
    message: str


@dataclass(frozen=True)
class Facts:
    """A config as far as it matters to clipping."""

    kind: Literal["Accelerate", "DeepSpeed"]
    engine: Engine
    content: Mapping[str, Any]
    """The file as it stands."""
    processes: int | None = None
    machines: int = 1
    cpu: bool = False
    precision: str = "no"
    """no, bf16, fp16 or fp8."""
    strategy: str = ""
    """FSDP1's sharding strategy."""
    axes: Mapping[str, int] = field(default_factory=dict)
    """The axes of the mesh that are longer than 1: dp_replicate, dp_shard, cp, tp ..."""
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    """DeepSpeed's own config."""
    prefix: str = ""
    """Where that stands, for the keys of findings."""
    refused: str = ""
    """What Accelerate itself says against the file."""

    def where(self, key: str) -> str:
        """How a key of DeepSpeed's config is called in the file."""
        if self.prefix == SECTION:
            key = {"zero_optimization.stage": "zero_stage"}.get(key, key)
            key = key.removeprefix("zero_optimization.").replace(".device", "_device")
        return self.prefix + key

    @property
    def stage(self) -> int:
        """Of ZeRO."""
        if self.deepspeed.get("zero_optimization") is True:
            return 1  # how DeepSpeed was told at first
        stage = str(self.section("zero_optimization").get("stage", 0))
        return int(stage) if stage.isdecimal() else 0

    def section(self, name: str) -> Mapping[str, Any]:
        """A section of DeepSpeed's config, {} where there is none."""
        found = self.deepspeed.get(name)
        return found if isinstance(found, Mapping) else {}

    def enabled(self, name: str) -> bool:
        """Whether a section of DeepSpeed's config says ``enabled``."""
        return self.section(name).get("enabled") is True
