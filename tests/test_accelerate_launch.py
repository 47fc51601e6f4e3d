"""launch/accelerate, started as users start it; and what Accelerate makes of each of its configurations."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="Accelerate is not installed")
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.device_mesh import init_device_mesh

from tests.ranks import ranks

FOLDER = Path(__file__).parent.parent / "launch" / "accelerate"
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SINGLE = [name for name in CONFIGS if not name.endswith("_multi_node")]


def command(config: str, *options: str, script: tuple[str, ...] = ()) -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / f"{config}.yaml")]
    return [*launch, *options, str(FOLDER / "train.py"), *script]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent.parent), **variables}


def run(config: str, *options: str, script: tuple[str, ...] = (), **variables: str) -> str:
    done = subprocess.run(
        command(config, *options, script=script),
        capture_output=True,
        text=True,
        timeout=100,
        env=environment(**variables),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_resume_to_the_bit(tmp_path: Path) -> None:
    """Settings come by environment and file, through ``accelerate launch``, to every rank."""
    settings = tmp_path / "distclip.yaml"
    settings.write_text("rule: global_norm=0.5\nlog_prefix: own/\n")
    rule = "zclip,z_thresh=0.2,max_norm=inf,warmup_steps=5,mode=percentile"

    def train(out: str, epochs: str, *more: str) -> list[dict[str, Any]]:
        task = ("--out", str(tmp_path / out), "--epochs", epochs, "--batch", "64", "--accumulate", "2", *more)
        printed = run("multi_cpu", script=task, DISTCLIP_CONFIG=str(settings), DISTCLIP_RULE=rule)
        assert f"MULTI_CPU on 2 processes, {rule}" in printed
        return lines(tmp_path / out)

    whole = train("whole", "4")
    train("resumed", "2")
    assert train("resumed", "4", "--resume") == whole
    assert [line["step"] for line in whole] == list(range(1, len(whole) + 1))
    assert len(whole) == 4 * 7
    assert {line["own/clipped"] for line in whole} == {0.0, 1.0}


@pytest.mark.slow
def test_a_tracker_of_accelerate(tmp_path: Path) -> None:
    run("multi_cpu", script=("--out", str(tmp_path), "--epochs", "1", "--log-with", "tensorboard"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert len(events.Scalars("train/grad_norm")) == 28
    assert not (tmp_path / "steps.jsonl").exists()


@pytest.mark.slow
def test_a_mistake_in_the_settings_stops_all_ranks(tmp_path: Path) -> None:
    done = subprocess.run(
        command("multi_cpu", script=("--out", str(tmp_path))),
        capture_output=True,
        text=True,
        timeout=100,
        env=environment(DISTCLIP_RULE="globalnorm=1"),
    )
    assert done.returncode != 0
    assert done.stderr.count("ValueError: the environment:") >= 1
    assert "did you mean 'global_norm'" in done.stderr


@pytest.mark.slow
def test_two_machines(tmp_path: Path) -> None:
    """Two launchers that meet over the network, here over localhost."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = ("--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port)
    started = [
        subprocess.Popen(
            command(
                "multi_cpu_multi_node",
                *meeting,
                "--machine_rank",
                str(machine),
                script=("--out", str(tmp_path), "--epochs", "1"),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(GLOO_SOCKET_IFNAME="lo"),
        )
        for machine in range(2)
    ]
    printed = [each.communicate(timeout=100)[0] for each in started]
    assert [each.returncode for each in started] == [0, 0], "\n".join(printed)
    assert "MULTI_CPU on 2 processes" in printed[0]
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 29))


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_every_configuration(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the launcher's own code, up to the environment that it would give the ranks; and what they make of it."""
    path = str(FOLDER / f"{name}.yaml")
    config = load_config_from_file(path)
    assert config.num_machines == (2 if name.endswith("_multi_node") else 1)
    # The port that a launcher on machine 0 would try.
    given = launch_command_parser().parse_args(["--config_file", path, "--machine_rank", "1", "train.py"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments, defaults, _ = _validate_launch_command(given)
    kind = name.removesuffix("_multi_node")
    if kind.startswith("zero"):
        assert arguments.use_deepspeed
        arguments.deepspeed_fields_from_accelerate_config = ",".join([*defaults.deepspeed_config, "mixed_precision"])
        _, variables = prepare_deepspeed_cmd_env(arguments)
    else:
        variables = prepare_multi_gpu_env(arguments)
    assert (arguments.nproc_per_node, getattr(arguments, "nnodes", "1:1")) == _processes(name)
    assert variables["ACCELERATE_MIXED_PRECISION"] == ("no" if kind == "multi_cpu" else "bf16")
    for variable in variables.keys() - os.environ.keys():
        monkeypatch.setenv(variable, variables[variable])
    # Which asks for a GPU as soon as the plugin is made.
    monkeypatch.setenv("FSDP_SYNC_MODULE_STATES", "false")
    check_plugins(kind, variables, world=config.num_processes)


def _processes(name: str) -> tuple[str, str]:
    each = "2" if name.startswith(("multi_cpu", "tp")) else "8"
    return each, "2" if name.endswith("_multi_node") else "1:1"


def check_plugins(kind: str, variables: dict[str, str], world: int) -> None:
    assert variables.get("ACCELERATE_USE_FSDP", "false") == str(kind.startswith(("fsdp", "hsdp"))).lower()
    if kind.startswith(("fsdp", "hsdp")):
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == (1 if kind == "fsdp1" else 2)
        assert plugin.transformer_cls_names_to_wrap == ["Block"]
        assert not plugin.cpu_ram_efficient_loading
    if kind.startswith("zero"):
        config = DeepSpeedPlugin().deepspeed_config
        assert config["zero_optimization"]["stage"] == int(kind[-1])
        assert "gradient_clipping" not in config
    assert ("ACCELERATE_USE_PARALLELISM_CONFIG" in variables) == kind.startswith(("hsdp", "tp"))
    if kind in ("hsdp", "tp"):
        axes = ParallelismConfig()
        assert axes.total_size == world
        assert axes.tp_size == (2 if kind == "tp" else 1)
        assert axes.dp_replicate_size == (2 if kind == "hsdp" else 1)


def test_a_key_that_accelerate_does_not_know_is_refused(tmp_path: Path) -> None:
    """Why distclip's settings stand in a file of their own."""
    path = tmp_path / "own.yaml"
    path.write_text((FOLDER / "ddp.yaml").read_text() + "distclip:\n  rule: zclip\n")
    with pytest.raises(ValueError, match="unknown keys"):
        load_config_from_file(str(path))


@ranks(2)
def test_the_script_cuts_its_model_for_tensor_parallelism() -> None:
    """Which it is asked for on GPUs only."""
    spec = importlib.util.spec_from_file_location("accelerate_train", FOLDER / "train.py")
    assert spec is not None
    assert spec.loader is not None
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    model = train.Classifier()
    images = torch.randn(3, 64)
    whole = model(images)
    train.cut(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    assert model.tp_size == 2
    assert model.blocks[1].up.weight.to_local().shape == (128, 64)
    torch.testing.assert_close(model(images), whole)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in SINGLE if name != "multi_cpu"])
def test_on_gpus(name: str, tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    wanted = {"hsdp": 4, "tp": 2}.get(name, 1)
    if count < wanted:
        pytest.skip(f"{name} needs {wanted} GPUs, here are {count}")
    options = ["--num_processes", str(wanted if wanted > 1 else count)]
    if name == "hsdp":
        options += ["--parallelism_config_dp_shard_size", "2"]
    printed = run(name, *options, script=("--out", str(tmp_path), "--epochs", "2"))
    kind = "FSDP" if name.startswith(("fsdp", "hsdp")) else "DEEPSPEED" if name.startswith("zero") else "GPU"
    assert kind in printed or (count == 1 and name == "ddp")
    norms = [line["train/grad_norm"] for line in lines(tmp_path)]
    assert all(0 < norm < 100 for norm in norms)
