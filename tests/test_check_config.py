"""``distclip check CONFIG``: layouts, clippers and traps of Accelerate's and DeepSpeed's configs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from distclip.check import Checked, check_config
from distclip.check.traps import _ONLY_IN_THE_FILE
from distclip.cli import main
from tests.ranks import run_ranks

ACCELERATE: dict[str, Any] = {"compute_environment": "LOCAL_MACHINE", "num_processes": 8, "num_machines": 1}


def checked(folder: Path, content: dict[str, Any], name: str = "config.yaml") -> Checked:
    path = folder / name
    path.write_text(json.dumps(content) if name.endswith("json") else yaml.safe_dump(content))
    return check_config(path)


def accelerate(folder: Path, **content: Any) -> Checked:
    return checked(folder, ACCELERATE | content)


def deepspeed(folder: Path, **content: Any) -> Checked:
    return checked(folder, {"train_batch_size": 8} | content, "ds.json")


def told(found: Checked, key: str) -> str:
    """The only finding about a key, with its level."""
    (finding,) = [each for each in found.findings if each.key == key]
    return f"{finding.level}: {finding.message}"


@pytest.mark.parametrize(
    ("content", "layout", "collectives"),
    [
        ({"distributed_type": "NO", "num_processes": 1}, "one process holds all gradients", 0),
        ({"distributed_type": "MULTI_GPU"}, "DDP: whole gradients", 0),
        ({"distributed_type": "MULTI_CPU", "use_cpu": True}, "DDP: whole gradients", 0),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_sharding_strategy": "1"}}, "FSDP1 FULL_SHARD: flat", 1),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_reshard_after_forward": "NO_SHARD"}}, "FSDP1 NO_SHARD", 0),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}, "FSDP2, DTensors cut over all ranks", 1),
        (
            {
                "distributed_type": "FSDP",
                "fsdp_config": {"fsdp_version": 2},
                "parallelism_config": {
                    "parallelism_config_dp_replicate_size": 2,
                    "parallelism_config_dp_shard_size": 2,
                    "parallelism_config_tp_size": 2,
                },
            },
            "HSDP (FSDP2) + TP, DTensors on a mesh (dp_replicate 2: replicated, dp_shard 2: sharded, tp 2",
            1,
        ),
        (
            {"distributed_type": "MULTI_GPU", "parallelism_config": {"parallelism_config_tp_size": 8}},
            "tensor parallel, DTensors on a mesh (tp 8",
            1,
        ),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}}, "DeepSpeed ZeRO 3: parameters", 1),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 0}}, "DeepSpeed ZeRO 0: whole", 0),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": "3"}}, "DeepSpeed ZeRO 3: parameters", 1),
        ({"distributed_type": "DEEPSPEED"}, "DeepSpeed ZeRO 2: gradients cut", 1),
        ({"distributed_type": "FSDP", "fsdp_config": None}, "FSDP1 FULL_SHARD: flat", 1),
    ],
)
def test_layouts(content: dict[str, Any], layout: str, collectives: int, tmp_path: Path) -> None:
    found = accelerate(tmp_path, **content)
    assert layout in found.layout
    assert found.collectives == collectives
    assert found.works, str(found)


def default_limit() -> float:
    from deepspeed.runtime.config import get_gradient_clipping

    return float(get_gradient_clipping({}))


def test_what_deepspeed_clips_by_default_is_so() -> None:
    assert run_ranks(default_limit, 1) == [1.0]


@pytest.mark.parametrize(
    ("limit", "clips", "trap"),
    [
        ({}, "DeepSpeed at 1.0, its default", "warning: not set, and DeepSpeed clips at 1.0 then"),
        ({"gradient_clipping": 0.5}, "DeepSpeed at 0.5", "warning: 0.5, so there are two clippers"),
        (
            {"gradient_clipping": "auto"},
            "DeepSpeed at what Transformers or Accelerate puts",
            "warning: auto, for which",
        ),
        ({"gradient_clipping": 0.0}, "nothing: 0 is off", None),
    ],
)
def test_who_clips_under_deepspeed(limit: dict[str, float], clips: str, trap: str | None, tmp_path: Path) -> None:
    found = deepspeed(tmp_path, zero_optimization={"stage": 2}, **limit)
    assert found.clips.startswith(clips)
    assert (trap is None) == ("gradient_clipping" not in {finding.key for finding in found.findings})
    assert trap is None or told(found, "gradient_clipping").startswith(trap)


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ({"fp16": {"enabled": True}}, "zero_optimization.stage", "warning: 0 with fp16: DeepSpeed's engine.backward()"),
        ({"optimizer": {"type": "Adam"}}, "zero_optimization.stage", "note: 0 with float32: engine.get_global"),
        ({"fp16": {"enabled": True, "loss_scale": 1}}, "fp16.loss_scale", "warning: 1, no loss scaling at all"),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, "fp16.loss_scale", "warning: 128, a loss scale that stays"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "bf16.enabled", "error: true, and fp16.enabled as"),
        ({"optimizer": {"type": "Muon"}}, "optimizer.type", "error: Muon puts its updates"),
        ({"optimizer": {"params": {"max_grad_norm": 1}}}, "optimizer.params.max_grad_norm", "error: which DeepSpeed"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size", "error: GradClipper refuses"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.device",
            "error: nvme, where GradClipper refuses to clip",
        ),
        (
            {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}},
            "zero_optimization.zenflow",
            "error: GradClipper refuses ZenFlow",
        ),
    ],
)
def test_traps_of_deepspeed(content: dict[str, Any], key: str, message: str, tmp_path: Path) -> None:
    found = deepspeed(tmp_path, **content)
    assert told(found, key).startswith(message)
    assert found.works == ("error" not in message)


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ({"distclip": {"rule": 1}}, "", "error: Accelerate refuses this file (ValueError: "),
        ({"distributed_type": "MEGATRON_LM"}, "distributed_type", "error: MEGATRON_LM: distclip does not know"),
        (
            {"distributed_type": "FSDP", "use_cpu": True, "fsdp_config": {"fsdp_version": 2}},
            "use_cpu",
            "error: Accelerate runs FSDP, tensor parallelism and DeepSpeed on accelerators only",
        ),
        (
            {"distributed_type": "MULTI_GPU", "parallelism_config": {"parallelism_config_tp_size": 4}},
            "parallelism_config",
            "error: tp 4 is a mesh of 4 ranks, but num_processes is 8",
        ),
        (
            {"distributed_type": "FSDP", "parallelism_config": {"parallelism_config_dp_shard_size": 8}},
            "fsdp_config.fsdp_version",
            "error: 1, but a parallelism_config needs 2",
        ),
        (
            {"distributed_type": "MULTI_CPU", "mixed_precision": "fp16"},
            "mixed_precision",
            "warning: fp16, for which Accelerate trains in float32 on the CPU",
        ),
        (
            {
                "distributed_type": "MULTI_GPU",
                "mixed_precision": "fp16",
                "parallelism_config": {"parallelism_config_tp_size": 8},
            },
            "mixed_precision",
            "warning: fp16 with a GradScaler that each rank asks for itself",
        ),
        ({"distributed_type": "MULTI_GPU", "mixed_precision": "fp8"}, "mixed_precision", "note: fp8 multiplies"),
        (
            {"distributed_type": "MULTI_GPU", "num_machines": 2, "main_process_ip": "10.0.0.1"},
            "main_process_port",
            "warning: 2 machines, but main_process_port is not set",
        ),
        (
            {"distributed_type": "MULTI_CPU", "num_processes": 2},
            "distributed_type",
            "warning: MULTI_CPU, for which accelerate launch starts one process only",
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"gradient_clipping": 0.0}},
            "deepspeed_config.gradient_clipping",
            "note: 0.0, which Accelerate drops",
        ),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_reshard_after_forward": True}},
            "fsdp_config.fsdp_reshard_after_forward",
            "error: true, but fsdp_version 1 has FULL_SHARD",
        ),
        ({"distributed_type": "MULTI_GPU", "num_machines": 3}, "num_processes", "error: 8 is the number on all"),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2, "gradient_clipping": 2.0}},
            "deepspeed_config.gradient_clipping",
            "warning: 2.0, so there are two clippers",
        ),
        (
            {
                "distributed_type": "DEEPSPEED",
                "deepspeed_config": {"zero_stage": 3, "offload_optimizer_device": "nvme"},
            },
            "deepspeed_config.offload_optimizer_device",
            "error: nvme",
        ),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_use_orig_params": False}},
            "fsdp_config.fsdp_use_orig_params",
            "note: false: a flat parameter has no parts",
        ),
    ],
)
def test_traps_of_accelerate(content: dict[str, Any], key: str, message: str, tmp_path: Path) -> None:
    found = accelerate(tmp_path, **content)
    assert told(found, key).startswith(message), str(found)
    assert found.works == ("error: " not in message)


def test_a_deepspeed_file_named_by_accelerate_s(tmp_path: Path) -> None:
    deepspeed(tmp_path, bf16={"enabled": True}, zero_optimization={"stage": 3}, gradient_clipping=0.1)
    content = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "ds.json"}}
    found = accelerate(tmp_path, **content)
    assert found.layout.startswith("DeepSpeed ZeRO 3")
    assert told(found, "ds.json: gradient_clipping").startswith("warning: 0.1")
    assert found.works


def refusal(path: str, fields: str) -> str:
    from accelerate import DeepSpeedPlugin

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_CONFIG_DS_FIELDS", fields)  # as accelerate launch does
        with pytest.raises(ValueError, match="When using `deepspeed_config_file`") as error:
            DeepSpeedPlugin(hf_ds_config=path)
    return str(error.value)


def test_what_must_not_stand_beside_a_deepspeed_file(tmp_path: Path) -> None:
    deepspeed(tmp_path, bf16={"enabled": True}, zero_optimization={"stage": 3})
    section = {"deepspeed_config_file": "ds.json", "zero_stage": 2, "zero3_init_flag": True}
    found = accelerate(tmp_path, distributed_type="DEEPSPEED", mixed_precision="bf16", deepspeed_config=section)
    assert told(found, "deepspeed_config.zero_stage") == (
        "error: beside a deepspeed_config_file, which Accelerate refuses: take deepspeed_config.zero_stage, "
        "mixed_precision out, and say it there."
    )
    assert not found.works
    (told_by_accelerate,) = run_ranks(refusal, 1, str(tmp_path / "ds.json"), "deepspeed_config_file,mixed_precision")
    assert all(f"'{name}'" in told_by_accelerate for name in (*_ONLY_IN_THE_FILE, "mixed_precision"))


def command(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "distclip", *arguments]
    return subprocess.run(start, capture_output=True, text=True, timeout=60, env={**os.environ, **environ})


def test_command_prints_a_page_or_json(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(ACCELERATE | {"distributed_type": "MULTI_GPU", "mixed_precision": "bf16"}))
    done = command("check", str(path), DISTCLIP_RULE="zclip", DISTCLIP_NONFINITE="skip")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"config      {path} (Accelerate)",
        "starts      8 processes, accelerators, bf16",
        "layout      DDP: whole gradients on every rank, averaged; no collective a clip",
        "clips       nothing, until the script calls distclip or accelerator.clip_grad_norm_",
        "distclip    rule zclip, nonfinite skip",
        "",
        "Nothing amiss.",
    ]
    found = json.loads(command("check", "--json", str(path)).stdout)
    assert found["works"]
    assert found["settings"]["rule"] == 1.0
    assert found["findings"] == []


def test_command_fails_where_a_run_would(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(ACCELERATE | {"distributed_type": "MEGATRON_LM"}))
    done = command("check", str(path))
    assert done.returncode == 1
    assert "error       distributed_type: MEGATRON_LM" in done.stdout


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("no.yaml", None, "cannot be read: No such file or directory"),
        ("list.yaml", "- 1", "must hold settings, `name: value`, got list"),
        ("bad.json", "{", "is no JSON: Expecting property name"),
        ("bad.yaml", "a: [", "is no YAML: "),
        (
            "text.yaml",
            "distributed_type: MULTI_GPU\nnum_processes: '4'",
            "num_processes must be a whole number, got '4'",
        ),
        ("other.yaml", "a: 1", "is neither a config of Accelerate (it has no distributed_type) nor of DeepSpeed"),
    ],
)
def test_bad_files_are_one_line_and_status_2(
    name: str, text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["check", str(path)])
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith(f"distclip: {path}: {message}")


def test_without_the_command_line_s_library() -> None:
    code = "import sys; sys.modules['typer'] = None; from distclip.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == "distclip: the command line needs typer: pip install 'distclip[cli]'"


ROOT = Path(__file__).parent.parent


CONFIGS = [*(ROOT / "launch" / "accelerate").glob("*.yaml"), *(ROOT / "launch" / "deepspeed").glob("*.json")]


@pytest.mark.parametrize("path", sorted(CONFIGS), ids=lambda path: path.name)
def test_configs_that_come_along(path: Path) -> None:
    found = check_config(path)
    assert found.works, str(found)
    levels = {(finding.level, finding.key) for finding in found.findings}
    assert not {key for level, key in levels if level == "warning"}, str(found)
