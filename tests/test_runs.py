"""Logs read back: whole, resumed, half written and foreign; what they amount to, and thresholds from them."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import distclip
from distclip.runs import Run, read_run
from distclip.suggest import suggest
from distclip.summary import quantile, summary_of


def logged(path: Path, norms: list[float], first: int = 0, **options: Any) -> Run:
    """A run that a Monitor has written, of these norms."""
    model = nn.Linear(2, 1, bias=False)
    clipper = distclip.GradClipper(model, 1.0, **options)
    clipper.steps = first
    with distclip.Monitor(clipper, [path], alarms=[distclip.alarms.NonFinite()]) as monitor:
        for place, norm in enumerate(norms):
            model.weight.grad = torch.tensor([[0.6, 0.8]]) * norm
            clipper.clip()
            monitor.log(loss=float(len(norms) - place))
    return read_run(path)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    run = logged(tmp_path / "mine.jsonl", [0.5, 2.0, 4.0], details_every=2)
    assert run.name == "mine"
    assert run.info["rule"] == "global_norm=1.0"
    assert run.steps == [1, 2, 3]
    assert run.series("grad_norm") == pytest.approx([0.5, 2.0, 4.0])
    assert run.series("clip_coef") == pytest.approx([1.0, 0.5, 0.25], rel=1e-5)
    assert [record.per_tensor is not None for record in run.records] == [True, False, True]
    assert run.records[2].per_tensor == pytest.approx({"weight": 4.0})
    assert run.broken_lines == 0
    assert np.isnan(run.series("no such")).all()


@pytest.mark.filterwarnings("ignore::distclip.AlarmWarning")
def test_inf_and_nan_and_alarms(tmp_path: Path) -> None:
    run = logged(tmp_path / "run.jsonl", [1.0, math.inf, math.nan])
    assert run.name == tmp_path.name
    assert math.isinf(run.series("grad_norm")[1])
    assert math.isnan(run.series("grad_norm")[2])
    assert [(event.step, event.alarm, event.values["count"]) for event in run.events] == [(2, "nonfinite", 1.0)]


def test_a_resumed_run(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    logged(path, [1.0, 2.0, 3.0])
    with path.open("a") as file:
        file.write('{"kind":"step","step":4,"grad_n')
    run = logged(path, [30.0, 40.0], first=2)
    assert run.steps == [1, 2, 3, 4]
    assert run.series("grad_norm") == pytest.approx([1, 2, 30, 40])
    assert run.broken_lines == 1


@pytest.mark.filterwarnings("ignore::distclip.AlarmWarning")
def test_a_shorter_run_in_the_same_file(tmp_path: Path) -> None:
    logged(tmp_path / "run.jsonl", [10.0, 20.0, math.nan, 40.0])
    run = logged(tmp_path / "run.jsonl", [1.0, 2.0])
    assert run.series("grad_norm") == pytest.approx([1, 2])
    assert run.events == ()


def test_suggestions_say_what_norm_they_are_of(tmp_path: Path) -> None:
    run = logged(tmp_path / "run.jsonl", [1.0, 2.0])
    assert "global_norm=1.95 would" in suggest(run).advice
    run = replace(run, info={"rule": "global_norm=1.0,norm_type=inf"})
    assert "global_norm=1.95,norm_type=inf would" in suggest(run).advice
    assert "norms of order inf" in suggest(run).advice


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ("", "is no log of a run (it has none"),
        ("hello\nworld\n", "is no log of a run (none of its 2 lines is one"),
        ('{"kind":"step","step":"one"}', "none of its 1 lines"),
        ("\x00\xff", "is no log of a run"),
    ],
)
def test_other_files(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"run\.jsonl: ") as error:
        read_run(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@given(st.lists(st.text() | st.dictionaries(st.text(), st.integers() | st.none() | st.text()).map(json.dumps)))
def test_no_file_breaks_the_reader(lines: list[str]) -> None:
    import tempfile

    step = '{"kind":"step","step":3,"grad_norm":"inf","per_tensor":[1]}'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        path.write_text("\n".join([*lines, step, *lines]), encoding="utf-8", errors="surrogatepass")
        assert 3 in read_run(path).steps


def test_summary(tmp_path: Path) -> None:
    norms = [0.5] * 60 + [2.0] * 39 + [10.0]
    with pytest.warns(distclip.AlarmWarning):
        found = summary_of(logged(tmp_path / "run.jsonl", [*norms, math.inf]))
    assert (found.steps, found.first_step, found.last_step) == (101, 1, 101)
    assert (found.median_norm, found.largest_norm, found.largest_norm_step) == pytest.approx((0.5, 10.0, 100))
    assert found.p99_norm == pytest.approx(float(np.quantile(norms, 0.99)), rel=1e-5)
    assert found.clipped == pytest.approx(41 / 101)
    assert (found.skipped, found.nonfinite) == (0, 1)
    assert (found.first_loss, found.last_loss) == pytest.approx((99, 3))
    assert "step 101: a gradient held an inf or NaN" in found.alarms[0]


@given(st.lists(st.floats(-1e9, 1e9), min_size=1), st.floats(0, 1))
def test_quantiles_are_numpy_s(values: list[float], q: float) -> None:
    assert quantile(values, q) == pytest.approx(float(np.quantile(values, q)), rel=1e-9, abs=1e-6)


def test_thresholds_clip_the_share_that_they_say(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    norms = torch.randn(400, generator=generator).exp().tolist()
    found = suggest(logged(tmp_path / "run.jsonl", norms))
    assert found.norms == 400
    shares = {each.percentile: each.clips for each in found.thresholds}
    assert shares == pytest.approx({50: 0.5, 75: 0.25, 90: 0.1, 95: 0.05, 99: 0.01, 99.9: 0.0025})
    limit = next(each.threshold for each in found.thresholds if each.percentile == 95)
    again = logged(tmp_path / "again.jsonl", [norm / limit for norm in norms])  # clipped at 1
    assert sum(record.is_set("clipped") for record in again.records) == 20
    assert f"rule global_norm={limit:.3g} would have clipped one step in twenty" in found.advice


def test_few_norms_are_said_to_be_few(tmp_path: Path) -> None:
    assert suggest(logged(tmp_path / "run.jsonl", [1.0, 2.0])).advice.startswith("These are only 2 norms")


@pytest.mark.filterwarnings("ignore::distclip.AlarmWarning")
def test_nothing_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no step has a finite grad_norm"):
        suggest(logged(tmp_path / "run.jsonl", [math.nan]))
