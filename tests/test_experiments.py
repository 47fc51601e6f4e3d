"""The tutorials' experiments, started as users start them: what they claim, on one process and on two ranks alike."""

import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

import pytest

from distclip.rules import parse
from distclip.runs import Run, read_run
from tests import test_rule_peers as peers

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "launch" / "experiments"
needs_keras = pytest.mark.skipif(find_spec("keras") is None, reason="Keras is not installed: pip install keras")


def start(name: str, out: Path, *arguments: str, ranks: int = 1) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    # Keras would write its settings into the home directory.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KERAS_BACKEND": "torch", "KERAS_HOME": str(out / "keras")}
    command = [sys.executable, *launcher, str(EXPERIMENTS / f"{name}.py"), *arguments, "--out", str(out)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def ended(process: subprocess.Popen[str]) -> str:
    """What it has printed."""
    try:
        output, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 0, output + errors
    return output


def experiment(name: str, tmp_path: Path, *arguments: str) -> tuple[dict[str, Run], str]:
    """The logs of its runs, which are those of two ranks too, and what it prints."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    processes = [start(name, alone, *arguments), start(name, together, *arguments, ranks=2)]
    output, _ = map(ended, processes)
    drawn = alone / f"{name}.png"
    if name != "keras_users" or find_spec("keras") is not None:
        assert drawn.read_bytes().startswith(b"\x89PNG")
    runs = {path.stem: read_run(path) for path in sorted(alone.glob("*.jsonl"))}
    assert sorted(runs) == sorted(path.stem for path in together.glob("*.jsonl"))
    for run, log in runs.items():
        other = read_run(together / f"{run}.jsonl")
        assert (log.info["world_size"], other.info["world_size"]) == (1, 2)
        assert numbers(log) == numbers(other), f"{run}: two ranks trained otherwise than one process"
    return runs, output


def numbers(run: Run) -> list[str]:
    """All that was logged of every step, to the last bit; NaN is NaN."""
    return [repr(sorted(record.metrics.items())) for record in run.records]


def losses(run: Run) -> list[float]:
    return run.series("loss")


def test_regression(tmp_path: Path) -> None:
    runs, output = experiment("regression", tmp_path, "--epochs", "12")
    assert math.isnan(losses(runs["none"])[-1])
    assert len(runs["none"].steps) < 10, "it explodes within the first epoch"
    assert all(map(math.isfinite, runs["value"].series("grad_norm")))
    assert len(runs["value"].steps) == 12 * 8
    assert losses(runs["value"])[-1] < 0.05 * losses(runs["value"])[0]
    assert "not finite from step" in output


@pytest.mark.slow
def test_digits(tmp_path: Path) -> None:
    runs, output = experiment("digits", tmp_path, "--epochs", "5")
    accuracy = {line.split()[0]: float(re.findall(r"score (\S+)", line)[0]) for line in output.splitlines()}
    assert accuracy["none"] < 0.2
    assert accuracy["value"] > 0.5
    assert losses(runs["norm"])[-1] < 0.8 * losses(runs["norm"])[0] < losses(runs["none"])[-1]
    after = runs["norm"].series("grad_norm_clipped")
    assert max(after) == pytest.approx(2.0, rel=1e-5)


@pytest.mark.slow
def test_long_sequences(tmp_path: Path) -> None:
    runs, _ = experiment("long_sequences", tmp_path, "--steps", "250")
    guessing = math.log(4)
    assert sum(losses(runs["none"])[-50:]) / 50 > 0.97 * guessing
    assert sum(losses(runs["norm"])[-50:]) / 50 < 0.9 * guessing
    assert max(runs["norm"].series("grad_norm")) > 10
    assert max(runs["norm"].series("grad_norm_clipped")) == pytest.approx(1.0, rel=1e-5)


def table(output: str) -> dict[str, str]:
    """The difference in each row of the table."""
    rows = [[cell.strip(" `") for cell in line.split("|")] for line in output.splitlines() if line.startswith("| `")]
    return {row[1]: row[4] for row in rows}


@pytest.mark.slow
def test_functions_of_tensorflow(tmp_path: Path) -> None:
    output = ended(start("keras_users", tmp_path, "--epochs", "1"))
    found = {name: apart for name, apart in table(output).items() if name.startswith("tf.")}
    assert len(found) == 4
    # torch's 1e-6 beside the global norm, which TensorFlow has not.
    limits = {name: 1e-6 if "global" in name else 1e-12 for name in found}
    assert all(float(apart) <= limits[name] for name, apart in found.items()), found
    if find_spec("keras") is None:
        assert output.count("not compared | Keras is not installed: pip install keras") == 3


@needs_keras
def test_keras_trains_the_same(tmp_path: Path) -> None:
    found = {name: float(apart) for name, apart in table(ended(start("keras_users", tmp_path))).items()}
    trained = [apart for name, apart in found.items() if name.startswith("SGD")]
    assert len(trained) == 3
    assert max(trained) < 1e-5, "rounding in float32 over ten epochs"


@pytest.mark.slow
def test_the_rules_of_keras_users_on_two_ranks(tmp_path: Path) -> None:
    experiment("keras_users", tmp_path, "--epochs", "10")


@pytest.mark.parametrize(
    ("function", "case"),
    {
        "tf.clip_by_value(g, -0.1, 0.5)": "value, a pair",
        "tf.clip_by_norm(g, 1.5)": "norm",
        "tf.clip_by_global_norm(grads, 4.0)": "global_norm",
        "tf.clip_by_average_norm(g, 0.1)": "average_norm",
    }.items(),
)
def test_formulas_are_those_of_the_rules(function: str, case: str) -> None:
    """As the tests of the rules write them down, which are held against Keras too."""
    text, formula = run_path(str(EXPERIMENTS / "tf_formulas.py"))["TENSORFLOW"][function]
    assert str(parse(text)) == str(peers.CASES[case].rule())
    limit = peers.NO_EPSILON if case == "global_norm" else peers.EXACT
    peers.assert_same(peers.run(lambda weights: formula), peers.run(peers.CASES[case].mathematics), limit)


def test_mistakes(tmp_path: Path) -> None:
    process = start("regression", tmp_path, "--epochs", "0")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "--epochs 0: expected 1 or more" in errors
