"""What users start, started as they start it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def start(*arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(ROOT / "launch" / "train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)


def steps(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("parallel", "ranks", "model"),
    [
        ("ddp", 2, "lstm"),
        ("fsdp1", 2, "transformer"),
        ("fsdp2", 2, "lstm"),
        ("hsdp", 4, "transformer"),
        ("tp", 2, "transformer"),
        ("hsdp+tp", 4, "transformer"),
        ("pp+fsdp2", 4, "transformer"),
        ("ep", 2, "transformer"),
        ("zero1", 2, "lstm"),
        ("zero3", 2, "transformer"),
    ],
)
def test_many_ranks_train_as_one_process(parallel: str, ranks: int, model: str, tmp_path: Path) -> None:
    task = ("--parallel", parallel, "--model", model, "--steps", "8", "--rule", "global_norm=0.1")
    done = start(*task, "--compare", "--out", str(tmp_path), ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same training" in done.stdout
    assert "Warning" not in done.stderr
    logged = steps(tmp_path)
    assert [step["step"] for step in logged] == list(range(1, 9))
    assert any(step["clipped"] for step in logged)
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    def run(out: str, *more: str) -> list[tuple[object, object]]:
        done = start("--accumulate", "2", "--out", str(tmp_path / out), *more)
        assert done.returncode == 0, done.stdout + done.stderr
        return [(step["loss"], step["total_norm"]) for step in steps(tmp_path / out)]

    whole = run("whole", "--steps", "8")
    saved = ("--checkpoint", str(tmp_path / "checkpoint"))
    run("resumed", "--steps", "5", *saved)
    assert run("resumed", "--steps", "8", "--resume", *saved) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rule", "globalnorm=1"), "did you mean 'global_norm'"),
        (("--batch", "7", "--accumulate", "2"), "--batch 7 must be divisible"),
        (("--model", "lstm", "--data", "text"), "--model lstm reads --data digits"),
        (("--parallel", "everywhere"), "invalid choice: 'everywhere'"),
        (("--parallel", "pp", "--model", "lstm"), "--parallel pp"),
        (("--model", "transformer", "--text", "/nowhere"), "/nowhere: no such file"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str) -> None:
    done = start(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
