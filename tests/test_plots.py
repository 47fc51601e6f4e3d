"""Pictures of runs: what is drawn is what was logged, marks stand at the right steps, and every file opens."""

import base64
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon
from torch import nn

import distclip
from distclip import plots
from distclip.plots.columns import Columns, medians, thinned, thinned_flags
from distclip.plots.heatmap import modules_of
from distclip.plots.scales import number
from distclip.plots.share import moving_share
from distclip.plots.style import plain
from distclip.record import Event, Record
from distclip.runs import Run, read_run
from distclip.sinks import JsonLines
from distclip.summary import quantile

pytestmark = pytest.mark.filterwarnings("ignore::distclip.AlarmWarning")

NASTY = '<b>&"$x_</b>'


def clipped(path: Path, norms: Sequence[float], rule: Any = 1.0, losses: Sequence[float] = (), **options: Any) -> Run:
    """A run that a Monitor has written: one tensor whose norms are these."""
    model = nn.Linear(2, 1, bias=False)
    clipper = distclip.GradClipper(model, rule, **options)
    with distclip.Monitor(clipper, [path]) as monitor:
        for place, norm in enumerate(norms):
            model.weight.grad = torch.tensor([[0.6, 0.8]]) * norm
            clipper.clip()
            if losses:
                monitor.log(loss=losses[place])
    return read_run(path)


def made(path: Path, steps: Sequence[dict[str, Any]], events: Sequence[Event] = (), **info: Any) -> Run:
    """A run of these metrics (and ``per_tensor``), written by the sink itself."""
    sink = JsonLines(path)
    sink.start(info)
    sink.write([Record(place, 0.0, {**step}, step.pop("per_tensor", None)) for place, step in enumerate(steps, 1)])
    for event in events:
        sink.event(event)
    sink.close()
    return read_run(path)


def axes_of(draw: Any, *arguments: Any, **options: Any) -> Axes:
    axes = Figure().subplots()
    draw(axes, *arguments, **options)
    return axes


def line(axes: Axes, label: str) -> Line2D:
    (found,) = [each for each in axes.lines if each.get_label() == label]
    return found


def at(axes: Axes, label: str) -> list[float]:
    """The steps that are marked so."""
    return [float(value) for value in np.asarray(line(axes, label).get_xdata())]


def heights(axes: Axes, label: str) -> list[float]:
    return [float(value) for value in np.asarray(line(axes, label).get_ydata())]


def legend(axes: Axes) -> list[str]:
    found = axes.get_legend()
    return [] if found is None else [text.get_text() for text in found.get_texts()]


def noise(count: int) -> list[float]:
    """Norms around 1, the same every time."""
    return [float(value) for value in np.exp(np.random.default_rng(0).normal(0, 0.3, count))]


# What is drawn


def test_norms_and_threshold_are_the_run_s(tmp_path: Path) -> None:
    run = clipped(tmp_path / "a.jsonl", [0.5, 2.0, 4.0, 0.25], losses=[4.0, 3.0, 2.0, 1.0])
    axes = axes_of(plots.draw_norms, run)
    assert at(axes, "before clipping") == run.steps == [1, 2, 3, 4]
    assert heights(axes, "before clipping") == run.series("grad_norm")
    assert heights(axes, "after clipping") == run.series("grad_norm_clipped") == pytest.approx([0.5, 1, 1, 0.25])
    assert heights(axes, "threshold") == [1.0] * 4
    assert at(axes, "clipped") == [2, 3]
    assert axes.get_yscale() == "log"
    assert legend(axes) == ["before clipping", "after clipping", "threshold", "clipped (2)"]
    loss = axes_of(plots.draw_loss, run)
    assert heights(loss, "loss") == [4.0, 3.0, 2.0, 1.0]
    assert loss.get_yscale() == "linear"


def test_an_adaptive_threshold(tmp_path: Path) -> None:
    norms = noise(120)
    norms[60] = 50.0
    run = clipped(tmp_path / "a.jsonl", norms, distclip.ZClip(max_norm=None))
    axes = axes_of(plots.draw_norms, run)
    assert 61 in at(axes, "clipped")
    assert heights(axes, "threshold") == pytest.approx(run.series("clip_threshold"), nan_ok=True)
    # Where the rule had none there is a gap, and what stands alone between gaps is a dot, not nothing.
    alone = line(axes, "threshold").get_markevery()
    assert isinstance(alone, list)
    assert 60 in alone
    assert math.isnan(heights(axes, "threshold")[0])


def test_steps_that_went_wrong_are_marked(tmp_path: Path) -> None:
    norms = [1.0, math.nan, 30.0, 1.0, math.inf, 0.0]
    rule = [distclip.SkipAbove(20.0), distclip.ClipByGlobalNorm(2.0)]
    run = clipped(tmp_path / "a.jsonl", norms, rule, nonfinite="skip", losses=[1.0, math.nan, 1.0, 1.0, 1.0, 1.0])
    axes = axes_of(plots.draw_norms, run)
    assert at(axes, "inf or NaN") == [2, 5]
    assert at(axes, "skipped") == [2, 3, 5]
    assert at(axes, "norm 0") == [6]
    low, high = axes.get_ylim()
    assert low < heights(axes, "skipped")[0] < high, "one whose norm is no number is inside the axes too"
    assert heights(axes, "skipped")[1] == pytest.approx(30.0)
    assert heights(axes, "before clipping") == pytest.approx([1, math.nan, 30, 1, math.nan, math.nan], nan_ok=True)
    assert {"skipped (3)", "inf or NaN (2)", "norm 0 (1)"} <= set(legend(axes))
    assert legend(axes_of(plots.draw_loss, run)) == ["inf or NaN (1)"]
    assert {each.get_label() for each in axes_of(plots.draw_clipped_share, run).lines} == {"clipped", "skipped"}


def test_a_run_that_was_never_clipped(tmp_path: Path) -> None:
    run = clipped(tmp_path / "a.jsonl", [1.0, 2.0, 3.0], math.inf)
    axes = axes_of(plots.draw_norms, run)
    assert legend(axes) == ["never clipped"]
    assert [each.get_label() for each in axes.lines] == ["before clipping"]
    assert heights(axes_of(plots.draw_clipped_share, run), "clipped") == [0, 0, 0]


@pytest.mark.parametrize("rule", [distclip.ClipByNorm(0.5), distclip.ClipByValue(0.1)])
def test_a_threshold_of_something_else_is_not_drawn(rule: distclip.Rule, tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    clipper = distclip.GradClipper(model, rule)
    with distclip.Monitor(clipper, [tmp_path / "a.jsonl"]):
        for scale in noise(30):
            model.weight.grad, model.bias.grad = torch.ones(2, 3) * scale, torch.ones(2) * scale
            clipper.clip()
    axes = axes_of(plots.draw_norms, read_run(tmp_path / "a.jsonl"))
    assert "threshold: not of this norm" in legend(axes)
    assert "threshold" not in {each.get_label() for each in axes.lines}


def test_a_run_without_any_norm(tmp_path: Path) -> None:
    run = clipped(tmp_path / "a.jsonl", [math.nan] * 3)
    axes = axes_of(plots.draw_norms, run)
    assert at(axes, "inf or NaN") == [1, 2, 3]
    for each in (axes, axes_of(plots.draw_histogram, run)):
        assert [text.get_text() for text in each.texts] == ["no norm is finite and above 0"]
    assert [text.get_text() for text in axes_of(plots.draw_loss, run).texts] == ["no loss was logged"]


def test_a_loss_that_falls_far_has_a_logarithmic_axis(tmp_path: Path) -> None:
    run = clipped(tmp_path / "a.jsonl", [1.0, 1.0], losses=[100.0, 0.01])
    assert axes_of(plots.draw_loss, run).get_yscale() == "log"


# Long runs


def long_run(path: Path, count: int = 100_000) -> Run:
    norms = np.array(noise(count))
    norms[[7, 31_415, count - 1]] = [40.0, 5000.0, 70.0]
    return Run(
        path,
        {},
        tuple(
            Record(step, 0.0, {"grad_norm": norm, "clip_threshold": 3.0, "clipped": float(norm > 3), "loss": 1 / norm})
            for step, norm in enumerate(norms.tolist(), 1)
        ),
        (),
    )


def test_spikes_of_a_long_run_stay(tmp_path: Path) -> None:
    axes = axes_of(plots.draw_norms, long_run(tmp_path / "a.jsonl"))
    points = dict(zip(at(axes, "before clipping"), heights(axes, "before clipping"), strict=True))
    assert 1000 < len(points) < 2100
    assert {step: points[step] for step in (8, 31_416, 100_000)} == {8: 40.0, 31_416: 5000.0, 100_000: 70.0}
    assert 0 < len(at(axes, "clipped")) <= 500
    assert legend(axes)[1] == "median before"
    assert max(heights(axes, "running median")) < 2


@given(st.lists(st.floats(0.1, 10) | st.just(math.nan), min_size=1, max_size=200), st.integers(2, 40))
def test_thinning_keeps_the_ends_the_largest_and_the_smallest(values: list[float], points: int) -> None:
    column = np.array(values)
    kept = thinned(column, points)
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert kept[0] == 0
    assert kept[-1] == len(values) - 1
    assert len(kept) <= max(points, 1) + 2
    if not np.isnan(column).all():
        assert np.nanmax(column[kept]) == np.nanmax(column)
        assert np.nanmin(column[kept]) == np.nanmin(column)


@given(st.lists(st.booleans(), min_size=1, max_size=300), st.integers(1, 50))
def test_thinned_marks_are_marks(flags: list[bool], marks: int) -> None:
    places = thinned_flags(np.array(flags), marks)
    assert all(flags[place] for place in places)
    assert len(places) == sum(flags) if len(flags) <= marks else len(places) <= marks
    assert bool(len(places)) == any(flags)


def test_lines_of_a_long_run_do_not_bridge_gaps(tmp_path: Path) -> None:
    norms = [1.0] * 5000
    norms[2000:2002] = [math.nan, math.nan]
    run = made(tmp_path / "a.jsonl", [{"grad_norm": norm} for norm in norms])
    axes = axes_of(plots.draw_norms, run)
    x, y = at(axes, "before clipping"), heights(axes, "before clipping")
    before = max(place for place, step in enumerate(x) if step <= 2000)
    after = min(place for place, step in enumerate(x) if step > 2002)
    assert np.isnan(y[before + 1 : after]).any()


def test_medians() -> None:
    steps, middle = medians(np.arange(9.0), np.array([1, 5, 2, *[math.nan] * 3, 7, 7, math.nan]), 3)
    assert steps.tolist() == [1, 4, 7]
    assert middle.tolist() == pytest.approx([2, math.nan, 7], nan_ok=True)


# Share, histogram


def test_the_share_is_of_the_last_steps() -> None:
    flags = np.array([True, True, False, False, False, True])
    assert moving_share(flags, 2).tolist() == [1, 1, 0.5, 0, 0, 0.5]
    # A fifth of the window comes first.
    assert moving_share(flags, 5).tolist() == pytest.approx([math.nan, 1, 2 / 3, 0.5, 0.4, 0.4], nan_ok=True)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        moving_share(flags, 0)


def counts(axes: Axes) -> np.ndarray[Any, Any]:
    """Of the bars of a filled histogram, from left to right."""
    (outline,) = [each for each in axes.patches if isinstance(each, Polygon) and each.get_label() != "threshold"]
    upper = outline.get_xy()[1::2, 1]
    return upper[: len(upper) // 2]


def test_the_histogram_counts_every_norm(tmp_path: Path) -> None:
    norms = [*noise(300), 20.0]
    run = clipped(tmp_path / "a.jsonl", norms, 1.5)
    axes = axes_of(plots.draw_histogram, run)
    shown = Columns(run).norms
    for percentile in (50, 90, 99):
        where = at(axes, f"{percentile} %")
        assert where[0] == where[1] == pytest.approx(quantile(shown.tolist(), percentile / 100))
    assert line(axes, "threshold").get_xdata() == [1.5, 1.5]
    assert legend(axes)[-1] == "threshold 1.5"
    assert axes.get_xscale() == "log"
    low, high = axes.get_xlim()
    assert low < min(norms)
    assert high > 20
    (outline,) = [each for each in axes.patches if isinstance(each, Polygon)]
    x = outline.get_xy()[:, 0]
    assert x.min() <= shown.min()
    assert x.max() >= shown.max()


def test_a_threshold_that_moved_is_a_band(tmp_path: Path) -> None:
    run = clipped(tmp_path / "a.jsonl", noise(50), distclip.ClipByGlobalNorm(lambda step: 0.5 if step < 20 else 2.0))
    axes = axes_of(plots.draw_histogram, run)
    assert legend(axes)[-1] == "threshold 0.5 to 2"
    (band,) = [each for each in axes.patches if each.get_label() == "threshold"]
    assert band.get_extents().width > 0


@pytest.mark.parametrize("norms", [[1.0] * 30, [2.0], [0.5, 0.5], [1e-30, 1e30]])
def test_histograms_of_few_and_equal_norms(norms: list[float], tmp_path: Path) -> None:
    run = made(tmp_path / "a.jsonl", [{"grad_norm": norm} for norm in norms])
    axes = axes_of(plots.draw_histogram, run)
    assert counts(axes).max() == max(norms.count(norm) for norm in norms)


# Heat map


def detailed(path: Path, names: Sequence[str], steps: int = 4) -> Run:
    """The norm of tensor k in step s is (k + 1) * s."""
    told = [
        {"grad_norm": 1.0, "per_tensor": {name: float((place + 1) * step) for place, name in enumerate(names)}}
        for step in range(1, steps + 1)
    ]
    return made(path, told)


def cells_of(axes: Axes) -> list[np.ma.MaskedArray[Any, Any]]:
    """Of each map that is drawn: the norms, and what is broken."""
    return [np.ma.asarray(each.get_array()) for each in axes.collections if isinstance(each, QuadMesh)]


def test_rows_are_modules(tmp_path: Path) -> None:
    names = ["embed.weight", "blocks.0.mlp.weight", "blocks.0.mlp.bias", "blocks.1.mlp.weight", "scale"]
    run = detailed(tmp_path / "a.jsonl", names)
    found = modules_of(run)
    assert found.names == ("embed", "blocks.0.mlp", "blocks.1.mlp", "scale")
    assert found.norms[:, 0] == pytest.approx([1, math.hypot(2, 3), 4, 5])
    axes = axes_of(plots.draw_modules, run)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(found.names)
    (cells,) = cells_of(axes)
    assert np.asarray(cells) == pytest.approx(found.norms)


def test_rows_are_limited(tmp_path: Path) -> None:
    names = [f"blocks.{block}.{part}.weight" for block in range(6) for part in ("q", "k")]
    run = detailed(tmp_path / "a.jsonl", names)
    assert len(modules_of(run, 12).names) == 12
    assert modules_of(run, 11).names == tuple(f"blocks.{block}" for block in range(6))
    assert modules_of(run, 5).names == ("blocks",)
    flat = modules_of(detailed(tmp_path / "b.jsonl", [f"p{place}" for place in range(10)]), 4)
    assert flat.names == ("p7", "p8", "p9", "(7 others)")
    assert flat.norms[3, 0] == pytest.approx(math.hypot(*range(1, 8)))


def test_broken_modules_are_shown(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = [
        {"per_tensor": {"a.weight": 1.0, "b.weight": 2.0}},
        {},
        {"per_tensor": {"a.weight": math.nan, "b.weight": 2.0}},
        {"per_tensor": {"b.weight": 0.0}},
    ]
    run = made(tmp_path / "a.jsonl", told)
    found = modules_of(run)
    assert found.steps.tolist() == [1, 3, 4]
    assert found.norms[0].tolist() == pytest.approx([1, math.inf, math.nan], nan_ok=True)
    axes = axes_of(plots.draw_modules, run)
    assert legend(axes) == ["inf or NaN"]
    norms, broken = (np.ma.getmaskarray(cells) for cells in cells_of(axes))
    assert (~broken).tolist() == [[False, True, False], [False, False, False]]
    assert (~norms).tolist() == [[True, False, False], [True, True, False]]


def test_a_long_map_keeps_its_spikes(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = [{"per_tensor": {"a.weight": 1.0, "b.weight": 2.0}} for _ in range(3000)]
    told[1234]["per_tensor"] = {"a.weight": 99.0, "b.weight": math.inf}
    axes = axes_of(plots.draw_modules, made(tmp_path / "a.jsonl", told))
    norms, broken = cells_of(axes)
    assert norms.shape == (2, 400)
    assert norms[0].max() == 99
    assert broken.count() == 1


def test_a_run_without_details_has_no_map(tmp_path: Path) -> None:
    run = clipped(tmp_path / "a.jsonl", [1.0])
    with pytest.raises(ValueError, match=r"a\.jsonl: no step measured single tensors: .*details_every=1"):
        axes_of(plots.draw_modules, run)
    with pytest.raises(ValueError, match="rows must be at least 2, got 1"):
        axes_of(plots.draw_modules, run, rows=1)


# Several runs


def test_runs_side_by_side(tmp_path: Path) -> None:
    runs = [clipped(tmp_path / f"{name}.jsonl", noise(9), losses=noise(9)) for name in ("_a$x$", "b", "c")]
    axes = axes_of(plots.draw_norms_of_runs, runs)
    assert legend(axes) == ["_a$x$", "b", "c"], "also names that matplotlib would hide, or take for formulas"
    assert heights(axes, "b") == runs[1].series("grad_norm")
    assert len({each.get_color() for each in axes.lines}) == 3
    assert heights(axes_of(plots.draw_losses, runs), "c") == runs[2].series("loss")
    figure = plots.comparison_figure(runs)
    assert [each.get_ylabel().partition("\n")[0] for each in figure.axes] == ["loss", "gradient norm", "share clipped"]
    assert sum(each.get_legend() is not None for each in figure.axes) == 1
    with pytest.raises(ValueError, match="at least one run, got none"):
        plots.comparison_figure([])


def test_many_runs_are_told_apart(tmp_path: Path) -> None:
    runs = [clipped(tmp_path / str(place) / "run.jsonl", [1.0, 2.0]) for place in range(9)]
    axes = axes_of(plots.draw_norms_of_runs, [*runs, runs[0]])
    looks = {(each.get_color(), each.get_linestyle()) for each in axes.lines}
    assert len(looks) == 10
    assert legend(axes)[1:9] == [str(place) for place in range(1, 9)]
    assert legend(axes)[0].endswith("run.jsonl"), "two of a name are called by their paths"


def test_the_figure_of_a_run_shows_what_there_is(tmp_path: Path) -> None:
    def labels(run: Run, **options: Any) -> list[str]:
        figure = plots.run_figure(run, **options)
        return [figure.get_suptitle(), *(each.get_ylabel().partition("\n")[0] for each in figure.axes)]

    bare = clipped(tmp_path / "a.jsonl", [1.0, 2.0])
    assert labels(bare) == ["a, rule global_norm=1.0", "gradient norm", "share clipped", "steps"]
    assert labels(bare, title="mine")[0] == "mine"
    assert labels(bare, title="")[0] == ""
    full = clipped(tmp_path / "b.jsonl", [1.0, 2.0], losses=[1.0, 1.0], details_every=1)
    assert labels(full)[1:5] == ["gradient norm", "loss", "share clipped", ""]


# Files


def test_signatures_and_the_same_bytes_again(tmp_path: Path) -> None:
    run = clipped(tmp_path / "a.jsonl", noise(20))
    for suffix, start in ((".png", b"\x89PNG\r\n\x1a\n"), (".svg", b"<?xml"), (".html", b"<!doctype html>")):
        out = plots.plot([run], tmp_path / "new" / f"a{suffix}")
        content = out.read_bytes()
        assert content.startswith(start)
        assert plots.plot([run], out).read_bytes() == content
    assert ElementTree.parse(tmp_path / "new" / "a.svg").getroot().tag.endswith("}svg")


def test_files_that_cannot_be(tmp_path: Path) -> None:
    run = clipped(tmp_path / "a.jsonl", [1.0])
    with pytest.raises(ValueError, match=r"out must end in \.png, \.svg or \.html, got '.*a\.pdf'"):
        plots.plot([run], tmp_path / "a.pdf")
    with pytest.raises(ValueError, match=r"a\.jsonl/b\.png: cannot be written: "):
        plots.plot([run], tmp_path / "a.jsonl" / "b.png")
    with pytest.raises(ValueError, match="at least one run, got none"):
        plots.plot([], tmp_path / "a.png")
    log = tmp_path / "log.png"
    (tmp_path / "a.jsonl").rename(log)
    with pytest.raises(ValueError, match=r"one of the logs, which it would overwrite: '.*log\.png'"):
        plots.plot([read_run(log)], log)


def test_a_user_s_settings_of_matplotlib_stay_and_do_not_interfere(tmp_path: Path) -> None:
    run = clipped(tmp_path / "a.jsonl", [1.0, 2.0])
    expected = plots.plot([run], tmp_path / "a.png").read_bytes()
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "black", "font.size": 30}):
        before = dict(matplotlib.rcParams)
        assert plots.plot([run], tmp_path / "b.png").read_bytes() == expected
        assert dict(matplotlib.rcParams) == before


def test_pyplot_is_never_imported(tmp_path: Path) -> None:
    log = tmp_path / "a.jsonl"
    clipped(log, [1.0, 2.0], details_every=1)
    probe = (
        "import sys; from distclip.plots import plot; from distclip.runs import read_run\n"
        f"plot([read_run({str(log)!r})], {str(tmp_path / 'a.html')!r})\n"
        f"plot([read_run({str(log)!r})], {str(tmp_path / 'a.png')!r})\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib" or "distclip.plots" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"this needs matplotlib: pip install 'distclip\[plot\]'"):
        __import__("distclip.plots")


# The report


class Page(HTMLParser):
    """What a page holds: its text, its tags that are still open, and all attributes."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def check_page(content: str) -> Page:
    """It is well formed and asks for nothing from anywhere."""
    page = Page(content)
    assert page.open == []
    assert not {"script", "link", "iframe", "img", "object", "base", "b"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    for name, value in page.attributes:
        if name in ("href", "src", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,"))
        for reference in re.findall(r"url\(([^)]*)\)", value):
            assert reference.startswith("#")
    identifiers = [value for name, value in page.attributes if name == "id"]
    assert len(set(identifiers)) == len(identifiers)
    for name, value in page.attributes:
        referred = re.findall(r"url\(#([^)]*)\)", value) + ([value[1:]] if name == "href" and value[0] == "#" else [])
        assert set(referred) <= set(identifiers)
    style = content.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert any(value.startswith("default-src 'none'") for name, value in page.attributes if name == "content")
    return page


def test_the_report_of_a_run(tmp_path: Path) -> None:
    norms = noise(250)
    norms[100] = 80.0
    run = clipped(tmp_path / "a.jsonl", norms, 3.0, losses=noise(250), details_every=5)
    content = plots.plot([run], tmp_path / "a.html").read_text()
    page = check_page(content)
    assert "://" not in content, "not even as a name of a namespace"
    assert page.tags.count("svg") == page.tags.count("figure") == 5
    assert "image" in page.tags
    assert "rule global_norm=3.0" in page.text
    assert "step 101: the gradient norm jumped to 80" in page.text
    assert "To catch outliers and leave ordinary steps alone" in page.text
    assert page.text.count("before clipping") >= 2, "texts of pictures are text"
    # Colours of pictures are the page's, so that they fit a dark one too.
    assert "prefers-color-scheme: dark" in content
    pictures = "".join(re.findall(r"<svg.*?</svg>", content, flags=re.DOTALL))
    assert "var(--vermilion)" in pictures
    inlined = re.sub(r"base64,[^\"]*", "", pictures)
    # But for the ends of the bar of colours, which are viridis' on every page.
    assert set(re.findall(r"(?:fill|stroke): (#\w{6})", inlined)) <= {"#440154", "#fde725"}


def test_the_report_of_several_runs(tmp_path: Path) -> None:
    runs = [clipped(tmp_path / f"{name}.jsonl", noise(30), losses=noise(30)) for name in ("one", "two")]
    page = check_page(plots.plot(runs, tmp_path / "a.html", title="Both").read_text())
    assert page.text.startswith("Both")
    assert page.tags.count("svg") == 3 + 2 * 4
    assert page.tags.count("table") == 3


def test_names_are_text(tmp_path: Path) -> None:
    folder = tmp_path / 'a<b>&"'
    folder.mkdir()
    told = [
        {"grad_norm": 1.0 + step, "per_tensor": {f"{NASTY}.weight": 1.0, "\x00\n\ud800.weight": 2.0}}
        for step in range(3)
    ]
    alarms = [Event(2, "mine", f"look at {NASTY}\x1b</li><script>alert(1)</script>")]
    log = folder / "run.jsonl"
    made(log, told, alarms, rule=f"{NASTY} -> norm=1")
    run = read_run(log)
    for title in (None, f"{NASTY}</title><script>", "\ud800"):
        page = check_page(plots.plot([run], tmp_path / "a.html", title=title).read_text(encoding="utf-8"))
        assert NASTY in page.text
        assert f"rule {NASTY} -> norm=1" in page.text
    root = ElementTree.parse(plots.plot([run, run], tmp_path / "a.svg", title=NASTY)).getroot()
    assert root.tag.endswith("svg")


def test_plain() -> None:
    assert plain("a\x00b\nc\ud800") == "a\ufffdb\ufffdc\ufffd"
    assert plain("x" * 50 + "y" * 50, 11) == "xxxxx\N{HORIZONTAL ELLIPSIS}yyyyy"
    assert plain("日本 ü") == "日本 ü"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (1, "1"),
        (0.002, "0.002"),
        (5000, "5000"),
        (1e4, "10⁴"),
        (2e6, "2\N{MULTIPLICATION SIGN}10⁶"),
        (1e-5, "10⁻⁵"),
        (0, "0"),
    ],
)
def test_numbers_of_ticks(value: float, told: str) -> None:
    assert number(value) == told


# Runs that nobody would make

_VALUES = st.floats() | st.sampled_from([0.0, 1.0, -1.0, 1e308, 5e-324, 1e-40]) | st.none() | st.booleans()
_METRICS = st.dictionaries(
    st.sampled_from(
        ["grad_norm", "grad_norm_clipped", "clip_threshold", "clip_coef", "clipped", "skipped", "nonfinite", "loss"]
    ),
    _VALUES,
)
_NAMES = st.text(max_size=8) | st.sampled_from([NASTY, "a.b.weight", "a.c.weight", "$", "_"])
_STEP = st.builds(
    lambda step, metrics, tensors: (
        {"kind": "step", "step": step, **metrics} | ({"per_tensor": tensors} if tensors else {})
    ),
    st.integers(0, 50) | st.sampled_from([10**9, 2**60, 10**400]),
    _METRICS,
    st.dictionaries(_NAMES, _VALUES, max_size=5) | st.none(),
)


# A picture takes half a second: to make a failing run smaller would take minutes.
_PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


@settings(max_examples=15, deadline=None, phases=_PHASES)
@given(
    st.lists(_STEP, min_size=1, max_size=6),
    st.text(max_size=10),
    st.sampled_from([".png", ".svg", ".html"]),
    st.integers(1, 3),
)
def test_no_run_breaks_a_picture(steps: list[dict[str, Any]], text: str, suffix: str, times: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "run.jsonl"
        event = {"kind": "alarm", "step": 1, "alarm": text, "message": text}
        # Steps beyond 2**53 are broken lines, and a log wants one that is none.
        first = [{"kind": "run", "rule": text}, {"kind": "step", "step": 0}]
        log.write_text("\n".join(map(json.dumps, [*first, *steps, event])))
        out = plots.plot([read_run(log)] * times, log.with_suffix(suffix), title=text or None)
        if suffix == ".svg":
            ElementTree.parse(out)
        elif suffix == ".html":
            check_page(out.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(max_examples=60, deadline=None, phases=_PHASES)
@given(st.lists(_STEP, min_size=1, max_size=12), st.integers(1, 2))
def test_no_run_breaks_a_report(steps: list[dict[str, Any]], times: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "run.jsonl"
        log.write_text("\n".join(map(json.dumps, [{"kind": "step", "step": 0}, *steps])))
        check_page(plots.plot([read_run(log)] * times, log.with_suffix(".html")).read_text(encoding="utf-8"))


def test_the_map_of_a_report_is_a_png(tmp_path: Path) -> None:
    run = detailed(tmp_path / "a.jsonl", ["a.weight", "b.weight"])
    page = Page(plots.plot([run], tmp_path / "a.html").read_text())
    images = [value for name, value in page.attributes if name == "href" and value.startswith("data:")]
    assert images
    for image in images:
        assert base64.b64decode(image.partition(",")[2]).startswith(b"\x89PNG")
