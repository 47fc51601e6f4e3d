"""launch/scale.py: what it measures, fits and models, and what docs/scale.md tells of it."""

import importlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "scale.md"


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    return importlib.import_module("scale")


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "scale.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_the_document_shows_the_model() -> None:
    done = start("--model")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 8
    assert f"\n{done.stdout}" in DOCUMENT.read_text()


def test_all_reduce_by_hand(scale: Any) -> None:
    """16 nodes of 8 GPUs: up and down 7 hops inside and 4 between, and what any costs."""
    seconds = scale.all_reduce_seconds(scale.Collective(16, 8, 56))
    assert seconds == pytest.approx(4.4e-6 + 5e-6 + 2 * (7 * 0.52e-6 * 1.8 + 4 * 5e-6) + 56 / 1e10)
    assert scale.all_reduce_seconds(scale.Collective(1, 1, 56)) == 0.0


def test_reading_by_hand(scale: Any) -> None:
    cost = scale.model(16, [], 70e9, 723)
    assert cost.read == pytest.approx(4 * 70e9 / 16 / (0.8 * 3.35e12))
    assert cost.total == cost.read
    # On many GPUs what is left to read takes no longer than to launch the kernels.
    assert scale.model(2**20, [], 70e9, 723).read == pytest.approx((8 + 5) * 5e-6)


def test_fit_finds_the_constants_again(scale: Any) -> None:
    constants = (3e-4, 2e-5, 1e-10, 5e-4)
    fit = scale.Fit("torch", constants, (0.0,) * 4, 0.0)
    cases = [case for sweep in scale.sweeps(False) for case in sweep]
    noisy = [1.0 + 0.02 * math.sin(17.0 * place) for place in range(len(cases))]
    for noise, tolerance in (([1.0] * len(cases), 1e-6), (noisy, 0.2)):
        timings = [
            scale.Timing(case, "torch", fit.seconds(case) * factor) for case, factor in zip(cases, noise, strict=True)
        ]
        found = scale.fitted(timings, "torch")
        assert found.constants == pytest.approx(constants, rel=tolerance)
        assert found.off < 0.03
    assert all(
        abs(got - want) < 4 * error for got, want, error in zip(found.constants, constants, found.errors, strict=True)
    )


def test_two_ranks_are_measured_and_drawn(scale: Any, tmp_path: Path) -> None:
    cases = [scale.Case(2, 3, 8), scale.Case(2, 20, 8), scale.Case(2, 20, 4096)]
    timings = scale.measure(cases)
    assert [(timing.case, timing.way) for timing in timings] == [(case, way) for case in cases for way in scale.COLOURS]
    assert all(0 < timing.seconds < 10 for timing in timings)
    fits = [scale.Fit(way, (1e-4, 1e-5, 1e-9, 0.0), (0.0,) * 4, 0.0) for way in scale.COLOURS]
    scale.save_picture(timings, fits, [cases, cases, cases], tmp_path / "scale.png")
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
    lines = scale.report(timings, fits).splitlines()
    assert lines[2].startswith("| 2 | 3 | 9.16e-05 | ")
    assert "| torch | 100 ± 0 | 10 ± 0 |" in lines[10]


def test_a_picture_of_another_kind() -> None:
    done = start("--out", "scale.jpg")
    assert done.returncode == 2
    assert "--out: must end in .png, got 'scale.jpg'" in done.stderr


def test_the_picture_is_small() -> None:
    assert 0 < (ROOT / "docs" / "pictures" / "scale.png").stat().st_size < 150_000


def test_a_rank_that_fails_is_told(scale: Any) -> None:
    with pytest.raises(RuntimeError, match="1 ranks ended with status"):
        scale.measure([scale.Case(1, 1, -1)])
