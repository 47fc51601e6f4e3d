"""Sinks into the real trackers, offline, and what these show of a run afterwards."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import distclip
from distclip import GradClipper, Monitor
from distclip.sinks import Sink, TensorBoard, Terminal, Tracker
from distclip.sinks.terminal import sparkline

NORMS = [0.5, 2.0, 4.0, math.inf]


def watched(*sinks: Sink | Any, **options: Any) -> None:
    """A run with these norms, by which an alarm goes off at step 4."""
    model = nn.Linear(2, 1, bias=False)
    clipper = GradClipper(model, 1.0, details_every=2)
    alarms = [distclip.alarms.NonFinite()]
    monitor = Monitor(clipper, sinks, log_every=2, alarms=alarms, **options)
    for step, norm in enumerate(NORMS):
        model.weight.grad = torch.tensor([[0.6, 0.8]]) * norm
        clipper.clip()
        monitor.log(loss=4.0 - step)
    with pytest.warns(distclip.AlarmWarning):
        monitor.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("own", [True, False])
def test_tensorboard(own: bool, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = None if own else SummaryWriter(str(tmp_path))
    watched(TensorBoard(writer or tmp_path), prefix="fine/")
    if writer is not None:
        writer.add_scalar("still", 1.0, 1)
        writer.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    scalars = {name: [(each.step, each.value) for each in found.Scalars(name)] for name in found.Tags()["scalars"]}
    assert [step for step, _ in scalars["fine/grad_norm"]] == [1, 2, 3, 4]
    assert [value for _, value in scalars["fine/grad_norm"]] == pytest.approx(NORMS)
    assert [value for _, value in scalars["fine/clip_coef"]] == pytest.approx([1, 0.5, 0.25, 0], abs=1e-5)
    assert scalars["fine/loss"] == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    assert ("still" in scalars) != own
    histograms = found.Tags()["histograms"]
    assert {"fine/grad_norm_log10", "fine/tensor_norms_log10"} <= set(histograms)
    assert [each.step for each in found.Histograms("fine/tensor_norms_log10")] == [3]  # TensorBoard keeps the last
    (alarm,) = found.Tensors("fine/alarms/text_summary")
    assert alarm.step == 4


WANDB = """
import json, sys, torch, warnings, wandb, distclip
from distclip.sinks import Wandb
warnings.simplefilter("ignore")
own = sys.argv[1] == "own"
run = None if own else wandb.init(mode="offline", dir=sys.argv[2])
seen = []
model = torch.nn.Linear(2, 1, bias=False)
clipper = distclip.GradClipper(model, 1.0)
sink = Wandb(mode="offline", dir=sys.argv[2]) if own else Wandb()
with distclip.Monitor(clipper, [sink], log_every=2) as monitor:
    for norm in (0.5, 2.0, float("inf")):
        model.weight.grad = torch.tensor([[0.6, 0.8]]) * norm
        clipper.clip()
        monitor.log(loss=norm)
        if run is not None:
            run.log({"script": norm})
    monitor.flush()
    summary = dict((run or wandb.run).summary)
    rule = (run or wandb.run).config["distclip"]["rule"]
print(json.dumps([summary["train/grad_norm_clipped"], summary["train/clip_step"], rule, wandb.run is None]))
"""


@pytest.mark.parametrize("start", ["own", "script's"])
def test_wandb_offline(start: str, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    done = subprocess.run(
        [sys.executable, "-c", WANDB, start, str(tmp_path)], capture_output=True, text=True, timeout=100, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (told,) = [line for line in done.stdout.splitlines() if line.startswith("[NaN")]
    last, step, rule, over = json.loads(told)
    assert (step, rule, over) == (3, "global_norm=1.0", start == "own")
    assert math.isnan(last)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


MLFLOW = """
import json, sys, torch, warnings, mlflow, distclip
from distclip.sinks import MLflow
warnings.simplefilter("ignore")
own = sys.argv[1] == "own"
mlflow.set_tracking_uri("file://" + sys.argv[2])
mlflow.set_experiment("clipping")
run_id = None if own else mlflow.start_run().info.run_id
model = torch.nn.Linear(2, 1, bias=False)
clipper = distclip.GradClipper(model, 1.0)
with distclip.Monitor(clipper, [MLflow(run_name="mine") if own else MLflow()], log_every=2):
    for norm in (0.5, 2.0, float("inf")):
        model.weight.grad = torch.tensor([[0.6, 0.8]]) * norm
        clipper.clip()
over = mlflow.active_run() is None
mlflow.end_run()
client = mlflow.MlflowClient()
(run,) = client.search_runs([client.get_experiment_by_name("clipping").experiment_id])
history = [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "train/grad_norm")]
print(json.dumps([run_id in (None, run.info.run_id), over, history, run.data.params, run.data.tags]))
"""


@pytest.mark.parametrize("start", ["own", "script's"])
def test_mlflow_offline(start: str, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    done = subprocess.run(
        [sys.executable, "-c", MLFLOW, start, str(tmp_path / "mlruns")],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
        env={**os.environ, "MLFLOW_ALLOW_FILE_STORE": "true"},
    )
    assert done.returncode == 0, done.stderr
    same_run, over, history, params, tags = json.loads(done.stdout.splitlines()[-1])
    assert same_run
    assert over == (start == "own")
    assert [step for step, _ in history] == [1, 2, 3]
    assert [value for _, value in history] == pytest.approx([0.5, 2.0, math.inf])
    assert params["distclip_rule"] == "global_norm=1.0"
    assert tags["distclip.nonfinite"].startswith("step 3: a gradient held an inf or NaN")


def test_accelerate_s_trackers(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.tracking import GeneralTracker, on_main_process

    class Kept(GeneralTracker):  # type: ignore[misc]
        name, requires_logging_directory, main_process_only = "kept", False, True

        def __init__(self) -> None:
            super().__init__()
            self.logged: list[tuple[int, dict[str, float]]] = []

        @property
        def tracker(self) -> Any:
            return self.logged

        @on_main_process  # type: ignore[untyped-decorator]
        def store_init_configuration(self, values: Any) -> None: ...

        @on_main_process  # type: ignore[untyped-decorator]
        def log(self, values: dict[str, float], step: int, **_: Any) -> None:
            self.logged.append((step, values))

    tracker = Kept()
    accelerator = accelerate.Accelerator(cpu=True, log_with=tracker, project_dir=tmp_path)
    accelerator.init_trackers("clipping")
    watched(Tracker(accelerator))
    assert [step for step, _ in tracker.logged] == [1, 2, 3, 4]
    assert [values["train/grad_norm"] for _, values in tracker.logged] == pytest.approx(NORMS)
    accelerator.end_training()


def test_terminal_draws_a_panel() -> None:
    out = io.StringIO()
    watched(Terminal(Console(file=out, force_terminal=True, width=100, color_system="truecolor")))
    shown = out.getvalue()
    assert "gradient norm, global_norm=1.0" in shown
    assert "step 4  norm inf  threshold 1  coefficient 0  loss 1  clipped 75%" in shown
    assert "a gradient held an inf or NaN" in shown
    assert "█" in shown


def test_terminal_writes_lines_into_files() -> None:
    out = io.StringIO()
    watched(Terminal(Console(file=out, width=30)))
    assert out.getvalue().splitlines() == [
        "step 2 norm 2 threshold 1 coefficient 0.5 loss 3 clipped 50%",
        "step 4 norm inf threshold 1 coefficient 0 loss 1 clipped 75%",
    ]


@pytest.mark.parametrize(
    ("norms", "bars"),
    [
        ([1, 10, 100], "▁▅█"),
        ([1, 1.01, 1], "▁▁▁"),
        ([0, 1, math.inf, math.nan], "▁▁xx"),
        ([], ""),
        ([1e-300, 1e300], "▁█"),
    ],
)
def test_sparklines(norms: list[float], bars: str) -> None:
    assert sparkline(norms) == bars


@pytest.mark.parametrize(
    ("module", "sink", "extra"),
    [
        ("tensorboard", "TensorBoard('logs')", "tensorboard"),
        ("wandb", "Wandb()", "wandb"),
        ("mlflow", "MLflow()", "mlflow"),
        ("rich", "Terminal()", "cli"),
    ],
)
def test_without_its_package_a_sink_names_the_extra(module: str, sink: str, extra: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "import distclip; from distclip.sinks import *\n"
        f"try: {sink}.start({{'prefix': '', 'rule': '', 'version': ''}})\nexcept ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stdout.strip() == f"this needs {module}: pip install 'distclip[{extra}]'", done.stderr
