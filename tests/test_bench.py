"""``distclip bench``: the arithmetic on a clock that is made up, and the real command at sizes that take no time.

No test looks at how long anything took.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distclip.bench import Case, Row, default_cases, product_of
from distclip.bench import run as bench_run
from distclip.bench.cases import KINDS, MI, RANKS, Target
from distclip.bench.command import Options, cases_of
from distclip.bench.counters import peak_memory, recorded_collectives
from distclip.bench.layouts import local_grads, spread_of
from distclip.bench.machine import busy, machine
from distclip.bench.picture import bench_figure
from distclip.bench.rounds import middle, orders, quartiles, ratios, slowest, timed
from distclip.bench.sides import LIMIT, OURS, STEP, TORCH, sides_of
from distclip.bench.table import HEAD, cells, label, legend, seconds
from distclip.bench.values import Values
from tests.test_cli import parsed, run
from tests.test_launch import start

CPU = torch.device("cpu")
FIELDS = {
    "layout", "kind", "tensors", "numel", "dtype", "ranks", "device", "threads", "rounds", "torch_way", "torch_seconds",
    "distclip_seconds", "limit_seconds", "step_seconds", "ratio", "ratio_low", "ratio_high", "limit_ratio",
    "whole_ratio", "collectives", "torch_collectives", "host_syncs", "torch_host_syncs", "gradient_bytes",
    "memory_bytes", "torch_memory_bytes", "memory_share", "memory_target", "target", "misses",
}  # fmt: skip


def row(**values: Any) -> Row:
    """A row of a case that torch takes 4 s for, of which the step is none."""
    told: dict[str, Any] = {
        "case": Case(),
        "threads": 2,
        "rounds": 3,
        "torch_way": "torch.nn.utils.clip_grad_norm_",
        "torch_seconds": 4.0,
        "distclip_seconds": 1.0,
        "limit_seconds": 0.5,
        "step_seconds": None,
        "ratio": 0.25,
        "ratio_low": 0.2,
        "ratio_high": 0.3,
        "limit_ratio": 2.0,
        "whole_ratio": 0.25,
        "collectives": 1,
        "torch_collectives": 1,
        "host_syncs": None,
        "torch_host_syncs": None,
        "gradient_bytes": 10_000,
        "memory_bytes": 10,
        "torch_memory_bytes": 5,
    }
    return Row(**(told | values))


# Rounds


class Clock:
    """Time that passes only where a way says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def way(self, name: str, *takes: float) -> Callable[[], None]:
        left = iter(takes)

        def go() -> None:
            self.ran.append(name)
            self.now += next(left)

        return go

    def __call__(self) -> float:
        return self.now


def test_ways_alternate_and_each_is_first_in_turn() -> None:
    names = ["torch", "distclip", "limit"]
    found = orders(names, 6)
    assert all(sorted(order) == sorted(names) for order in found)
    assert Counter(order[0] for order in found) == dict.fromkeys(names, 2)
    assert len(set(map(tuple, found))) == 6
    # Whatever runs before a way leaves something in the caches: it is not always the same one.
    for name in names:
        befores = {order[order.index(name) - 1] for order in found if order.index(name)}
        assert befores == set(names) - {name}


def test_only_the_ways_are_timed_and_each_round_runs_all_of_them() -> None:
    clock = Clock()
    ways = {"a": clock.way("a", 1, 2, 3), "b": clock.way("b", 10, 20, 30)}
    before, after = clock.way("before", *[1000] * 6), clock.way("after", *[0.5] * 6)
    times = timed(ways, 3, before=before, after=after, clock=clock)
    assert times == {"a": [1.5, 2.5, 3.5], "b": [10.5, 20.5, 30.5]}
    assert [name for name in clock.ran if name in ways] == ["a", "b", "b", "a", "b", "a"]
    assert clock.ran[:3] == ["before", "a", "after"]


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    # A machine that was ten times slower in one round: the ratio of the medians would be 3 / 4.
    times = {"torch": [2.0, 4.0, 40.0], "distclip": [1.0, 3.0, 10.0]}
    found = ratios(times, "distclip", "torch")
    assert found == [0.5, 0.75, 0.25]
    assert middle(found) == 0.5
    assert quartiles(found) == (0.375, 0.625)
    assert (middle([]), quartiles([]), quartiles([2.0])) == (None, (None, None), (2.0, 2.0))


def test_the_extra_over_a_step() -> None:
    times = {"torch": [14.0, 12.0, 9.0], "distclip": [11.0, 11.0, 11.0], "step": [10.0, 10.0, 10.0], "limit": [2.0] * 3}
    # In the third round nothing is left of torch's.
    assert ratios(times, "distclip", "torch", less="step", over_less="step") == [0.25, 0.5]
    assert ratios(times, "distclip", "limit", less="step") == [0.5] * 3


def test_a_round_takes_as_long_as_its_slowest_rank() -> None:
    assert slowest([{"a": [1.0, 5.0], "b": [0.0, 1.0]}, {"a": [2.0, 3.0], "b": [1.0, 0.0]}]) == {
        "a": [2.0, 5.0],
        "b": [1.0, 1.0],
    }


# Sides


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_come_back_and_are_all_read(dtype: torch.dtype) -> None:
    grads = [torch.zeros(3, dtype=dtype), torch.zeros(2, 2, dtype=dtype)]
    values = Values(grads, seed=0)
    values.restore()
    before = [grad.clone() for grad in grads]
    for grad in grads:
        grad.mul_(1e-3)
    values.restore()
    assert all(torch.equal(grad, kept) for grad, kept in zip(grads, before, strict=True))
    assert all(grad.count_nonzero() == grad.numel() for grad in grads)
    assert values.nbytes == 7 * dtype.itemsize
    # An odd element of two bytes is not read.
    assert values._read.nbytes == values.nbytes - (2 if dtype.itemsize == 2 else 0)
    if dtype.itemsize > 2:
        torch.testing.assert_close(values.read(), torch.cat([grad.flatten() for grad in grads]).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_torch_s_way_and_distclip_s_do_the_same(kind: str) -> None:
    """What is timed against each other leaves the same gradients, or the same parameters."""
    left = {}
    for name in (TORCH, OURS):
        torch.manual_seed(0)
        spread = spread_of(Case("single", kind, 3, 50), CPU)
        sides = sides_of(Case("single", kind, 3, 50), spread)
        assert list(sides.ways) == [TORCH, OURS, *([STEP] if kind in ("folded", "scaler") else []), LIMIT]
        for _ in range(2):
            sides.values.restore()
            given = [grad.clone() for grad in local_grads(spread.model)]
            sides.ways[name]()
        left[name] = [param.detach().clone() for param in spread.model.parameters()], local_grads(spread.model)
        changed = not all(map(torch.equal, given, local_grads(spread.model)))
        # A scaler's gradients are unscaled at least.
        assert changed == (kind in ("clipped", "folded", "scaler"))
    for mine, others in zip(left[OURS], left[TORCH], strict=True):
        torch.testing.assert_close(mine, others, rtol=2e-6, atol=1e-7)


# Counters


def test_peak_memory_counts_what_lives_at_one_time_and_temporaries() -> None:
    numbers = torch.ones(10_000)

    def one_after_the_other() -> None:
        for _ in range(3):
            numbers.clone()

    def together() -> None:
        first, second = numbers.clone(), numbers.clone()
        del first, second

    def inside_an_operator() -> None:
        torch.nn.functional.softmax(numbers.half(), 0, dtype=torch.float32)

    assert peak_memory(one_after_the_other, CPU) == 40_000
    assert peak_memory(together, CPU) == 80_000
    assert peak_memory(inside_an_operator, CPU) >= 60_000


def test_peak_memory_says_nothing_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    peak_memory(lambda: torch.ones(3), CPU)
    print("still here", file=sys.stderr)
    assert capfd.readouterr().err == "still here\n"


def test_no_collective_without_a_job() -> None:
    with recorded_collectives() as names:
        torch.ones(3).sum()
    assert names == []


# Cases, table, picture


def test_the_default_list_has_every_layout_kind_and_target() -> None:
    cases = default_cases()
    assert {case.layout for case in cases} == set(RANKS)
    assert {case.kind for case in cases} == set(KINDS)
    targets = {(case.layout, case.kind, case.dtype, case.tensors): case.target for case in cases if case.target}
    assert {place: target.most for place, target in targets.items()} == {
        ("single", "unclipped", "float32", 120): 0.35,
        ("single", "clipped", "float32", 120): 0.70,
        ("single", "folded", "float32", 120): 0.45,
        ("single", "unclipped", "bfloat16", 60): 0.60,
        ("single", "unclipped", "float16", 60): 0.60,
        ("single", "unclipped", "float32", 20_000): 0.40,
        ("fsdp2", "clipped", "float32", 2_000): 0.22,
    }
    assert [case.ranks for case in cases] == sorted(case.ranks for case in cases), "those of as many ranks together"
    assert all(case.layout == "single" for case in default_cases(ranks=1))
    assert {case.layout for case in default_cases(ranks=2)} == set(RANKS) - {"hsdp", "fsdp2+tp"}
    assert all(case.target is None and not case.judged and case.numel <= 1024 for case in default_cases(quick=True))
    on_gpu = [case for case in default_cases(devices=["cuda"]) if case.layout == "single"]
    assert {(case.kind, case.target.of, case.tensors * MI * 4 >> 20) for case in on_gpu if case.target} >= {
        ("norm", "limit", 1024),
        ("scaler", "torch", 1200),
    }


def test_a_cross_product() -> None:
    cases = product_of(["single", "fsdp2"], ["clipped"], [1, 2], [8], ["float32", "bfloat16"])
    assert len(set(cases)) == 8
    assert {(case.layout, case.ranks) for case in cases} == {("single", 1), ("fsdp2", 2)}


def test_in_a_job_the_cases_are_those_of_its_ranks() -> None:
    asked = dict.fromkeys(("layout", "kind", "tensors", "numel", "dtype"))
    assert {case.layout for case in cases_of(Options(asked), 4)} == set(RANKS) - {"single"}
    assert {case.ranks for case in cases_of(Options(asked), 4)} == {4}
    (case,) = cases_of(Options(asked | {"kind": ["norm"]}, device="cpu"), 4)
    assert (case.layout, case.ranks) == ("fsdp2", 4)


@pytest.mark.parametrize(
    ("values", "misses"),
    [
        ({}, []),
        ({"case": Case(target=Target(0.25))}, []),
        ({"case": Case(target=Target(0.24))}, ["time"]),
        ({"case": Case(target=Target(2.0, "limit"))}, []),
        ({"case": Case(target=Target(1.9, "limit"))}, ["time"]),
        ({"case": Case(target=Target(1.0)), "ratio": None}, ["time"]),
        ({"collectives": 2}, ["collectives"]),
        ({"host_syncs": 0}, []),
        ({"host_syncs": 1}, ["host syncs"]),
        ({"memory_bytes": 100}, ["memory"]),
        ({"memory_bytes": 100, "case": Case(judged=False)}, []),
    ],
)
def test_what_is_not_met(values: dict[str, Any], misses: list[str]) -> None:
    found = row(**values)
    assert found.misses == misses == found.to_dict()["misses"]
    met = cells(found)[HEAD.index("met")]
    assert met == (f"no: {misses[0]}" if misses else "yes" if found.case.target else "-")


def test_a_row_in_text() -> None:
    told = dict(zip(HEAD, cells(row(case=Case("fsdp2", ranks=2), step_seconds=0.5, host_syncs=0)), strict=True))
    assert told["case"] == label(Case("fsdp2", ranks=2)) == "fsdp2 on 2: 120 x 1Mi fp32, unclipped"
    assert (told["torch"], told["distclip"], told["read"]) == ("3.50 s", "500 ms", "500 ms")
    assert (told["coll."], told["syncs"], told["memory"]) == ("1 (1)", "0", "0.10%")
    no_torch = row(torch_seconds=None, ratio=None, ratio_low=None, ratio_high=None, torch_way="none")
    assert cells(no_torch)[1] == cells(no_torch)[4] == "-"
    assert "there is none to compare with" in " ".join(legend([replace(no_torch, case=Case("pipeline", ranks=2))]))
    assert [seconds(value) for value in (2.0, 0.0123, 4.56e-5)] == ["2.00 s", "12.3 ms", "45.6 us"]


def test_a_busy_machine_is_told() -> None:
    assert "rough" in busy({"load": 3.0, "cores": 2})
    assert busy({"load": 0.2, "cores": 2}) == busy({"load": None, "cores": 2}) == ""


def test_the_picture_has_a_bar_a_case_and_marks() -> None:
    pytest.importorskip("matplotlib")
    rows = (
        row(case=Case(target=Target(0.35))),
        row(case=Case("fsdp2", ranks=2), ratio=1.5),
        row(ratio=None, torch_seconds=None),
    )
    here = machine()
    (axes,) = bench_figure(bench_run.Results(here, rows)).axes
    assert [bar.get_width() for bar in axes.patches] == [0.25, 1.5]
    one, read, target = axes.lines
    assert list(one.get_xdata()) == [1.0, 1.0]
    assert list(read.get_xdata()) == [0.125, 0.125]
    assert list(target.get_xdata()) == [0.35]
    (empty,) = bench_figure(bench_run.Results(here, rows[2:])).axes
    assert empty.texts


# The command


def assert_plausible(found: dict[str, Any]) -> None:
    assert set(found) == FIELDS
    assert found["distclip_seconds"] > 0
    assert found["limit_seconds"] > 0
    assert found["collectives"] == (0 if found["layout"] in ("single", "ddp") else 1)
    assert 0 < found["memory_bytes"] < 1_000_000
    assert found["memory_share"] == found["memory_bytes"] / found["gradient_bytes"]
    held = found["ranks"] if found["layout"] not in ("single", "ddp", "hsdp") else max(1, found["ranks"] // 2)
    held = 1 if found["layout"] == "ddp" else held
    width = getattr(torch, found["dtype"]).itemsize
    assert found["gradient_bytes"] == found["tensors"] * found["numel"] * width // held
    assert (found["step_seconds"] is None) == (found["kind"] not in ("folded", "scaler"))
    assert (found["torch_seconds"] is None) == (found["layout"] == "pipeline") == (found["torch_way"] == "none")
    if found["torch_seconds"] is not None and found["step_seconds"] is None:
        assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"]
        assert found["ratio"] == found["whole_ratio"]


def test_quick_in_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    told = parsed(capsys, "bench", "--quick", "--ranks", "1", "--threads", "1", "--device", "cpu")
    assert set(told) == {"machine", "cases", "rows", "failures"}
    assert told["machine"]["torch"] == torch.__version__
    assert told["machine"]["threads"] == 1
    assert {found["kind"] for found in told["rows"]} == set(KINDS) == set(told["cases"])
    assert {found["dtype"] for found in told["rows"]} == {"float32", "bfloat16", "float16"}
    for found in told["rows"]:
        assert_plausible(found)
        assert (found["rounds"], found["misses"]) == (3, [])


def test_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    before = torch.get_num_threads()
    picture = tmp_path / "new" / "bench.svg"
    options = ("--quick", "--case", "clipped", "--numel", "64", "--rounds", "2", "--device", "cpu", "--plot", picture)
    code, out, err = run(capsys, "bench", *options)
    assert (code, err) == (0, "")
    assert f"torch {torch.__version__}" in out.splitlines()[0]
    assert "single: 24 x 64" in out
    assert "clipped: GradClipper.clip() that halves every gradient." in out
    assert out.endswith(f"{picture}\n")
    assert "<svg" in picture.read_text()
    assert torch.get_num_threads() == before


@pytest.mark.timeout(120)
@pytest.mark.slow
def test_ranks_that_the_command_starts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "bench.png"
    layouts = ("ddp", "fsdp1", "fsdp2", "tp", "pipeline")
    options = [part for layout in layouts for part in ("--layout", layout)]
    kinds = ("--case", "folded", "--device", "cpu", "--plot", picture)
    told = parsed(capsys, "bench", "--quick", *options, *kinds)
    assert told["failures"] == []
    assert told["plot"] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [found["layout"] for found in told["rows"]] == list(layouts)
    for found in told["rows"]:
        assert_plausible(found)
        assert (found["ranks"], found["threads"], found["misses"]) == (2, 1, [])
    found = {each["layout"]: each for each in told["rows"]}
    assert found["fsdp1"]["torch_way"] == "FSDP1's model.clip_grad_norm_"
    # What DTensor does inside an operator is seen too.
    assert found["fsdp2"]["torch_collectives"] >= 1
    assert found["ddp"]["torch_collectives"] == 0


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_four_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    told = parsed(capsys, "bench", "--quick", "--ranks", "4", "--device", "cpu")
    assert {found["layout"] for found in told["rows"]} == set(RANKS)
    for found in told["rows"]:
        assert_plausible(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fails for want of a GPU")
@pytest.mark.slow
def test_a_rank_that_fails_is_told() -> None:
    results = bench_run.bench([Case("ddp", tensors=2, numel=8, ranks=2, device="cuda")], rounds=1)
    assert results.rows == ()
    (failure,) = results.failures
    assert failure.startswith("ddp, unclipped, on 2 ranks: ")
    assert "CUDA" in failure
    assert results.to_dict()["failures"] == [failure]


@pytest.mark.slow
def test_under_torchrun() -> None:
    done = start("--quick", "--layout", "fsdp2", "--json", "--device", "cpu", script="bench.py", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)  # one rank prints
    (found,) = told["rows"]
    assert_plausible(found)
    assert (found["ranks"], found["layout"]) == (2, "fsdp2")
    assert "Warning" not in done.stderr


def test_what_watching_costs(capsys: pytest.CaptureFixture[str]) -> None:
    told = parsed(capsys, "bench", "--monitor", "--quick", "--rounds", "2", "--device", "cpu")
    assert [each["details_every"] for each in told["monitor"]] == [0, 10]
    for each in told["monitor"]:
        assert 0 < each["ratio_lowest"] <= each["ratio"] <= each["ratio_highest"]
        assert (each["rounds"], each["steps"], each["device"]) == (2, 3, "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "fsdp3"], "unknown --layout 'fsdp3'; did you mean 'fsdp2'?"),
        (["--case", "cliped"], "unknown --case 'cliped'; did you mean 'clipped'?"),
        (["--dtype", "int8"], "unknown --dtype 'int8'"),
        (["--tensors", "0"], "--tensors must be at least 1, got 0"),
        (["--numel", "-1"], "--numel must be at least 1, got -1"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--ranks", "0"], "--ranks must be at least 1, got 0"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["--layout", "single", "--ranks", "2"], "--layout single is one process, got --ranks 2"),
        (["--layout", "ddp", "--ranks", "1"], "--layout ddp needs two ranks or more, got --ranks 1"),
        (["--layout", "hsdp", "--ranks", "2"], "--layout hsdp needs an even number of ranks, four or more"),
        (["--layout", "fsdp2", "--numel", "7"], "--numel must be a multiple of the 2 ranks"),
        (["--layout", "pipeline", "--tensors", "1"], "--tensors must be at least one for each of the pipeline's 2"),
        (["--case", "scaler", "--dtype", "float16"], "--case scaler measures --dtype float32"),
        (["--plot", "a.pdf"], "--plot must end in .png or .svg, got 'a.pdf'"),
        (["--monitor", "--case", "norm"], "--monitor trains a model of its own in one process: leave out --case"),
        (["--monitor", "--ranks", "2"], "--monitor trains a model of its own in one process: leave out --ranks"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "bench", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"distclip: {message}")
    assert err.count("\n") == 1


def test_a_job_of_other_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for arguments, message in (
        (["--ranks", "2"], "--ranks 2: the job that this runs in has 4 ranks; leave --ranks out"),
        (["--monitor"], "--monitor is for one process, this is a job of 4 ranks"),
        (["--layout", "single"], "--layout single is one process, got --ranks 4"),
    ):
        code, out, err = run(capsys, "bench", *arguments)
        assert (code, out) == (2, "")
        assert err.startswith(f"distclip: {message}")


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run(capsys, "bench", "--device", "cuda")
    assert (code, err) == (2, "distclip: --device cuda: there is no GPU that torch can use here\n")


@pytest.mark.gpu
def test_quick_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    told = parsed(capsys, "bench", "--quick", "--ranks", "1", "--device", "cuda")
    for found in told["rows"]:
        assert_plausible(found)
        assert found["host_syncs"] == 0
