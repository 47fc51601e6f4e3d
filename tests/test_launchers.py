"""The launchers of launch/, started as users start them; several nodes are several agents on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distclip import GradClipper
from tests.ranks import ranks

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
CONFIGS = sorted((LAUNCH / "deepspeed").glob("*.json"))
TASK = ("--parallel", "fsdp2", "--model", "transformer", "--steps", "4", "--rule", "global_norm=0.1", "--compare")
SAME = "the same training"

# Imported by what is launched, never here: DeepSpeed leaves environment variables behind.
needs_accelerate = pytest.mark.skipif(find_spec("accelerate") is None, reason="Accelerate is not installed")
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

# What every rank tells of itself.
WHO = """\
import json, os, sys
told = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} | {"arguments": sys.argv[1:]}
os.write(1, f"told {json.dumps(told)}\\n".encode())  # in one piece, so that ranks do not mix their lines
"""


class Node:
    """A launcher that runs; with what it has started it ends at the latest when the block does."""

    def __init__(self, script: str | Path, *arguments: str, before: tuple[str, ...] = (), **settings: Any) -> None:
        self.name = Path(script).name
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
        environment |= {name: str(value) for name, value in settings.items()}
        self.process = subprocess.Popen(
            [*before, "bash", str(LAUNCH / script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def output(self, status: int = 0) -> str:
        """All that it and its ranks print, once it has ended with ``status``."""
        text, _ = self.process.communicate(timeout=100)
        assert self.process.returncode == status, f"{self.name} ended with {self.process.returncode}:\n{text[-6000:]}"
        return text


@contextmanager
def running(*nodes: Node) -> Iterator[tuple[Node, ...]]:
    try:
        yield nodes
    finally:
        for node in nodes:
            if node.process.poll() is None:
                os.killpg(node.process.pid, signal.SIGKILL)
                node.process.communicate()


def run(script: str, *arguments: str, status: int = 0, **settings: Any) -> str:
    with running(Node(script, *arguments, **settings)) as (node,):
        return node.output(status)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def who(tmp_path: Path) -> Path:
    script = tmp_path / "who.py"
    script.write_text(WHO)
    return script


def told(*outputs: str) -> list[dict[str, Any]]:
    """What the ranks told, in the order of their ranks."""
    found = [
        json.loads(line.partition("told ")[2]) for text in outputs for line in text.splitlines() if "told {" in line
    ]
    return sorted(found, key=lambda rank: int(rank["RANK"]))


def assert_two_nodes_of_one_rank(*outputs: str) -> None:
    assert [(rank["RANK"], rank["LOCAL_RANK"], rank["WORLD_SIZE"]) for rank in told(*outputs)] == [
        ("0", "0", "2"),
        ("1", "0", "2"),
    ]


def test_one_node_by_torchrun(who: Path) -> None:
    found = told(run("torchrun.sh", "--a", "b c", NPROC=2, SCRIPT=who))
    assert [rank["arguments"] for rank in found] == [["--a", "b c"]] * 2


@pytest.mark.parametrize("ordered", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["c10d", "NODE_RANK"])
def test_two_nodes_by_torchrun(ordered: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"NNODES": 2, "NPROC": 1, "RDZV_ENDPOINT": f"localhost:{free_port()}"}
    task = (*TASK, "--out", str(tmp_path))
    own: list[dict[str, Any]] = [{"NODE_RANK": place} if ordered else {} for place in range(2)]
    with running(*(Node("torchrun_nodes.sh", *task, **settings, **own[place]) for place in range(2))) as nodes:
        outputs = [node.output() for node in nodes]
    assert sum(SAME in text for text in outputs) == 1
    assert not ordered or SAME in outputs[0]


@contextmanager
def two_networks() -> Iterator[None]:
    """Two network namespaces, joined by a cable: dca with 10.99.0.1 and dcb with 10.99.0.2."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need `ip` and root")
    steps = [
        "netns add dca",
        "netns add dcb",
        "link add dcva netns dca type veth peer name dcvb netns dcb",
        "-n dca addr add 10.99.0.1/24 dev dcva",
        "-n dcb addr add 10.99.0.2/24 dev dcvb",
        *(f"-n {name} link set {device} up" for name in ("dca", "dcb") for device in ("lo", f"dcv{name[-1]}")),
    ]
    try:
        for step in steps:
            done = subprocess.run(["ip", *step.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: ip {step}: {done.stderr.strip()}")
        yield
    finally:
        for name in ("dca", "dcb"):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_two_nodes_in_two_networks(tmp_path: Path) -> None:
    """Each node has an address that its host name knows nothing of."""
    task = (*TASK, "--out", str(tmp_path))
    settings: dict[str, Any] = {"NNODES": 2, "NPROC": 1, "RDZV_ENDPOINT": "10.99.0.1:29400"}
    with two_networks():
        nodes = [
            Node(
                "torchrun_nodes.sh",
                *task,
                before=("ip", "netns", "exec", f"dc{name}"),
                LOCAL_ADDR=f"10.99.0.{place}",
                GLOO_SOCKET_IFNAME=f"dcv{name}",
                **settings,
            )
            for place, name in enumerate("ab", 1)
        ]
        with running(*nodes):
            assert sum(SAME in node.output() for node in nodes) == 1


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


# Notes how it was called, leaves out its own options, and runs the rest once for each node.
SRUN = """\
echo "$RDZV_ENDPOINT: $*" >> "$NOTES/srun"
[ -z "${DRY:-}" ] || exit 0
while [[ $1 == --* ]]; do [[ $1 == *=* ]] || shift; shift; done
for n in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & done
for job in $(jobs -p); do wait "$job"; done
"""


def test_slurm(tmp_path: Path, who: Path) -> None:
    """SLURM's commands are stood in for by two that do as theirs do on this machine, and note how they were called."""
    tools = tmp_path / "tools"
    tools.mkdir()
    executable(tools / "scontrol", 'echo "$*" >> "$NOTES/scontrol"\nfor n in {1..4000}; do echo localhost; done\n')
    executable(tools / "srun", SRUN)
    # As sbatch does: what runs is a copy.
    copy = Path(shutil.copy(LAUNCH / "slurm.sh", tmp_path / "slurm_script"))
    settings: dict[str, Any] = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "NOTES": tmp_path,
        "SLURM_SUBMIT_DIR": ROOT,
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_NUM_NODES": 2,
        "SLURM_JOB_ID": 40123,
        "SLURM_CPUS_PER_TASK": 3,
        "SLURM_GPUS_ON_NODE": 1,
        "SCRIPT": who,
    }
    port = free_port()
    with running(Node(copy, "--a", "b c", PORT=port, **settings)) as (node,):
        output = node.output()
    with running(Node(copy, DRY=1, **settings)) as (node,):
        node.output()
    assert_two_nodes_of_one_rank(output)
    assert told(output)[0]["arguments"] == ["--a", "b c"]
    assert (tmp_path / "scontrol").read_text() == 2 * "show hostnames node[0-1]\n"
    task = f"--ntasks 2 --ntasks-per-node 1 --kill-on-bad-exit=1 bash {LAUNCH}/torchrun_nodes.sh"
    called = (tmp_path / "srun").read_text().splitlines()
    assert [line.rstrip() for line in called] == [f"localhost:{port}: {task} --a b c", f"localhost:20123: {task}"]


@pytest.fixture
def accelerate_config(tmp_path: Path) -> Path:
    config = tmp_path / "two.yaml"
    # MULTI_GPU is what starts several ranks through torchrun, on a machine without GPUs too.
    lines = ("distributed_type: MULTI_GPU", "num_machines: 1", "num_processes: 2", "machine_rank: 0", "use_cpu: false")
    config.write_text("\n".join(["compute_environment: LOCAL_MACHINE", *lines, "mixed_precision: 'no'"]))
    return config


@needs_accelerate
@pytest.mark.slow
def test_one_node_by_accelerate(accelerate_config: Path, tmp_path: Path) -> None:
    assert SAME in run("accelerate.sh", *TASK, "--out", str(tmp_path), CONFIG=accelerate_config)


@needs_accelerate
def test_two_nodes_by_accelerate(accelerate_config: Path, who: Path) -> None:
    settings: dict[str, Any] = {"NNODES": 2, "NPROC": 1, "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}", "SCRIPT": who}
    own = [Node("accelerate.sh", CONFIG=accelerate_config, NODE_RANK=place, **settings) for place in range(2)]
    with running(*own) as nodes:
        assert_two_nodes_of_one_rank(*(node.output() for node in nodes))


@pytest.mark.slow
@needs_deepspeed
def test_one_node_by_deepspeed(tmp_path: Path) -> None:
    task = ("--parallel", "zero2", *TASK[2:])
    output = run("deepspeed.sh", *task, "--out", str(tmp_path), NPROC=2, RDZV_ENDPOINT=f"127.0.0.1:{free_port()}")
    assert SAME in output


@needs_deepspeed
@pytest.mark.slow
def test_two_nodes_by_deepspeed(tmp_path: Path, who: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    settings: dict[str, Any] = {"HOSTFILE": hosts, "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}", "SCRIPT": who}
    with running(*(Node("deepspeed.sh", "-x", NODE_RANK=place, **settings) for place in range(2))) as nodes:
        outputs = [node.output() for node in nodes]
    assert_two_nodes_of_one_rank(*outputs)
    assert [rank["arguments"] for rank in told(*outputs)] == [["-x"], ["-x"]]


@pytest.mark.slow
@needs_deepspeed
def test_the_example_for_deepspeed() -> None:
    """By torchrun and by DeepSpeed's launcher, at two stages: the same norms."""

    def norms(launcher: str, config: str, **settings: Any) -> list[str]:
        task = (
            "--config",
            str(LAUNCH / "deepspeed" / config),
            "--steps",
            "3",
            "--distclip-rule",
            "global_norm=0.1",
        )
        output = run(launcher, *task, SCRIPT=LAUNCH / "deepspeed_train.py", NPROC=2, **settings)
        return re.findall(r"step \d: loss [\d.]+, norm [\d.]+, times 0\.0\d+", output)

    one = norms("torchrun.sh", "zero3.json")
    other = norms("deepspeed.sh", "zero1.json", RDZV_ENDPOINT=f"127.0.0.1:{free_port()}")
    assert len(one) == 3
    assert one == other


@needs_deepspeed
@ranks(2, timeout=120)
@pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "file",
    [
        pytest.param(config.name, marks=[] if config.stem in ("zero0", "fp16", "offload") else [pytest.mark.slow])
        for config in CONFIGS
    ],
)
def test_configurations_of_deepspeed(file: str) -> None:
    """Each file, as it is, makes an engine whose clipped step is that of one process; no file clips by itself."""
    from tests import test_deepspeed as engines

    deepspeed = engines.start_deepspeed()
    config = json.loads((LAUNCH / "deepspeed" / file).read_text())
    assert config["gradient_clipping"] == 0.0
    if "fp16" in config:
        engines.allow_fp16_on_cpu()
    torch.manual_seed(1)
    model = engines.Net()
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=str(LAUNCH / "deepspeed" / file))
    clipper = GradClipper(engine, 0.5)

    def backward(step: int) -> None:
        x = torch.randn(8, 7, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        engine.backward(10 * engine(x.to(next(engine.module.parameters()))).float().square().mean())

    if "fp16" in config:
        # Its loss scale begins so high that the first steps overflow.
        engine.optimizer.loss_scale = 64.0
    for step in range(2):
        backward(step)
        engines.check_step(engine, clipper, "global")


def test_there_is_a_configuration_for_each_way() -> None:
    assert [config.stem for config in CONFIGS] == ["bf16", "fp16", "offload", "zero0", "zero1", "zero2", "zero3"]


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        ("torchrun_nodes.sh", {}, "torchrun_nodes.sh: set NNODES, the number of nodes, such as NNODES=2"),
        ("torchrun_nodes.sh", {"NNODES": 2}, "set RDZV_ENDPOINT, host:port of one of the nodes"),
        ("accelerate.sh", {}, "accelerate.sh: set CONFIG, a configuration of Accelerate"),
        ("accelerate.sh", {"CONFIG": "x", "NNODES": 2}, "set NODE_RANK, this node's number"),
        ("accelerate.sh", {"CONFIG": "x", "NNODES": 2, "NODE_RANK": 0}, "set RDZV_ENDPOINT, host:port of node 0"),
        ("deepspeed.sh", {"NODE_RANK": 0}, "set HOSTFILE, the file with all nodes"),
        ("deepspeed.sh", {"NODE_RANK": 0, "HOSTFILE": "x"}, "set RDZV_ENDPOINT, host:port of node 0"),
    ],
)
def test_settings_that_are_missing(script: str, settings: dict[str, Any], message: str) -> None:
    assert message in run(script, status=2, **settings)


def test_a_failing_script_fails_the_launcher(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("import sys; sys.exit(3)")
    assert "exitcode" in run("torchrun.sh", status=1, NPROC=1, SCRIPT=script)


def test_the_map_names_every_file_and_no_other() -> None:
    """launch/README.md: what it names is there, and all that is there is named."""
    text = (LAUNCH / "README.md").read_text()
    named = {name.removeprefix("launch/") for name in re.findall(r"[\w*./-]+\.(?:py|sh|yaml|json|txt|png)\b", text)}
    named -= {"my_train.py"}
    found = {name: {str(path.relative_to(LAUNCH)) for path in LAUNCH.glob(name)} for name in named}
    assert not [name for name, files in found.items() if not files], "named, and not there"
    there = {str(path.relative_to(LAUNCH)) for path in LAUNCH.rglob("*") if path.is_file()}
    there -= {name for name in there if name.endswith("README.md") or "__pycache__" in name}
    assert not there - set().union(*found.values()), "there, and not named"
