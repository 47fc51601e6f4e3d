"""What the facts of a config mean for a clip."""

from __future__ import annotations

from distclip.check.facts import SECTION, Facts

STRATEGIES = {
    "FULL_SHARD": "flat parameters, each cut over all ranks",
    "SHARD_GRAD_OP": "flat parameters, gradients cut over all ranks",
    "NO_SHARD": "whole gradients on every rank, averaged as DDP does",
    "HYBRID_SHARD": "flat parameters, cut within a node and replicated over the nodes",
    "HYBRID_SHARD_ZERO2": "flat parameters, gradients cut within a node and replicated over the nodes",
}
_ZERO = {
    0: "whole gradients on every rank, averaged by DeepSpeed",
    1: "reduced gradients, of which each rank keeps its part",
    2: "gradients cut over the ranks, flat buffers",
    3: "parameters and gradients cut over the ranks",
}


def layout_of(facts: Facts) -> str:
    """The layout that distclip will see, in a line."""
    engine = facts.engine
    if engine == "deepspeed":
        return f"DeepSpeed ZeRO {facts.stage}: {_ZERO.get(facts.stage, 'an unknown stage')}"
    if engine == "fsdp1":
        return f"FSDP1 {facts.strategy}: {STRATEGIES.get(facts.strategy, 'an unknown strategy')}"
    if engine in ("fsdp2", "tp"):
        return _mesh(facts)
    return {
        "none": "one process holds all gradients",
        "ddp": "DDP: whole gradients on every rank, averaged",
        "megatron": "Megatron-LM, which shards and clips by itself",
        "xla": "XLA",
    }[engine]


def _mesh(facts: Facts) -> str:
    parts = {
        "dp_replicate": "replicated",
        "dp_shard": "sharded",
        "cp": "context parallel (sharded with dp_shard)",
        "tp": "tensor parallel",
    }
    name = "FSDP2" if facts.engine == "fsdp2" else "tensor parallel"
    if facts.engine == "fsdp2" and {"dp_replicate", "dp_shard"} <= facts.axes.keys():
        name = "HSDP (FSDP2)"
    if "tp" in facts.axes and facts.engine == "fsdp2":
        name += " + TP"
    axes = ", ".join(f"{axis} {size}: {parts.get(axis, axis)}" for axis, size in facts.axes.items())
    return f"{name}, DTensors on a mesh ({axes})" if axes else f"{name}, DTensors cut over all ranks"


def collectives(facts: Facts) -> int:
    """All-reduces that a clip costs."""
    whole = facts.engine in ("none", "ddp") or (facts.engine == "fsdp1" and facts.strategy == "NO_SHARD")
    # ZeRO 1 with bf16 and float32 accumulation keeps whole gradients on every rank.
    wide = facts.stage == 1 and facts.enabled("bf16") and facts.section("data_types").get("grad_accum_dtype") == "fp32"
    return 0 if whole or (facts.engine == "deepspeed" and (facts.stage == 0 or wide)) else 1


def clips(facts: Facts) -> str:
    """What clips if nobody does anything about it."""
    if facts.engine == "megatron":
        return "Megatron-LM, by its own clip_grad"
    if facts.engine != "deepspeed":
        return "nothing, until the script calls distclip or accelerator.clip_grad_norm_"
    limit = facts.deepspeed.get("gradient_clipping")
    if limit == "auto" and facts.kind == "DeepSpeed":
        return "DeepSpeed at what Transformers or Accelerate puts for auto, until a GradClipper takes its place"
    if limit is None:
        return "DeepSpeed at 1.0, its default, until a GradClipper of the engine takes its place"
    if limit == "auto":
        return "DeepSpeed at 1.0, which Accelerate puts for auto, until a GradClipper of the engine takes its place"
    if limit == 0 and facts.prefix == SECTION:
        return "DeepSpeed at 1.0, because Accelerate drops a 0.0, until a GradClipper of the engine takes its place"
    return f"DeepSpeed at {limit}, until a GradClipper of the engine takes its place" if limit else "nothing: 0 is off"
