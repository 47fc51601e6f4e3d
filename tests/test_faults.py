"""Ranks that die, lag or raise, full disks, Ctrl-C: a clear end, and never gradients that are clipped by half."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import distclip
from distclip import GradClipper, ZClip
from distclip.monitor import Monitor
from distclip.reduction import Failure
from distclip.rules.base import Decision, Norms, Rule
from distclip.runs import read_run
from distclip.sinks import JsonLines
from tests import oracle
from tests.nets import Block, loss_of, make_batch, make_net
from tests.ranks import ranks
from tests.survivors import die, survivors

ROOT = Path(__file__).parent.parent
MAX_NORM = 0.5
TWICE = "ignore:clip.. ran twice on the same gradients"


class Setting(NamedTuple):
    """A model whose gradients are spread over the ranks, and its clipper."""

    model: nn.Module
    clipper: GradClipper
    backward: Callable[[], None]


def fsdp2(rule: float | Rule) -> Setting:
    model = make_net()
    fully_shard(model)
    return Setting(model, GradClipper(model, rule), lambda: loss_of(model, make_batch()).backward())


def stages(rule: float | Rule) -> Setting:
    """This rank's stage of a pipeline, with gradients as large as no other stage's."""
    torch.manual_seed(dist.get_rank())
    stage = Block()

    def backward() -> None:
        (stage(torch.ones(3, 5)).square().sum() * (1 + dist.get_rank())).backward()

    return Setting(stage, GradClipper(stage, rule, pipeline_group=dist.group.WORLD), backward)


SETTINGS = {"fsdp2": fsdp2, "stages": stages}


def local_grads(model: nn.Module) -> list[Tensor]:
    """Copies of what this rank holds; never communicates."""
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    return [(grad.to_local() if isinstance(grad, DTensor) else grad).detach().clone() for grad in grads]


def true_norm(setting: Setting) -> float:
    """In float64, of the whole model's gradients. Collective."""
    own = oracle.norm(oracle.whole_grads(setting.model))
    if isinstance(setting.model, Block):
        squares = torch.tensor(own**2, dtype=torch.float64)
        dist.all_reduce(squares)
        own = float(squares.sqrt())
    return own


def next_gradients(setting: Setting) -> tuple[float, list[Tensor]]:
    """Those of another step: their true norm, and copies of what this rank holds. Collective."""
    setting.model.zero_grad()
    setting.backward()
    return true_norm(setting), local_grads(setting.model)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def clipped_like(found: list[Tensor], before: list[Tensor], norm: float, max_norm: float = MAX_NORM) -> bool:
    """Whether all are as one process would clip them."""
    coefficient = min(1.0, max_norm / (norm + 1e-6))
    assert coefficient < 0.9, "nothing to clip"
    return all(
        torch.allclose(one.double(), other.double() * coefficient, rtol=1e-6, atol=0.0)
        for one, other in zip(found, before, strict=True)
    )


# Killed ranks

MOMENTS = ["before", "while the others wait", "started", "after"]


class Survivor(NamedTuple):
    """What became of a rank whose peer was killed in its second clip."""

    untouched: bool
    clipped: bool
    error: str
    notes: list[str]
    steps: int
    seen: float
    """How many norms the rule has learned from."""
    later: str
    """The error of the clip after."""


def clip_until_killed(name: str, lost: int, moment: str, folder: Path) -> Survivor:
    setting = SETTINGS[name](ZClip(max_norm=MAX_NORM))
    setting.backward()
    setting.clipper.clip()
    norm, before = next_gradients(setting)
    assert len(before) > 4
    if dist.get_rank() == lost:
        kill_at(moment, folder)
    elif moment == "while the others wait":
        tell_when_waiting(folder)
    error = None
    try:
        setting.clipper.clip()
    except RuntimeError as caught:
        error = caught
    after, state = local_grads(setting.model), setting.clipper.state_dict()
    with pytest.raises(RuntimeError) as later:
        setting.clipper.clip()
    assert same(local_grads(setting.model), after)
    return Survivor(
        same(after, before),
        clipped_like(after, before, norm),
        str(error) if error else "",
        getattr(error, "__notes__", []),
        state["steps"],
        state["rule_state"]["seen"],
        "".join(getattr(later.value, "__notes__", [])),
    )


def kill_at(moment: str, folder: Path) -> None:
    """Have this process die at that moment of its next clip."""
    reduce = dist.all_reduce

    def all_reduce(tensor: Tensor, **kwargs: Any) -> None:
        if moment == "while the others wait":
            while len(list(folder.glob("waiting-*"))) < dist.get_world_size() - 1:
                time.sleep(0.01)
        elif moment == "started":
            reduce(tensor, **kwargs, async_op=True)
        elif moment == "after":
            reduce(tensor, **kwargs)
        die()

    if moment == "before":
        die()
    dist.all_reduce = all_reduce  # type: ignore[assignment]  # distclip calls it with these arguments


def tell_when_waiting(folder: Path) -> None:
    """Leave a file once this process has joined its next all-reduce."""
    reduce = dist.all_reduce

    def all_reduce(tensor: Tensor, **kwargs: Any) -> None:
        work = reduce(tensor, **kwargs, async_op=True)
        (folder / f"waiting-{dist.get_rank()}").touch()
        dist.all_reduce = reduce
        work.wait()

    dist.all_reduce = all_reduce  # type: ignore[assignment]  # distclip calls it with these arguments


@pytest.mark.filterwarnings(TWICE)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    ("name", "world_size", "lost"),
    [
        ("fsdp2", 2, 1),
        ("stages", 4, 2),
        pytest.param("fsdp2", 4, 0, marks=pytest.mark.slow),
        pytest.param("stages", 2, 0, marks=pytest.mark.slow),
    ],
)
def test_a_killed_rank(name: str, world_size: int, lost: int, moment: str, tmp_path: Path) -> None:
    found = survivors(clip_until_killed, world_size, lost, name, lost, moment, tmp_path)
    assert len(found) == world_size - 1
    for survivor in found:
        assert survivor.untouched != survivor.clipped, "neither as before nor clipped as a whole"
        # Rule and count know of this clip if, and only if, the gradients do.
        assert survivor.untouched == bool(survivor.error)
        assert survivor.steps == survivor.seen == (1 if survivor.untouched else 2)
        for notes in (survivor.later, *survivor.notes):
            assert f"distclip: the all-reduce of this clip over {world_size} ranks (0 to {world_size - 1})" in notes
            assert "one of them ended" in notes
        assert len(survivor.notes) == (1 if survivor.error else 0)
    if moment in ("before", "while the others wait"):
        # Nobody can have the sum: a part of it is gone for good.
        assert all(survivor.untouched for survivor in found)


def first_clip_without(lost: int) -> list[str]:
    setting = fsdp2(MAX_NORM)
    setting.backward()
    before = local_grads(setting.model)
    if dist.get_rank() == lost:
        die()
    with pytest.raises(RuntimeError) as caught:
        setting.clipper.clip()
    assert same(local_grads(setting.model), before)
    return [str(caught.value)]


def test_a_rank_killed_before_the_plan_is_made() -> None:
    ((error,),) = survivors(first_clip_without, 2, 1, 1)
    assert "Connection closed by peer" in error or "imed out" in error or "reset by peer" in error


def train_under_torchrun(folder: Path, *script: str, restarts: int) -> str:
    """Seven steps of FSDP2 on two ranks, saved after each third; returns what was written to stderr."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    task = ("--parallel", "fsdp2", "--steps", "7", "--rule", "zclip,warmup_steps=2,max_norm=0.3", "--out", str(folder))
    command = [sys.executable, *launcher, *script, *task, "--checkpoint", str(folder), "--save-every", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


def last_checkpoint(folder: Path) -> dict[str, Any]:
    """Parameters, optimizer and clipper after the last step, whole."""
    file = folder / "whole.pt"
    dcp_to_torch_save(folder / "step-00000007", file)
    state: dict[str, Any] = torch.load(file, weights_only=False)
    return state


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "steps.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.slow
def test_torchrun_restarts_a_job_whose_rank_was_killed(tmp_path: Path) -> None:
    """From the last checkpoint, the rule's state included: it ends with the bits of a run that nothing disturbed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_under_torchrun(whole, str(ROOT / "launch" / "train.py"), restarts=0)
    told = train_under_torchrun(killed, str(ROOT / "tests" / "programs" / "killed_once.py"), "5", restarts=1)
    assert "SIGKILL" in told or "exitcode: -9" in told or "Signal 9" in told
    state, expected = last_checkpoint(killed), last_checkpoint(whole)
    assert state["clipper"] == expected["clipper"]
    assert state["clipper"]["steps"] == state["clipper"]["rule_state"]["seen"] == 7
    for part in ("model", "optimizer"):
        torch.testing.assert_close(state[part], expected[part], rtol=0, atol=0)
    assert logged(killed) == logged(whole)
    assert any(step["clipped"] for step in logged(whole))


# Slow ranks, and ranks that raise


@ranks(2)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_slow_rank(name: str) -> None:
    setting = SETTINGS[name](MAX_NORM)
    for slow in (0, 1):
        norm, before = next_gradients(setting)
        if dist.get_rank() == slow:
            time.sleep(0.3)
        report = setting.clipper.clip()
        assert float(report.total_norm) == pytest.approx(norm, rel=1e-6)
        assert clipped_like(local_grads(setting.model), before, norm)


class RaisesOnce(distclip.ClipByGlobalNorm):
    """On the last rank, in its second step."""

    def decide(self, norms: Norms) -> Decision:
        if norms.step == 1 and dist.get_rank() == dist.get_world_size() - 1 and not hasattr(self, "raised"):
            self.raised = True
            raise ZeroDivisionError("in decide()")
        return super().decide(norms)


@ranks(2, 4)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_rule_that_raises_on_one_rank(name: str) -> None:
    """The others have their sum by then, and clip. All learn of it at the next clip."""
    setting = SETTINGS[name](RaisesOnce(MAX_NORM))
    raises = dist.get_rank() == dist.get_world_size() - 1
    setting.backward()
    setting.clipper.clip()
    state = setting.clipper.state_dict()
    norm, before = next_gradients(setting)
    if raises:
        with pytest.raises(ZeroDivisionError, match=r"in decide\(\)"):
            setting.clipper.clip()
        assert same(local_grads(setting.model), before)
    else:
        setting.clipper.clip()
        assert clipped_like(local_grads(setting.model), before, norm)
    norm, before = next_gradients(setting)
    with pytest.raises(
        RuntimeError, match=r"clip number 3\n  on rank .*clip number 2\n(?s:.*)resume all from a checkpoint"
    ):
        setting.clipper.clip()
    assert same(local_grads(setting.model), before)
    setting.clipper.load_state_dict(state)
    setting.clipper.clip()
    assert clipped_like(local_grads(setting.model), before, norm)


@ranks(2)
def test_a_warning_that_is_an_error_on_one_rank() -> None:
    setting = fsdp2(MAX_NORM)
    setting.backward()
    setting.clipper.clip()
    setting.model.zero_grad()
    setting.backward()
    if dist.get_rank() == 0:
        before = local_grads(setting.model)
        with pytest.raises(Failure, match="another rank that takes part in this clip raised an error"):
            setting.clipper.clip()
        assert same(local_grads(setting.model), before)
    else:
        setting.model.zero_grad()
        with pytest.raises(UserWarning, match="found no gradient on this rank"):
            setting.clipper.clip()
    setting.model.zero_grad()
    setting.backward()
    norm = true_norm(setting)
    assert float(setting.clipper.clip().total_norm) == pytest.approx(norm, rel=1e-6)


def one_ends_with_its_error(lost: int) -> str:
    setting = fsdp2(RaisesOnce(MAX_NORM))
    setting.backward()
    setting.clipper.clip()
    try:
        setting.clipper.clip()
    except ZeroDivisionError:
        die()  # what a script's uncaught error comes to, for the others
    with pytest.raises(RuntimeError) as caught:
        setting.clipper.clip()
    return "".join(caught.value.__notes__)


@pytest.mark.filterwarnings(TWICE)
def test_a_rule_that_ends_one_rank() -> None:
    (notes,) = survivors(one_ends_with_its_error, 2, 1, 1)
    assert "one of them ended" in notes


@ranks(3)
def test_a_rank_that_never_clips() -> None:
    """A process group's own timeout ends the wait; the third rank is there so that this group is not the whole job."""
    group = dist.new_group([0, 1])
    if dist.get_rank() == 2:
        dist.barrier()
        return
    stage = Block()
    clipper = GradClipper(stage, MAX_NORM, pipeline_group=group)
    stage(torch.ones(3, 5)).sum().backward()
    clipper.clip()
    stage.zero_grad()
    stage(torch.ones(3, 5)).sum().backward()
    before = local_grads(stage)
    # Not earlier: on a busy machine a rank may come to the first clip a second late.
    distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError) as caught:
            clipper.clip()
        assert same(local_grads(stage), before)
        (note,) = caught.value.__notes__
        assert "over 2 ranks (0 to 1) failed" in note
        assert "did not clip within the process group's timeout" in note
    dist.barrier()


# Full disks


def train(clipper: GradClipper, model: nn.Linear, steps: int) -> None:
    for _ in range(steps):
        model.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        clipper.clip()


def test_a_disk_that_is_full_from_the_start() -> None:
    model = nn.Linear(3, 1)
    clipper = GradClipper(model, 1.0)
    monitor = Monitor(clipper, [JsonLines("/dev/full")], log_every=2)
    with pytest.warns(UserWarning, match=r"JsonLines failed .*: OSError: .*No space left") as told:
        train(clipper, model, 9)
    monitor.close()
    assert len(told) == 1
    assert clipper.steps == 9


@ranks(1)
def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    log, model = tmp_path / "run.jsonl", nn.Linear(3, 1)
    clipper = GradClipper(model, 1.0)
    other: list[int] = []
    files = set(os.listdir("/proc/self/fd"))
    monitor = Monitor(clipper, [log, lambda step, metrics: other.append(step)], log_every=1, alarms=())
    train(clipper, model, 5)
    # Room for one more line, and a part of the next. No other file of this process grows meanwhile.
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 400, resource.RLIM_INFINITY))
    with pytest.warns(UserWarning, match=r"JsonLines failed .*: OSError: .*File too large") as told:
        train(clipper, model, 5)
    monitor.close()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert len(told) == 1
    assert other == list(range(1, 11))
    run = read_run(log)
    assert run.steps == list(range(1, len(run.steps) + 1))
    assert 4 <= len(run.steps) < 10
    assert run.broken_lines == 1
    assert set(os.listdir("/proc/self/fd")) == files, "the log is still open"


# Ctrl-C


class Interrupts(ZClip):
    """Presses Ctrl-C in its second step, as a user may at any moment."""

    def decide(self, norms: Norms) -> Decision:
        decision = super().decide(norms)
        if norms.step == 1 and not hasattr(self, "done"):
            self.done = True
            signal.raise_signal(signal.SIGINT)
        return decision


def test_ctrl_c_within_a_clip() -> None:
    def run(rule: Rule) -> tuple[list[dict[str, Any]], list[Tensor], dict[str, Any]]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        clipper, reports = GradClipper(model, rule), []
        while clipper.steps < 4:
            model.zero_grad()
            (model(torch.ones(1, 3)).sum() * (clipper.steps + 1)).backward()
            before = local_grads(model)
            try:
                reports.append(clipper.clip().to_dict())
            except KeyboardInterrupt:
                assert same(local_grads(model), before)
        return reports, local_grads(model), clipper.state_dict()["rule_state"]

    interrupted = Interrupts(max_norm=MAX_NORM)
    reports, grads, state = run(interrupted)
    expected, expected_grads, expected_state = run(ZClip(max_norm=MAX_NORM))
    assert interrupted.done
    assert reports == expected
    assert all(report["clipped"] for report in reports)
    assert same(grads, expected_grads)
    assert state == expected_state


def press_ctrl_c_while_waiting(pressed: Path) -> None:
    """In this process, once it has joined its next all-reduce; then there is a file, for the rank that it waits for."""
    reduce = dist.all_reduce

    def press() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        pressed.touch()

    def all_reduce(tensor: Tensor, **kwargs: Any) -> None:
        dist.all_reduce = reduce
        work = reduce(tensor, **kwargs, async_op=True)
        threading.Timer(0.3, press).start()
        work.wait()

    dist.all_reduce = all_reduce  # type: ignore[assignment]  # distclip calls it with these arguments


@ranks(2)
def test_ctrl_c_while_waiting_for_the_others(tmp_path: Path) -> None:
    """Python hears of it when the all-reduce is over: nothing was changed here, and the others have clipped."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    setting = fsdp2(ZClip(max_norm=MAX_NORM))
    setting.backward()
    setting.clipper.clip()
    state = setting.clipper.state_dict()
    norm, before = next_gradients(setting)
    if dist.get_rank() == 0:
        press_ctrl_c_while_waiting(tmp_path / "pressed")
        with pytest.raises(KeyboardInterrupt):
            setting.clipper.clip()
        assert same(local_grads(setting.model), before)
        assert setting.clipper.state_dict() == state
    else:
        while not (tmp_path / "pressed").exists():
            time.sleep(0.01)
        setting.clipper.clip()
        assert clipped_like(local_grads(setting.model), before, norm)
    # All go back to where they agreed, and on.
    setting.clipper.load_state_dict(state)
    norm, before = next_gradients(setting)
    assert float(setting.clipper.clip().total_norm) == pytest.approx(norm, rel=1e-6)
    assert clipped_like(local_grads(setting.model), before, norm)
    assert setting.clipper.steps == 2
