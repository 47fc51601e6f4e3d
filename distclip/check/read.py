"""Files of Accelerate and DeepSpeed as ``Facts``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distclip.check.facts import SECTION, Engine, Facts
from distclip.files import load_mapping
from distclip.hints import optional, shown

_STRATEGIES = {"1": "FULL_SHARD", "2": "SHARD_GRAD_OP", "3": "NO_SHARD", "4": "HYBRID_SHARD", "5": "HYBRID_SHARD_ZERO2"}
_DEEPSPEED_KEYS = {"zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu", "fp16", "bf16"}
_ACCELERATE_KEYS = {"distributed_type", "compute_environment", "num_processes", "mixed_precision"}


def read(path: Path) -> Facts:
    """The facts of a file.

    Raises:
        ValueError: it cannot be read, is neither YAML nor JSON, or of neither framework.
        ImportError: it is YAML, and PyYAML is not installed.
    """
    content = load_mapping(path)
    if content.keys() & _ACCELERATE_KEYS or {"fsdp_config", "deepspeed_config"} & content.keys():
        return _accelerate(path, content)
    if content.keys() & _DEEPSPEED_KEYS or {"gradient_clipping", "optimizer"} & content.keys():
        return Facts("DeepSpeed", "deepspeed", content, precision=_deepspeed_precision(content), deepspeed=content)
    raise ValueError(
        f"{path}: is neither a config of Accelerate (it has no distributed_type) nor of DeepSpeed (no "
        "zero_optimization, no train_batch_size)"
    )


def _accelerate(path: Path, content: dict[str, Any]) -> Facts:
    fsdp, parallelism = _section(content, "fsdp_config"), _section(content, "parallelism_config")
    axes = {
        key.removeprefix("parallelism_config_").removesuffix("_size"): int(size)
        for key, size in parallelism.items()
        if key.endswith("_size") and isinstance(size, int) and size > 1
    }
    engine = _engine(content, fsdp, axes)
    deepspeed, prefix = (
        _deepspeed_of(path, _section(content, "deepspeed_config")) if engine == "deepspeed" else ({}, "")
    )
    strategy = str(fsdp.get("fsdp_sharding_strategy", fsdp.get("fsdp_reshard_after_forward", "FULL_SHARD")))
    precision = str(content.get("mixed_precision") or "no").lower()
    return Facts(
        "Accelerate",
        engine,
        content,
        processes=_count(path, content, "num_processes"),
        machines=_count(path, content, "num_machines") or 1,
        cpu=content.get("use_cpu") is True or content.get("distributed_type") == "MULTI_CPU",
        precision=precision if precision != "no" or not deepspeed else _deepspeed_precision(deepspeed),
        strategy=_STRATEGIES.get(strategy, strategy.upper()),
        axes=axes,
        deepspeed=deepspeed,
        prefix=prefix,
        refused=_refused(path),
    )


def _engine(content: Mapping[str, Any], fsdp: Mapping[str, Any], axes: Mapping[str, int]) -> Engine:
    kind = str(content.get("distributed_type") or "NO").upper()
    if kind == "FSDP":
        return "fsdp2" if str(fsdp.get("fsdp_version", 1)) == "2" else "fsdp1"
    known: dict[str, Engine] = {"DEEPSPEED": "deepspeed", "MEGATRON_LM": "megatron", "XLA": "xla", "TPU": "xla"}
    if kind in known:
        return known[kind]
    if "tp" in axes:
        return "tp"
    return "ddp" if kind.startswith("MULTI") else "none"


def _deepspeed_of(path: Path, section: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """DeepSpeed's config as Accelerate makes it of its section, and where its keys stand."""
    named = section.get("deepspeed_config_file")
    if named:
        if not isinstance(named, str):
            raise ValueError(f"{path}: deepspeed_config_file must be a path, got {shown(named)}")
        places = [Path(named), path.parent / named]
        return load_mapping(next((place for place in places if place.exists()), places[0])), f"{named}: "
    made: dict[str, Any] = {"zero_optimization": {"stage": section.get("zero_stage", 2)}}
    # Accelerate writes "auto" where nothing is said, and 1.0 for that.
    made["gradient_clipping"] = section.get("gradient_clipping", "auto")
    for target in ("optimizer", "param"):
        device = section.get(f"offload_{target}_device", "none")
        made["zero_optimization"][f"offload_{target}"] = {"device": device}
    return made, SECTION


def _section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = content.get(name)
    return found if isinstance(found, Mapping) else {}


def _count(path: Path, content: Mapping[str, Any], name: str) -> int | None:
    count = content.get(name)
    if count is None or (isinstance(count, int) and not isinstance(count, bool)):
        return count
    raise ValueError(f"{path}: {name} must be a whole number, got {count!r}")


def _deepspeed_precision(config: Mapping[str, Any]) -> str:
    for name in ("fp16", "bf16"):
        section = config.get(name)
        if isinstance(section, Mapping) and section.get("enabled") is True:
            return name
    return "no"


def _refused(path: Path) -> str:
    """What Accelerate says against a file, where it is installed: it knows its own keys best."""
    try:
        load_config: Callable[[str], Any] = optional(
            "accelerate.commands.config.config_args", "accelerate"
        ).load_config_from_file
    except ImportError:
        return ""
    try:
        load_config(str(path))
    except Exception as error:  # whatever it is that Accelerate would end with
        return f"{type(error).__name__}: {error}"
    return ""
