"""What users start, started as they start it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def start(*arguments: str, ranks: int = 1, script: str = "train.py") -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(ROOT / "launch" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)


def steps(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("parallel", "ranks", "model"),
    [
        pytest.param("ddp", 2, "lstm", marks=pytest.mark.slow),
        pytest.param("fsdp1", 2, "transformer", marks=pytest.mark.slow),
        pytest.param("fsdp2", 2, "lstm", marks=pytest.mark.slow),
        pytest.param("hsdp", 4, "transformer", marks=pytest.mark.slow),
        pytest.param("tp", 2, "transformer", marks=pytest.mark.slow),
        pytest.param("hsdp+tp", 4, "transformer", marks=pytest.mark.slow),
        ("pp+fsdp2", 4, "transformer"),
        pytest.param("ep", 2, "transformer", marks=pytest.mark.slow),
        pytest.param("zero1", 2, "lstm", marks=pytest.mark.slow),
        pytest.param("zero3", 2, "transformer", marks=pytest.mark.slow),
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


@pytest.mark.slow
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
        pytest.param(("--batch", "7", "--accumulate", "2"), "--batch 7 must be divisible", marks=pytest.mark.slow),
        pytest.param(("--model", "lstm", "--data", "text"), "--model lstm reads --data digits", marks=pytest.mark.slow),
        pytest.param(("--parallel", "everywhere"), "invalid choice: 'everywhere'", marks=pytest.mark.slow),
        (("--parallel", "pp", "--model", "lstm"), "--parallel pp"),
        pytest.param(
            ("--model", "transformer", "--text", "/nowhere"), "/nowhere: no such file", marks=pytest.mark.slow
        ),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str) -> None:
    done = start(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def compare_rules(*arguments: str) -> subprocess.CompletedProcess[str]:
    return start(*arguments, script="compare_rules.py")


def test_rules_are_compared(tmp_path: Path) -> None:
    rules = ["none", "global_norm=0.1", "value=-0.003:0.003"]
    task = ("--rules", *rules, "--steps", "16", "--out")
    done = compare_rules(*task, str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    logged = steps(tmp_path)
    runs = {(str(step["model"]), str(step["rule"])) for step in logged}
    assert runs == {(model, rule) for model in ("lstm", "transformer") for rule in rules}
    assert sum(step["rule"] == "global_norm=0.1" for step in logged) == 2 * 16
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / "table.md").read_text().splitlines()
    ]
    assert {tuple(row[:2]) for row in rows[2:]} == runs
    diverged = {rule: verdict for model, rule, *_, verdict in rows[2:] if model == "transformer"}
    assert diverged.pop("none") != "no"
    assert set(diverged.values()) == {"no"}
    lstm = [line for line in (tmp_path / "steps.jsonl").read_text().splitlines() if '"lstm"' in line]
    assert compare_rules("--models", "lstm", *task, str(tmp_path / "again")).returncode == 0
    again = (tmp_path / "again" / "steps.jsonl").read_text().splitlines()
    assert [without_time(line) for line in again] == [without_time(line) for line in lstm]


def without_time(line: str) -> dict[str, object]:
    return {name: value for name, value in json.loads(line).items() if name != "seconds"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(("--rules", "none", "globalnorm=1"), "did you mean 'global_norm'", marks=pytest.mark.slow),
        pytest.param(("--models", "gru"), "invalid choice: 'gru'", marks=pytest.mark.slow),
        pytest.param(("--steps", "0"), "--steps 0: expected 1 or more", marks=pytest.mark.slow),
    ],
)
def test_mistakes_in_comparing_rules(arguments: tuple[str, ...], message: str) -> None:
    done = compare_rules(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
