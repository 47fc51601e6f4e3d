"""One function for each thing that can be amiss; a new one is a function in TRAPS."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from distclip.check.facts import SECTION, Facts, Finding
from distclip.check.layouts import STRATEGIES

# What Accelerate's section must not say where it names a file of DeepSpeed's.
_ONLY_IN_THE_FILE = (
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_stage",
    "offload_optimizer_device",
    "offload_optimizer_nvme_path",
    "offload_param_device",
    "offload_param_nvme_path",
    "zero3_save_16bit_model",
)


def _file_refused(facts: Facts) -> Iterator[Finding]:
    if facts.refused:
        yield Finding(
            "error",
            "",
            f"Accelerate refuses this file ({facts.refused}). Settings of distclip go into a file of their own "
            "(DISTCLIP_CONFIG=distclip.yaml) or the environment (DISTCLIP_RULE=...).",
        )


def _two_clippers(facts: Facts) -> Iterator[Finding]:
    limit = facts.deepspeed.get("gradient_clipping")
    key = facts.where("gradient_clipping")
    if facts.engine != "deepspeed" or (limit == 0 and facts.prefix != SECTION):
        return
    if limit == 0:
        yield Finding(
            "note",
            key,
            "0.0, which Accelerate drops, and DeepSpeed's default is 1.0. A GradClipper of the engine switches it off.",
        )
    elif limit == "auto" and facts.kind == "DeepSpeed":
        yield Finding(
            "warning",
            key,
            "auto, for which the Transformers Trainer puts its max_grad_norm (1.0 if nothing is said), Accelerate 1.0. "
            "A GradClipper of the engine takes its place; write 0.0 to say that nothing else is meant to clip.",
        )
    elif limit in (None, "auto"):
        yield Finding(
            "warning",
            key,
            "not set, and DeepSpeed clips at 1.0 then. A GradClipper of the engine takes its place; write 0.0 to "
            "say that nothing else is meant to clip.",
        )
    else:
        yield Finding(
            "warning",
            key,
            f"{limit}, so there are two clippers if the script makes a GradClipper. That switches DeepSpeed's off (and "
            "warns), so nothing is clipped twice; remove the entry to have one place that says what clips.",
        )


def _clip_after_step(facts: Facts) -> Iterator[Finding]:
    if facts.engine == "deepspeed" and facts.kind == "Accelerate":
        yield Finding(
            "note",
            "distributed_type",
            "DeepSpeed steps inside accelerator.backward(): accelerator.clip_grad_norm_() after it only reads a norm, "
            "and its max_norm does nothing. The clipper must hold the rule before (distclip.integrations.accelerate).",
        )


def _stage_0(facts: Facts) -> Iterator[Finding]:
    if facts.engine != "deepspeed" or facts.stage:
        return
    if facts.precision == "fp16":
        yield Finding(
            "warning",
            facts.where("zero_optimization.stage"),
            "0 with fp16: DeepSpeed's engine.backward() does not multiply by the loss scale that its step divides by, "
            "and engine.get_global_grad_norm() is the norm times that scale. A GradClipper divides by what gradients "
            "were multiplied with, and its report holds the true norm.",
        )
    elif facts.precision == "no":
        yield Finding(
            "note",
            facts.where("zero_optimization.stage"),
            "0 with float32: engine.get_global_grad_norm() is None. The report of a GradClipper holds the norm.",
        )


def _fp16_without_scaler(facts: Facts) -> Iterator[Finding]:
    if facts.precision != "fp16":
        return
    if facts.cpu and facts.kind == "Accelerate":
        yield Finding(
            "warning", "mixed_precision", "fp16, for which Accelerate trains in float32 on the CPU, without a word."
        )
    scale = facts.section("fp16").get("loss_scale", 0)
    if facts.engine == "deepspeed" and scale not in (0, "auto"):
        what = "no loss scaling at all" if scale == 1 else f"a loss scale that stays at {scale}"
        yield Finding(
            "warning",
            facts.where("fp16.loss_scale"),
            f"{scale}, {what}. Small gradients become 0, and an overflow skips steps without end. 0 scales "
            "dynamically.",
        )
    if facts.engine == "tp":
        yield Finding(
            "warning",
            "mixed_precision",
            "fp16 with a GradScaler that each rank asks for itself: one rank skips a step that others take. Give the "
            "optimizer to the GradClipper: its clip tells all ranks' scalers of every overflow.",
        )


def _precisions_differ(facts: Facts) -> Iterator[Finding]:
    if facts.enabled("fp16") and facts.enabled("bf16"):
        yield Finding("error", facts.where("bf16.enabled"), "true, and fp16.enabled as well: DeepSpeed refuses that.")


def _beside_a_file(facts: Facts) -> Iterator[Finding]:
    section = facts.content.get("deepspeed_config")
    if facts.engine != "deepspeed" or not isinstance(section, dict) or not section.get("deepspeed_config_file"):
        return
    twice = [SECTION + key for key in _ONLY_IN_THE_FILE if key in section]
    if facts.content.get("mixed_precision") is not None:
        twice.append("mixed_precision")
    if twice:
        yield Finding(
            "error",
            twice[0],
            f"beside a deepspeed_config_file, which Accelerate refuses: take {', '.join(twice)} out, and say it there.",
        )


def _fp8(facts: Facts) -> Iterator[Finding]:
    if facts.precision == "fp8":
        yield Finding("note", "mixed_precision", "fp8 multiplies matrices: the gradients to clip are bf16 or fp32.")


def _mesh_and_processes(facts: Facts) -> Iterator[Finding]:
    product = math.prod(facts.axes.values())
    if facts.axes and facts.processes and product != facts.processes:
        sizes = " x ".join(f"{axis} {size}" for axis, size in facts.axes.items())
        yield Finding(
            "error",
            "parallelism_config",
            f"{sizes} is a mesh of {product} ranks, but num_processes is {facts.processes}.",
        )
    if facts.axes and facts.engine == "fsdp1":
        yield Finding("error", "fsdp_config.fsdp_version", "1, but a parallelism_config needs 2.")


def _fsdp_on_cpu(facts: Facts) -> Iterator[Finding]:
    if facts.cpu and facts.engine in ("fsdp1", "fsdp2", "tp", "deepspeed"):
        yield Finding(
            "error",
            "use_cpu",
            "Accelerate runs FSDP, tensor parallelism and DeepSpeed on accelerators only: on the CPU it falls back to "
            "one process, or counts the ranks wrongly. MULTI_CPU (DDP) works.",
        )


def _multi_cpu(facts: Facts) -> Iterator[Finding]:
    several = facts.processes is not None and facts.processes > 1
    if facts.content.get("distributed_type") == "MULTI_CPU" and several and not facts.content.get("mpirun_config"):
        yield Finding(
            "warning",
            "distributed_type",
            "MULTI_CPU, for which accelerate launch starts one process only, unless mpirun_config names hosts. Several "
            "on the CPU: MULTI_GPU here, and Accelerator(cpu=True) in the script (launch/accelerate/multi_cpu.yaml).",
        )


def _fsdp1(facts: Facts) -> Iterator[Finding]:
    if facts.engine != "fsdp1" or facts.axes:
        return
    yield Finding(
        "note",
        "fsdp_config.fsdp_version",
        "1, under which accelerator.clip_grad_norm_() is right for all of model.parameters() only: of any other list "
        "(without the frozen ones, say) it takes each rank's share for the norm. distclip's is right for any list.",
    )
    if (facts.content.get("fsdp_config") or {}).get("fsdp_use_orig_params") is False:
        yield Finding(
            "note",
            "fsdp_config.fsdp_use_orig_params",
            "false: a flat parameter has no parts, so only a whole model can be clipped. Rules see each tensor in it.",
        )


def _unknown_strategy(facts: Facts) -> Iterator[Finding]:
    if facts.engine == "fsdp1" and facts.strategy not in STRATEGIES:
        yield Finding(
            "error",
            "fsdp_config.fsdp_reshard_after_forward",
            f"{facts.strategy.lower()}, but fsdp_version 1 has {', '.join(STRATEGIES)}; true and false are for 2.",
        )


def _clip_value(facts: Facts) -> Iterator[Finding]:
    if facts.kind == "Accelerate" and facts.engine in ("fsdp1", "fsdp2", "deepspeed"):
        yield Finding(
            "note",
            "distributed_type",
            "accelerator.clip_grad_value_() raises here. After distclip.integrations.accelerate.install() it clips.",
        )


def _refused_by_distclip(facts: Facts) -> Iterator[Finding]:
    zero = facts.section("zero_optimization")
    offload = zero.get("offload_optimizer")
    if isinstance(offload, dict) and offload.get("device") == "nvme":
        yield Finding(
            "error",
            facts.where("zero_optimization.offload_optimizer.device"),
            "nvme, where GradClipper refuses to clip. Offload to cpu, or leave the clipping to DeepSpeed.",
        )
    if "muon" in str(facts.section("optimizer").get("type", "")).lower():
        yield Finding(
            "error",
            facts.where("optimizer.type"),
            "Muon puts its updates where the gradients were: GradClipper refuses it. Leave the clipping to DeepSpeed.",
        )
    slices = facts.section("tensor_parallel").get("autotp_size")
    if isinstance(slices, int) and slices > 1:
        yield Finding(
            "error",
            facts.where("tensor_parallel.autotp_size"),
            "GradClipper refuses tensor parallelism inside DeepSpeed. FSDP2 with TP works.",
        )
    if zero.get("zenflow"):
        yield Finding("error", facts.where("zero_optimization.zenflow"), "GradClipper refuses ZenFlow.")


def _max_grad_norm(facts: Facts) -> Iterator[Finding]:
    params = facts.section("optimizer").get("params")
    if isinstance(params, dict) and "max_grad_norm" in params:
        yield Finding(
            "error",
            facts.where("optimizer.params.max_grad_norm"),
            "which DeepSpeed refuses. Give it to the GradClipper.",
        )


def _unknown_systems(facts: Facts) -> Iterator[Finding]:
    if facts.engine in ("megatron", "xla"):
        yield Finding(
            "error",
            "distributed_type",
            f"{facts.content.get('distributed_type')}: distclip does not know where its gradients lie. Leave the "
            "clipping to it.",
        )


def _several_machines(facts: Facts) -> Iterator[Finding]:
    if facts.kind == "Accelerate" and facts.machines > 1:
        missing = [key for key in ("main_process_ip", "main_process_port") if not facts.content.get(key)]
        if missing:
            yield Finding(
                "warning",
                missing[0],
                f"{facts.machines} machines, but {' and '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not set: pass --{missing[0]} to accelerate launch.",
            )
        if facts.processes and facts.processes % facts.machines:
            yield Finding(
                "error",
                "num_processes",
                f"{facts.processes} is the number on all machines together, and {facts.machines} do not divide it.",
            )


TRAPS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _file_refused,
    _unknown_systems,
    _refused_by_distclip,
    _max_grad_norm,
    _fsdp_on_cpu,
    _multi_cpu,
    _mesh_and_processes,
    _precisions_differ,
    _beside_a_file,
    _fp16_without_scaler,
    _two_clippers,
    _stage_0,
    _several_machines,
    _clip_after_step,
    _clip_value,
    _unknown_strategy,
    _fsdp1,
    _fp8,
)
