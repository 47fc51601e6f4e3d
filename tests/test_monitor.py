"""What a Monitor makes of clips: records, sinks, alarms, and no wait for the device before somebody asks."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip import AlarmWarning, GradClipper, Monitor, report
from distclip.record import Event, Record
from distclip.sinks import JsonLines, Sink
from tests.layouts import LAYOUTS, build
from tests.oracle import norm, whole_grads
from tests.ranks import ranks, run_ranks
from tests.test_deepspeed import start_deepspeed


class Kept(Sink):
    """Remembers all that it is told."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.batches: list[int] = []
        self.events: list[Event] = []
        self.told: list[str] = []
        self.run: dict[str, Any] = {}

    def start(self, run: Any) -> None:
        self.told.append("start")
        self.run = dict(run)

    def write(self, records: Sequence[Record]) -> None:
        self.records += records
        self.batches.append(len(records))

    def event(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.told.append("close")


def clip_with(clipper: GradClipper, model: nn.Linear, *norms: float) -> None:
    """A clip for each of these norms."""
    for value in norms:
        model.weight.grad = torch.tensor([[0.6, 0.8]]) * value
        clipper.clip()


def setting(rule: Any = 1.0, **options: Any) -> tuple[nn.Linear, GradClipper]:
    model = nn.Linear(2, 1, bias=False)
    return model, GradClipper(model, rule, **options)


def test_records_come_in_batches_and_in_order() -> None:
    model, clipper = setting()
    sink = Kept()
    with Monitor(clipper, [sink], log_every=3, alarms=()) as monitor:
        for step in range(7):
            clip_with(clipper, model, 0.5 if step % 2 else 2.0)
            monitor.log(loss=torch.tensor(float(step)), lr=0.1)
        assert sink.batches == [3, 3]
    assert sink.batches == [3, 3, 1]
    assert sink.told == ["start", "close"]
    assert sink.run["rule"] == "global_norm=1.0"
    assert [record.step for record in sink.records] == list(range(1, 8))
    assert [record.metrics["loss"] for record in sink.records] == list(range(7))
    assert [record.metrics["clip_fraction"] for record in sink.records] == [1, 1 / 2, 2 / 3, 1 / 2, 3 / 5, 1 / 2, 4 / 7]
    assert sink.records[0].metrics == pytest.approx(
        {
            "grad_norm": 2.0,
            "grad_norm_clipped": 1.0,
            "clip_coef": 0.5,
            "clip_threshold": 1.0,
            "clipped": 1.0,
            "skipped": 0.0,
            "nonfinite": 0.0,
            "nonfinite_steps": 0.0,
            "clip_fraction": 1.0,
            "loss": 0.0,
            "lr": 0.1,
        },
        rel=1e-5,
    )


def test_nothing_is_read_before_the_batch_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    original = report.read

    def counted(reports: Sequence[report.ClipReport]) -> list[dict[str, Any]]:
        reads.append(len(reports))
        return original(reports)

    monkeypatch.setattr("distclip.monitor.read", counted)
    model, clipper = setting()
    with Monitor(clipper, [Kept()], log_every=4, alarms=()):
        clip_with(clipper, model, *[1.0] * 9)
        assert reads == [4, 4]
    assert reads == [4, 4, 1]


def test_the_loss_given_to_clip_and_a_rule_s_own_quantities() -> None:
    model, clipper = setting([distclip.ZClip(warmup_steps=3), distclip.SkipOnSpike(window=4, min_history=2, sigma=1e9)])
    sink = Kept()
    with Monitor(clipper, [sink], alarms=()):
        for value in (1.0, 1.5, 2.0, 9.0):
            model.weight.grad = torch.tensor([[0.6, 0.8]]) * value
            clipper.clip(loss=value / 10)
    last = sink.records[-1].metrics
    assert last["loss"] == pytest.approx(0.9)
    assert last["clip_mean"] == pytest.approx(1.5)
    assert last["clip_std"] == pytest.approx((1 / 6) ** 0.5)
    # The chain's second rule sees what the first leaves, and overwrites its quantity of the same name.
    assert "clip_zscore" in last


def test_percentiles_are_told() -> None:
    model, clipper = setting(distclip.AutoClip(percentile=50))
    sink = Kept()
    with Monitor(clipper, [sink], alarms=()):
        clip_with(clipper, model, 1.0, 3.0, 2.0, 4.0)
    assert [record.metrics["clip_percentile"] for record in sink.records] == pytest.approx([100, 100, 200 / 3, 100])


@pytest.mark.parametrize("name", ["ddp", "fsdp1-full_shard-flat", "fsdp2"])
def test_every_tensor_on_demand_in_the_same_collective(name: str) -> None:
    run_ranks(check_details, 2, name)


def check_details(name: str) -> None:
    from tests.collectives import recorded_collectives

    model = build(LAYOUTS[name])
    before = whole_grads(model)
    clipper = GradClipper(model, math.inf, details_every=2, check="never")
    told = clipper.clip()
    assert told.per_tensor is not None
    expected = {key: norm({key: grad}) for key, grad in before.items()}
    assert {key: value for key, value in told.to_dict()["per_tensor"].items() if value} == pytest.approx(
        expected, rel=1e-6
    )
    total = math.fsum(value**2 for value in expected.values())
    (largest, share), *_ = told.dominant(3)
    assert largest == max(expected, key=lambda key: expected[key])
    assert share == pytest.approx(expected[largest] ** 2 / total, rel=1e-6)
    modules = told.per_module(1)
    assert math.hypot(*modules.values()) == pytest.approx(total**0.5, rel=1e-6)
    assert told.first_nonfinite() is None
    with recorded_collectives() as collectives, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert clipper.clip().per_tensor is None
        assert clipper.clip().per_tensor is not None
    assert len(collectives) == 2 * LAYOUTS[name].collectives


def test_the_first_tensor_with_a_nan() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    model.get_parameter("1.weight").grad = torch.tensor([[math.nan, 1.0], [1.0, 1.0]])
    clipper = GradClipper(model, 1.0, details_every=1)
    assert clipper.clip().first_nonfinite() == "1.weight"
    assert clipper.report is not None
    assert clipper.report.to_dict()["nonfinite_steps"] == 1
    again = GradClipper(model, 1.0)
    again.load_state_dict(clipper.state_dict())
    for param in model.parameters():
        param.grad = torch.full_like(param, math.inf)
    assert again.clip().to_dict()["nonfinite_steps"] == 2
    with pytest.raises(ValueError, match=r"details_every=1"):
        again.report.dominant()  # type: ignore[union-attr]


@pytest.mark.parametrize("every", [-1, True, 1.5])
def test_bad_details(every: Any) -> None:
    with pytest.raises(ValueError, match="details_every must be a whole number from 0 on"):
        GradClipper(nn.Linear(1, 1), 1.0, details_every=every)


@ranks(2)
def test_names_of_all_stages() -> None:
    model = nn.ModuleDict({f"stage{dist.get_rank()}": nn.Linear(2, 1, bias=False)})
    for param in model.parameters():
        param.grad = torch.full_like(param, 1.0 + dist.get_rank())
    found = GradClipper(model, 1.0, pipeline_group=dist.group.WORLD, details_every=1).clip().to_dict()["per_tensor"]
    assert found == pytest.approx({"stage0.weight": 2**0.5, "stage1.weight": 8**0.5})


@ranks(2)
def test_ranks_at_different_steps_exchange_the_same() -> None:
    model = nn.ModuleDict({f"stage{dist.get_rank()}": nn.Linear(2, 1, bias=False)})
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    clipper = GradClipper(model, math.inf, pipeline_group=dist.group.WORLD, details_every=2)
    clipper.steps = dist.get_rank()  # as if one of them had not loaded its state
    # Told apart by what they exchanged, which a buffer of another size on each rank would have kept them from.
    with pytest.raises(RuntimeError, match=r"clip number 1(.|\n)*clip number 2(.|\n)*did not load the clipper's state"):
        clipper.clip()


def test_an_alarm_that_fails_is_left_out_and_told() -> None:
    class Broken(distclip.alarms.Alarm):
        name = "broken"

        def look(self, record: Record) -> Event | None:
            raise ZeroDivisionError("division by zero")

    model, clipper = setting()
    sink = Kept()
    monitor = Monitor(clipper, [sink], alarms=[Broken()])
    clip_with(clipper, model, 1.0)
    with pytest.warns(UserWarning, match="Broken failed and watches no more: ZeroDivisionError"):
        monitor.close()
    assert len(sink.records) == 1


def test_a_sink_that_fails_is_left_out_and_told() -> None:
    class Full(Kept):
        def write(self, records: Sequence[Record]) -> None:
            raise OSError(28, "No space left on device")

    model, clipper = setting()
    sink = Kept()
    with Monitor(clipper, [Full(), sink], log_every=1, alarms=()):
        clip_with(clipper, model, 1.0)
        with pytest.warns(UserWarning, match="Full failed and gets no more records: OSError: .*No space left"):
            clip_with(clipper, model, 1.0)
        clip_with(clipper, model, 1.0)
    assert len(sink.records) == 3


def test_one_rank_writes() -> None:
    assert run_ranks(count_records, 2) == [1, 0]


def count_records() -> int:
    model, clipper = setting()
    sink = Kept()
    with Monitor(clipper, [sink]):
        clip_with(clipper, model, 1.0)
    return len(sink.records)


@pytest.mark.parametrize(
    ("sink", "error", "message"),
    [
        (3, TypeError, "sinks must be Sinks, paths or functions, got int: 3"),
        ("run.txt", ValueError, "a path must end in .jsonl, got 'run.txt'"),
    ],
)
def test_bad_sinks(sink: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Monitor(setting()[1], [sink])


def test_json_lines_are_whole_and_are_added_to(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "run.jsonl"
    for _ in range(2):
        model, clipper = setting()
        with Monitor(clipper, [path], log_every=1, alarms=()):
            clip_with(clipper, model, 2.0, math.inf)
        with path.open("a") as file:
            file.write('{"kind":"st')
    lines = path.read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines if line.endswith("}")]
    assert kinds == ["run", "step", "step"] * 2
    assert lines[3] == '{"kind":"st', "what a crash left stays a line of its own"
    second = json.loads(lines[2])
    assert (second["step"], second["grad_norm"], second["nonfinite"]) == (2, "inf", 1.0)


KILLED = """
import os, signal, sys, torch, distclip
model = torch.nn.Linear(2, 1, bias=False)
clipper = distclip.GradClipper(model, 1.0)
monitor = distclip.Monitor(clipper, [sys.argv[1]], log_every=5)
for step in range(13):
    model.weight.grad = torch.ones(1, 2)
    clipper.clip()
if sys.argv[2] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("end", "steps", "status"), [("kill", 10, -signal.SIGKILL), ("end", 13, 0)])
def test_a_killed_run_leaves_its_log(end: str, steps: int, status: int, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), end], capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    logged = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in logged if line["kind"] == "step"] == list(range(1, steps + 1))


def test_hooks_are_called_wherever_a_clip_happens() -> None:
    model, clipper = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[float] = []
    handle = clipper.register_report_hook(lambda _, told, loss: seen.append(told.total_norm.item()))
    clipper.attach(optimizer)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    optimizer.step()
    clipper.detach()
    backward = clipper.clip_in_backward(previous_norm=True)
    model.zero_grad()
    model(torch.tensor([[6.0, 8.0]])).sum().backward()
    backward.remove()
    handle.remove()
    clip_with(clipper, model, 1.0)
    assert seen == [5.0, 10.0]


def test_a_monitor_that_nobody_closes_does_not_keep_the_model(tmp_path: Path) -> None:
    import gc
    import weakref

    model, clipper = setting()
    monitor = Monitor(clipper, [JsonLines(tmp_path / "run.jsonl")])
    clip_with(clipper, model, 1.0)
    alive = weakref.ref(clipper), weakref.ref(monitor)
    del model, clipper, monitor
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 2, "what waited is written"


@pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning")  # DeepSpeed's calls
@ranks(2)
def test_a_deepspeed_engine() -> None:
    deepspeed = start_deepspeed()
    model = nn.Linear(2, 1)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config)
    clipper, sink = GradClipper(engine, 0.5, details_every=2), Kept()
    with Monitor(clipper, [sink]):
        for _ in range(3):
            engine.backward(engine(torch.ones(1, 2)).square().sum())
            engine.step()
    assert [record.step for record in sink.records] == ([1, 2, 3] if dist.get_rank() == 0 else [])
    for record in sink.records:
        assert (record.per_tensor is None) == (record.step == 2)
        if record.per_tensor is not None:
            assert math.hypot(*record.per_tensor.values()) == pytest.approx(record.norm, rel=1e-6)


def test_alarms_warn_once_and_stand_in_the_log() -> None:
    model, clipper = setting()
    sink = Kept()
    with Monitor(clipper, [sink], log_every=1, alarms=[distclip.alarms.NonFinite()]):
        clip_with(clipper, model, math.inf)
        with pytest.warns(AlarmWarning, match="step 1: a gradient held an inf or NaN in 1 of the last 1 steps"):
            clip_with(clipper, model, math.inf)
        clip_with(clipper, model, math.inf)
    assert [(event.step, event.alarm) for event in sink.events] == [(1, "nonfinite")]


def test_what_is_logged_is_what_it_was_then() -> None:
    model, clipper = setting()
    sink, loss = Kept(), torch.zeros(())
    with Monitor(clipper, [sink], alarms=()) as monitor:
        for step in range(3):
            clip_with(clipper, model, 1.0)
            loss += step
            monitor.log(loss=loss)
            loss.zero_()
    assert [record.metrics["loss"] for record in sink.records] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": 3}, "log(step=...): every record has a 'step' of its own"),
        ({"time": 0.1}, "log(time=...)"),
        ({"loss": torch.ones(2)}, "log(loss=...) takes single numbers, got a tensor of shape (2,)"),
    ],
)
def test_what_cannot_be_logged_is_refused_on_every_rank(values: Any, message: str, main: bool) -> None:
    model, clipper = setting()
    with Monitor(clipper, main=main) as monitor:
        clip_with(clipper, model, 1.0)
        with pytest.raises(ValueError, match=re.escape(message)):
            monitor.log(**values)


@ranks(2)
def test_a_dtensor_of_which_a_rank_has_a_part_is_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate

    model, clipper = setting()
    mesh, sink = init_device_mesh("cpu", (2,)), Kept()
    with Monitor(clipper, [sink], alarms=()) as monitor:
        clip_with(clipper, model, 1.0)
        monitor.log(loss=DTensor.from_local(torch.tensor(2.0), mesh, [Replicate()]))
        with pytest.raises(TypeError, match=r"pass loss.full_tensor\(\)"):
            monitor.log(loss=DTensor.from_local(torch.tensor(2.0), mesh, [Partial()]))
    assert [record.metrics["loss"] for record in sink.records] == [2.0] * (dist.get_rank() == 0)


def test_alarms_that_are_errors_stand_in_the_log_and_sinks_are_closed() -> None:
    model, clipper = setting()
    sink = Kept()
    monitor = Monitor(clipper, [sink], alarms=[distclip.alarms.NonFinite()])
    clip_with(clipper, model, math.inf)
    with pytest.raises(AlarmWarning):
        monitor.close()
    assert [event.alarm for event in sink.events] == ["nonfinite"]
    assert sink.told == ["start", "close"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_leaves_its_parent_s_log_alone(tmp_path: Path) -> None:
    model, clipper = setting()
    monitor = Monitor(clipper, [tmp_path / "run.jsonl"], alarms=())
    clip_with(clipper, model, 1.0, 2.0)
    child = os.fork()
    if child == 0:
        monitor.close()
        os._exit(0)
    os.waitpid(child, 0)
    monitor.close()
    assert [json.loads(line).get("step") for line in (tmp_path / "run.jsonl").read_text().splitlines()] == [None, 1, 2]


def test_single_tensors_when_clipped_in_backward() -> None:
    model = nn.Linear(2, 1, bias=False)
    clipper = GradClipper(model, 1.0, details_every=2)
    clipper.clip_in_backward(previous_norm=True)
    told = []
    for _ in range(3):
        model.zero_grad()
        model(torch.tensor([[3.0, 4.0]])).sum().backward()
        assert clipper.report is not None
        told.append(clipper.report.to_dict().get("per_tensor"))
    assert told == [{"weight": 5.0}, None, {"weight": 5.0}]


def test_the_norm_after_rules_of_different_norms_is_not_told() -> None:
    model, clipper = setting([distclip.ClipByGlobalNorm(9.0, norm_type=math.inf), 9.0])
    clip_with(clipper, model, 5.0)
    assert clipper.report is not None
    assert clipper.report.total_norm.item() == pytest.approx(4.0)
    assert clipper.report.clipped_norm is None
