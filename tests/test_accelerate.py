"""Clipping through Accelerate: DDP, FSDP1, FSDP2, DeepSpeed, against one process that has the whole batch."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("accelerate", reason="Accelerate is not installed")
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh

from distclip import ClipConfig
from distclip.integrations.accelerate import AcceleratedClipper, install
from tests import oracle
from tests.accelerate_runs import (
    KINDS,
    MICRO,
    Prepared,
    alone,
    assert_trained_alike,
    backward,
    holds,
    make_sgd,
    micro_batch,
    params_of,
    prepare,
    put_scaler,
    start,
)
from tests.amp_runs import local, planted
from tests.layouts import LAYOUTS
from tests.nets import loss_of, make_net
from tests.ranks import ranks, run_ranks

# DeepSpeed calls collectives under the names that torch has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning")


def accumulate(made: Prepared, step: int) -> None:
    """All micro-batches of a step, without clipping."""
    for micro in range(MICRO):
        with made.accelerator.accumulate(made.model):
            backward(made, step, micro)


def step_with(made: Prepared, clipper: AcceleratedClipper, step: int) -> Any:
    """One step of a script; returns the last report."""
    report = None
    for micro in range(MICRO):
        with made.accelerator.accumulate(made.model):
            backward(made, step, micro)
            report = clipper.clip()
            assert (report is None) == (micro < MICRO - 1)
            made.optimizer.step()
            made.optimizer.zero_grad()
    return report


def on_all_ranks(value: object) -> list[Any]:
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, value)
    return everybody


def assert_same_everywhere(value: object) -> None:
    everybody = on_all_ranks(value)
    assert all(other == everybody[0] for other in everybody)


@ranks(2)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_one_process(kind: str) -> None:
    made = prepare(start(kind))
    clipper = AcceleratedClipper(made.accelerator, made.model, made.optimizer, clip=0.5)
    truth = alone(3, max_norm=0.5)
    for step in range(3):
        for micro in range(MICRO):
            with made.accelerator.accumulate(made.model):
                backward(made, step, micro)
                before = oracle.whole_grads(made.model) if micro or kind == "ddp" else {}
                report = clipper.clip()
                if not micro:
                    assert report is None
                    assert clipper.clipper.steps == step
                    if kind == "ddp":
                        oracle.assert_same(oracle.whole_grads(made.model), before)
                else:
                    assert report is clipper.report
                    assert report is not None
                    assert report.total_norm.item() == pytest.approx(oracle.norm(before), rel=1e-6)
                    oracle.assert_same(oracle.whole_grads(made.model), oracle.clip_by_global_norm(before, 0.5))
                made.optimizer.step()
                made.optimizer.zero_grad()
        assert report is not None
        assert report.total_norm.item() == pytest.approx(truth.norms[step], rel=1e-5)
        assert report.clipped
        assert_same_everywhere(report.to_dict())
    assert_trained_alike(made, truth)


@ranks(2)
def test_bf16() -> None:
    made = prepare(start("ddp", mixed_precision="bf16"))
    clipper = AcceleratedClipper(made.accelerator, made.model, made.optimizer, clip=0.5)
    accumulate(made, 0)
    before = oracle.whole_grads(made.model)
    report = clipper.clip()
    assert report is not None
    assert report.total_norm.item() == pytest.approx(oracle.norm(before), rel=1e-6)
    assert report.total_norm.item() == pytest.approx(alone(1).norms[0], rel=0.05)
    assert report.total_norm.item() != pytest.approx(alone(1).norms[0], rel=1e-5)
    oracle.assert_same(oracle.whole_grads(made.model), oracle.clip_by_global_norm(before, 0.5))


@ranks(2)
@pytest.mark.parametrize(
    ("kind", "scaler"), [("ddp", "torch"), ("fsdp2", "torch"), ("fsdp1", "sharded"), ("fsdp1", "torch")]
)
@pytest.mark.parametrize("how", ["clipper", "norm", "value"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(kind: str, scaler: str, how: str) -> None:
    """Under FSDP1 torch's scaler looks at one rank's gradients; Accelerate takes FSDP1's own there."""
    accelerator = start(kind, mixed_precision="fp16")
    put_scaler(accelerator, scaler)
    made = prepare(accelerator)
    clipper = AcceleratedClipper(accelerator, made.model, made.optimizer, clip=0.5) if how == "clipper" else None
    installed = None if clipper else install(accelerator)
    truth = alone(1)
    for step in range(3):
        old = [local(param).detach().clone() for param in made.model.parameters()]
        for micro in range(MICRO):
            with accelerator.accumulate(made.model):
                with planted(made.model, overflow=step == 1 and micro == MICRO - 1):
                    backward(made, step, micro)
                if clipper:
                    clipper.clip()
                elif accelerator.sync_gradients and how == "norm":
                    norm = accelerator.clip_grad_norm_(made.model.parameters(), 0.5)
                    assert step or norm.item() == pytest.approx(truth.norms[0], rel=1e-2)
                elif accelerator.sync_gradients:
                    accelerator.clip_grad_value_(made.model.parameters(), 0.01)
                    grads = [local(p.grad) for p in made.model.parameters() if p.grad is not None and p.grad.numel()]
                    assert step == 1 or max(grad.abs().max() for grad in grads if grad.numel()) <= 0.01
                made.optimizer.step()
                made.optimizer.zero_grad()
        same = [torch.equal(one, local(param)) for one, param in zip(old, made.model.parameters(), strict=True)]
        assert all(same) == (step == 1)
        assert made.optimizer.step_was_skipped == (step == 1)
        assert accelerator.scaler.get_scale() == (64.0 if step < 1 else 32.0)
    if clipper:
        assert clipper.clipper._stepping.scaler is accelerator.scaler
        assert clipper.report is not None
        assert clipper.report.total_norm.isfinite()
    if installed:
        installed.remove()


@ranks(2)
def test_parts_of_a_model_are_unscaled_once() -> None:
    """Accelerate itself unscales at each call, of which torch lets the second fail."""
    accelerator = start("ddp", mixed_precision="fp16")
    put_scaler(accelerator, "torch")
    made = prepare(accelerator)
    install(accelerator)
    accumulate(made, 0)
    before = oracle.whole_grads(made.model)
    params = [param for param in made.model.parameters() if param.requires_grad]
    norms = [accelerator.clip_grad_norm_(part, 0.5).item() for part in (params[:3], params[3:])]
    assert math.hypot(*norms) == pytest.approx(oracle.norm(before) / 64.0, rel=1e-6)


@ranks(2)
@pytest.mark.parametrize("kind", KINDS)
def test_installed_calls(kind: str) -> None:
    accelerator = start(kind)
    own = dict(vars(accelerator))
    installed = install(accelerator)
    made = prepare(accelerator)
    trained = {oracle.clean(name): param for name, param in made.model.named_parameters() if param.requires_grad}
    halves = [dict(list(trained.items())[:4]), dict(list(trained.items())[4:])]
    for step, parts in enumerate([[trained], halves]):
        accumulate(made, step)
        for part in parts:
            before = oracle.whole_grads(made.model)
            chosen = {name: grad for name, grad in before.items() if name in part}
            norm = accelerator.clip_grad_norm_(part.values(), 0.5)
            assert isinstance(norm, Tensor)
            assert norm.item() == pytest.approx(oracle.norm(chosen), rel=1e-6)
            assert_same_everywhere(norm.item())
            oracle.assert_same(oracle.whole_grads(made.model), before | oracle.clip_by_global_norm(chosen, 0.5))
        accelerator.clip_grad_norm_(made.model, 0.4, norm_type=1)
        after = oracle.whole_grads(made.model)
        assert oracle.norm(after, 1.0) == pytest.approx(0.4, rel=1e-5)
        chosen = {name: after[name] for name in halves[0]}
        limit = float(np.median(np.abs(np.concatenate([grad.ravel() for grad in chosen.values()]))))
        accelerator.clip_grad_value_(halves[0].values(), limit)
        oracle.assert_same(oracle.whole_grads(made.model), after | oracle.clip_by_value(chosen, -limit, limit))
        made.optimizer.zero_grad()
    installed.remove()
    installed.remove()  # nothing left to do
    added = {"_models", "_optimizers", "step"}
    assert {name for name, value in vars(accelerator).items() if own.get(name) is not value} <= added
    assert accelerator.clip_grad_norm_.__func__ is Accelerator.clip_grad_norm_
    if kind != "ddp":
        with pytest.raises(Exception, match="do not support `clip_grad_value_`"):
            accelerator.clip_grad_value_(made.model.parameters(), 1.0)


@ranks(2)
def test_without_distclip_a_part_of_an_fsdp1_model_has_another_norm_on_each_rank() -> None:
    """What the test above would not notice if every norm were the local one."""
    made = prepare(start("fsdp1"))
    accumulate(made, 0)
    trained = [param for param in made.model.parameters() if param.requires_grad]
    before = oracle.whole_grads(made.model)
    theirs = on_all_ranks(made.accelerator.clip_grad_norm_(trained, math.inf).item())
    assert len(set(theirs)) == 2
    assert oracle.norm(before) not in [pytest.approx(norm, rel=1e-3) for norm in theirs]
    install(made.accelerator)
    made.accelerator.clip_grad_value_(trained, 0.01)
    oracle.assert_same(oracle.whole_grads(made.model), oracle.clip_by_value(before, -0.01, 0.01))


@ranks(2)
def test_calls_must_ask_for_what_was_announced() -> None:
    accelerator = start("ddp")
    installed = install(accelerator, rule="value=0.01 | global_norm=0.5")
    made = prepare(accelerator)
    accumulate(made, 0)
    before = oracle.whole_grads(made.model)
    for name, limit in (("clip_grad_norm_", 0.6), ("clip_grad_value_", 1.0)):
        with pytest.raises(ValueError, match=r"called after install\(accelerator, value=.* \| global_norm=0.5\)"):
            getattr(accelerator, name)(made.model, limit)
    oracle.assert_same(oracle.whole_grads(made.model), before)
    accelerator.clip_grad_value_(made.model, 0.01)
    accelerator.clip_grad_norm_(made.model, 0.5)
    limited = oracle.clip_by_value(before, -0.01, 0.01)
    oracle.assert_same(oracle.whole_grads(made.model), oracle.clip_by_global_norm(limited, 0.5))
    with pytest.raises(RuntimeError, match="is installed on this Accelerator already"):
        install(accelerator)
    installed.remove()
    install(accelerator).remove()


@ranks(2)
@pytest.mark.parametrize(
    "kind", ["zero2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("zero0", "zero1", "zero3"))]
)
@pytest.mark.parametrize(
    ("clipping", "rule", "max_norm", "value", "early"),
    [
        ("auto", None, 1.0, math.inf, True),
        (0.25, None, 0.25, math.inf, False),
        (None, "value=0.02 | global_norm=0.5", 0.5, 0.02, True),
    ],
    ids=["auto", "configured", "given"],
)
def test_installed_on_a_deepspeed_engine(
    kind: str, clipping: float | str | None, rule: str | None, max_norm: float, value: float, early: bool
) -> None:
    """``early``: before ``prepare``."""
    accelerator = start(kind, clipping=clipping)
    installed = install(accelerator, rule) if early else None
    made = prepare(accelerator)
    installed = installed or install(accelerator, rule)
    truth = alone(2, max_norm, value)
    for step in range(2):
        for micro in range(MICRO):
            with accelerator.accumulate(made.model):
                backward(made, step, micro)
                norm = accelerator.clip_grad_norm_(made.model.parameters(), max_norm)
                if value < math.inf:
                    accelerator.clip_grad_value_(made.model.parameters(), value)
                made.optimizer.step()
                made.optimizer.zero_grad()
                if step == micro == 0:
                    assert norm is None
        assert norm.item() == pytest.approx(truth.norms[step], rel=1e-5)
        assert norm.item() > max_norm
        assert accelerator.clip_grad_norm_(made.model.parameters(), math.inf) is norm
        assert_same_everywhere(norm.item())
    assert_trained_alike(made, truth)
    check_refusals(made)
    assert len(accelerator._custom_objects) == 1
    installed.remove()
    assert accelerator._custom_objects == []
    assert "clip_grad_norm_" not in vars(accelerator)
    assert "prepare" not in vars(accelerator)
    assert made.model.gradient_clipping() == {"auto": 1.0, 0.25: 0.25, None: 1.0}[clipping]
    # DeepSpeed's own again.
    accumulate(made, 2)
    assert accelerator.clip_grad_norm_(made.model.parameters(), 123.0) is not None


def check_refusals(made: Prepared) -> None:
    """The engine has stepped: calls that would have had it do something else are errors."""
    accelerator, params = made.accelerator, list(made.model.parameters())
    with pytest.raises(ValueError, match=r"clip_grad_norm_\(max_norm=7\) comes too late .*\(accelerator, '.*=7"):
        accelerator.clip_grad_norm_(params, 7)
    with pytest.raises(ValueError, match=r"clip_grad_value_\(clip_value=9\) comes too late .* 'value=-?9"):
        accelerator.clip_grad_value_(params, 9)
    with pytest.raises(ValueError, match=r"norm_type=1\) comes too late"):
        accelerator.clip_grad_norm_(params, math.inf, norm_type=1)
    with pytest.raises(ValueError, match=r"was given all but .* of the .* parameters"):
        accelerator.clip_grad_norm_(params[:2], math.inf)
    with pytest.raises(ValueError, match="max_norm"):
        accelerator.clip_grad_norm_(params, -1.0)


@ranks(1)
def test_an_engine_whose_configuration_does_not_clip_only_measures() -> None:
    accelerator = start("zero2", clipping=None)
    installed = install(accelerator)
    with pytest.raises(RuntimeError, match=r"clip_grad_norm_\(max_norm=1\) came before accelerator.prepare\(\)"):
        accelerator.clip_grad_norm_([], 1.0)
    made = prepare(accelerator)
    accumulate(made, 0)
    norm = accelerator.clip_grad_norm_(made.model.parameters(), math.inf)
    assert norm.item() == pytest.approx(alone(1).norms[0], rel=1e-5)
    assert_trained_alike(made, alone(1))
    with pytest.raises(ValueError, match=r"clipped by global_norm=inf"):
        accelerator.clip_grad_norm_(made.model.parameters(), 1.0)
    installed.remove()


@ranks(2)
@pytest.mark.parametrize("kind", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_clipper_on_a_deepspeed_engine(kind: str, clip: float | None) -> None:
    made = prepare(start(kind, clipping=0.25 if clip is None else None))
    clipper = AcceleratedClipper(made.accelerator, made.model, made.optimizer, clip=clip)
    max_norm = clip or 0.25
    assert holds(clipper.clipper.rule, max_norm)
    truth = alone(2, max_norm)
    for step in range(2):
        assert step_with(made, clipper, step).total_norm.item() == pytest.approx(truth.norms[step], rel=1e-5)
    assert_trained_alike(made, truth)
    with pytest.raises(ValueError, match="loss= comes too late under DeepSpeed"):
        clipper.clip(loss=1.0)
    clipper.detach()
    assert made.accelerator._custom_objects == []
    assert made.model.gradient_clipping() == (0.25 if clip is None else 1.0)


@ranks(1)
def test_a_configured_norm_that_another_rule_replaces_is_told() -> None:
    made = prepare(start("zero2", clipping=0.25))
    with pytest.warns(UserWarning, match=r"gradient_clipping=0.25 in DeepSpeed's configuration is off: ZClip"):
        AcceleratedClipper(made.accelerator, made.model, clip="zclip")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2"])
def test_a_resumed_run_goes_on_to_the_bit(kind: str, tmp_path: Path) -> None:
    """ZClip remembers; it clips from its third step on here. The second run has made a step of its own before."""
    for whole, resumed, forgetful in zip(
        run_ranks(steps_of, 2, kind, tmp_path, range(6), save=2),
        run_ranks(steps_of, 2, kind, tmp_path, range(3, 6), load=True),
        run_ranks(steps_of, 2, kind, tmp_path, range(3, 6)),
        strict=True,
    ):
        assert any(report["clipped"] for report in whole[0][3:])
        assert resumed[0] == whole[0][3:]
        assert resumed[1] == whole[1]
        # What only the memory decides.
        assert [report["threshold"] for report in forgetful[0]] != [report["threshold"] for report in resumed[0]]


def steps_of(kind: str, folder: Path, steps: range, save: int | None = None, load: bool = False) -> tuple[Any, Any]:
    """The reports of these steps, and the parameters after them."""
    made = prepare(start(kind, **({"clipping": None} if kind == "zero2" else {})))
    clip = "zclip,warmup_steps=2,z_thresh=0.1,max_norm=inf,mode=percentile"
    clipper = AcceleratedClipper(made.accelerator, made.model, made.optimizer, clip=clip)
    if load:
        step_with(made, clipper, 99)
        made.accelerator.load_state(str(folder))
        assert clipper.clipper.steps == steps.start
    reports = []
    for step in steps:
        reports.append(step_with(made, clipper, step).to_dict())
        if step == save:
            made.accelerator.save_state(str(folder))
    return reports, {name: param.tolist() for name, param in params_of(made).items()}


class Listed(GeneralTracker):  # type: ignore[misc]  # no types
    """A tracker of one's own, as Accelerate's documentation has them."""

    name = "listed"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> list[Any]:
        return self.lines

    @on_main_process  # type: ignore[untyped-decorator]
    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.lines.append((step, values))


@pytest.mark.parametrize("kind", ["ddp", "zero2"])
def test_trackers(kind: str, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (norms, lines), (_, others) = run_ranks(tracked, 2, kind, tmp_path)
    assert [step for step, _ in lines] == [2, 4]
    assert [values["mine/grad_norm"] for _, values in lines] == norms[1::2]
    assert lines[0][1]["mine/clip_coef"] == pytest.approx(0.5 / (norms[1] + 1e-6), rel=1e-5)
    assert others == []
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    wanted = {"mine/grad_norm", "mine/grad_norm_clipped", "mine/clip_coef", "mine/clipped"}
    assert wanted <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("mine/grad_norm")] == [2, 4]
    assert [event.value for event in events.Scalars("mine/grad_norm")] == pytest.approx(norms[1::2], rel=1e-6)


def tracked(kind: str, folder: Path) -> tuple[list[float], list[Any]]:
    listed = Listed()
    options: dict[str, Any] = {"clipping": None} if kind == "zero2" else {}
    accelerator = start(kind, log_with=["tensorboard", listed], project_dir=str(folder), **options)
    accelerator.init_trackers("run")
    made = prepare(accelerator)
    clip = ClipConfig(rule=0.5, log_every=2, log_prefix="mine/")
    clipper = AcceleratedClipper(accelerator, made.model, made.optimizer, clip=clip)
    norms = [step_with(made, clipper, step).total_norm.item() for step in range(4)]
    accelerator.end_training()
    return norms, listed.lines


# Accelerate's way to the mesh.
@pytest.mark.filterwarnings("ignore:Slicing a flattened dim from root mesh:UserWarning")
@ranks(4)
def test_hybrid_sharding() -> None:
    made = prepare(start("hsdp"))
    clipper = AcceleratedClipper(made.accelerator, made.model, made.optimizer, clip=0.5)
    truth = alone(2, max_norm=0.5)
    for step in range(2):
        assert step_with(made, clipper, step).total_norm.item() == pytest.approx(truth.norms[step], rel=1e-5)
    assert_trained_alike(made, truth)


@ranks(2)
def test_tensor_parallelism() -> None:
    """Accelerate wants to be told that the script has cut the model. All ranks see the same batch."""
    accelerator = start("tp")
    net: Any = LAYOUTS["tp"].wrap(make_net(LAYOUTS["tp"].hidden))
    net.tp_size = 2
    made = Prepared(accelerator, *accelerator.prepare(net, make_sgd(net)))
    clipper = AcceleratedClipper(accelerator, made.model, made.optimizer, clip=0.5)
    install(accelerator)
    params = list(made.model.parameters())
    for step, by_clipper in enumerate([True, False]):
        for micro in range(MICRO):
            with accelerator.accumulate(made.model):
                accelerator.backward(loss_of(made.model, micro_batch(step, micro)))
        before = oracle.whole_grads(made.model)
        report = clipper.clip() if by_clipper else None
        norm = report.total_norm if report else accelerator.clip_grad_norm_(params, 0.5)
        assert norm.item() == pytest.approx(oracle.norm(before), rel=1e-6)
        oracle.assert_same(oracle.whole_grads(made.model), oracle.clip_by_global_norm(before, 0.5))
        old = [local(param).detach().clone() for param in params]
        made.optimizer.step()
        made.optimizer.zero_grad()
        assert not all(torch.equal(one, local(param)) for one, param in zip(old, params, strict=True))


@ranks(2)
def test_axes_are_those_of_the_accelerators_mesh() -> None:
    accelerator = start("ddp")
    accelerator.state.device_mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    model = make_net()
    with torch.no_grad():
        model.scale.add_(dist.get_rank())
    with pytest.raises(ValueError, match="sharded: the mesh has no axis 'epp'; did you mean 'ep'"):
        AcceleratedClipper(accelerator, model, clip=ClipConfig(sharded={"scale": "epp"}))
    clipper = AcceleratedClipper(accelerator, model, clip=ClipConfig(rule=0.5, sharded={"scale": "ep"}, check="never"))
    for name, param in model.named_parameters():
        param.grad = torch.full_like(param, 3.0 + dist.get_rank()) if name == "scale" else None
    report = clipper.clip()
    assert report is not None
    assert report.total_norm.item() == pytest.approx(5.0)


@ranks(1)
def test_settings_come_from_the_environment(tmp_path: Path) -> None:
    made = prepare(start("ddp"))
    file = tmp_path / "distclip.yaml"
    file.write_text("rule: zclip\nlog_every: 7\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTCLIP_CONFIG", str(file))
        patch.setenv("DISTCLIP_LOG_PREFIX", "grads/")
        clipper = AcceleratedClipper(made.accelerator, made.model, made.optimizer)
    assert clipper.config == ClipConfig(rule="zclip", log_every=7, log_prefix="grads/")


@ranks(1)
def test_mistakes() -> None:
    accelerator = start("ddp", mixed_precision="fp16")
    model = make_net()
    with pytest.raises(TypeError, match=r"accelerator must be an accelerate\.Accelerator, got Net"):
        AcceleratedClipper(model, model)
    with pytest.raises(TypeError, match=r"accelerator must be an accelerate\.Accelerator, got str"):
        install("accelerator")
    with pytest.raises(ValueError, match="did you mean 'zclip'"):
        install(accelerator, "zclipp")
    assert not hasattr(accelerator, "_distclip_installed")
    put_scaler(accelerator, "torch")
    with pytest.raises(ValueError, match=r"optimizer is needed with mixed_precision='fp16'"):
        AcceleratedClipper(accelerator, model)
    for kind in (DistributedType.MEGATRON_LM, DistributedType.XLA):
        accelerator.state.distributed_type = kind
        with pytest.raises(NotImplementedError, match=f"Accelerate's {kind.value}"):
            install(accelerator)
    accelerator.state.distributed_type = DistributedType.DEEPSPEED
    with pytest.raises(ValueError, match=r"model must be the DeepSpeed engine .* got Net"):
        AcceleratedClipper(accelerator, model)
    assert accelerator._custom_objects == []
