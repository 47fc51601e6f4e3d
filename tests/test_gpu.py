"""What a clip costs on a GPU: no wait, a few launches; and that a CUDA graph can hold it."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import distclip
from distclip.kernels import accelerator, multi_norm, multi_scale, trial
from distclip.kernels.chunks import cut

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning"),
]
SIZES = (1, 7, 64, 4096, 8192, 100_003)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gradients(dtype: torch.dtype = torch.float32, magnitude: float = 1.0, repeats: int = 1) -> list[Tensor]:
    torch.manual_seed(0)
    values = [torch.randn(size, device="cuda").clamp(-3, 3) for size in SIZES * repeats]
    return [value.double().mul(magnitude).to(dtype) for value in values]


class Model(nn.Module):
    """Parameters with gradients; what is computed with them does not matter to a clip."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.all = nn.ParameterList([nn.Parameter(torch.zeros_like(grad)) for grad in gradients(dtype)])

    def receive(self, magnitude: float) -> None:
        for param, grad in zip(self.all, gradients(magnitude=magnitude), strict=True):
            if param.grad is None:
                param.grad = torch.empty_like(param)
            param.grad.copy_(grad)

    @property
    def norm(self) -> float:
        return float(torch.stack([param.grad.double().square().sum() for param in self.all]).sum().sqrt())


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def launches(work: Callable[[], object]) -> int:
    """How much the device is given to do: kernels, copies and fills."""
    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in seen.events())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_serves(dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    device = gradients()[0].device
    assert multi_norm.can_sum(device, dtype, 2.0)
    assert multi_scale.can_scale(device, dtype)


@pytest.mark.parametrize("magnitude", [1e-25, 1e-15, 1.0, 1e15, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_and_clipped_gradients_over_the_range(dtype: torch.dtype, magnitude: float) -> None:
    model = Model(dtype)
    model.receive(magnitude)
    norm, before = model.norm, [param.grad.double() for param in model.all]
    report = distclip.GradClipper(model, rule=0.25 * (norm + 1e-6)).clip()
    torch.testing.assert_close(report.total_norm.item(), norm, rtol=1e-6, atol=0)
    for param, grad in zip(model.all, before, strict=True):
        torch.testing.assert_close(param.grad.double(), grad * 0.25, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("moved", [False, True])
def test_a_clip_never_waits(moved: bool) -> None:
    model, kept = Model(), []
    clipper = distclip.GradClipper(model, rule=1.0)
    for step in range(4):
        if moved:
            kept += [param.grad for param in model.all]
            model.zero_grad(set_to_none=True)
        model.receive(10.0 ** (step - 2))
        with no_waiting() if step else contextlib.nullcontext():
            clipper.clip()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_launches_do_not_grow_with_the_tensors(dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    factor = torch.tensor(0.999, dtype=torch.float64, device="cuda")
    for repeats in (2, 50):
        grads = gradients(dtype, repeats=repeats)
        assert launches(partial(accelerator.power_sums, grads, 2.0)) == 2
        assert launches(partial(accelerator.scale_, grads, factor, True)) == 1
        assert launches(partial(accelerator.total_power, grads, 2.0)) <= 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_each_time(dtype: torch.dtype) -> None:
    grads = [torch.randn(3_000_000, device="cuda").to(dtype), *gradients(dtype, repeats=20)]
    first, total = accelerator.power_sums(grads, 2.0), accelerator.total_power(grads, 2.0)
    for _ in range(20):
        moved = [grad.clone() for grad in grads]
        assert torch.equal(accelerator.power_sums(moved, 2.0), first)
        assert torch.equal(accelerator.total_power(moved, 2.0), total)


def test_a_captured_clip_replays() -> None:
    model = Model()
    clipper = distclip.GradClipper(model, rule=1.0)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            model.receive(1.0)
            clipper.clip()
    torch.cuda.current_stream().wait_stream(aside)
    model.receive(1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        report = clipper.clip()
    # Eager clips in between give the clipper other tables: the graph must still have its own.
    other = Model()
    for magnitude in (1e-6, 3.0, 1e15, 0.1):
        other.zero_grad(set_to_none=True)
        other.receive(1.0)
        distclip.clip_grad_norm_(other.parameters(), 1.0)
        model.receive(magnitude)
        norm, before = model.norm, [param.grad.double() for param in model.all]
        graph.replay()
        torch.testing.assert_close(report.total_norm.item(), norm, rtol=1e-6, atol=0)
        coefficient = min(1.0, 1.0 / (norm + 1e-6))
        for param, grad in zip(model.all, before, strict=True):
            torch.testing.assert_close(param.grad.double(), grad * coefficient, rtol=2.0**-22, atol=0)


def test_gradients_that_moved_are_clipped_by_torch_while_a_graph_is_captured() -> None:
    seen = gradients()
    accelerator.power_sums(seen, 2.0)
    moved = [grad.clone() for grad in seen]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert cut(moved) is None
        sums = accelerator.power_sums(moved, 2.0)
    graph.replay()
    torch.testing.assert_close(sums, accelerator.power_sums(seen, 2.0), rtol=1e-6, atol=0)


def fails(device: torch.device, dtype: torch.dtype) -> bool:
    raise ValueError("no compiler")


def errs(device: torch.device, dtype: torch.dtype) -> bool:
    return False


@pytest.mark.parametrize(("test", "told"), [(fails, "Triton failed: ValueError.*no compiler"), (errs, "wrong numbers")])
def test_a_failed_trial_is_told_once(test: trial.Test, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_verdicts", {})
    monkeypatch.setattr(trial, "_warned", set())
    device = gradients()[0].device
    with pytest.warns(UserWarning, match=f"torch's own operations clip gradients on cuda:0, because.*{told}"):
        assert not trial.passed(test, device, torch.float32)
    assert not trial.passed(test, device, torch.float32)
    assert not trial.passed(test, device, torch.bfloat16)


def test_a_trial_may_wait_where_the_user_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(trial, "_verdicts", {})
    with no_waiting():
        assert multi_norm.can_sum(gradients()[0].device, torch.float32, 2.0)
        assert torch.cuda.get_sync_debug_mode() == 2
