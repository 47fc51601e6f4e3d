"""The kernels of accelerators: on a GPU in Triton, and with torch's own operations, which run on the CPU too."""

import math

import pytest
import torch
from torch import Tensor

from distclip.kernels import accelerator
from distclip.kernels.chunks import can_cut


def mixed(device: str) -> list[Tensor]:
    """All that a gradient can be, no two of one kind side by side."""
    torch.manual_seed(0)
    wide = torch.randn(40, 30, device=device)
    return [
        torch.randn(9000, device=device),
        torch.randn(70, 5, dtype=torch.bfloat16, device=device),
        wide[:, :20].clone().t(),
        wide[:, 20:],  # with gaps
        torch.randn(30, dtype=torch.complex64, device=device),
        torch.randn((), dtype=torch.float16, device=device),
        torch.randn(3, 4, 5, 6, device=device).to(memory_format=torch.channels_last),
        torch.randn(11, dtype=torch.float64, device=device),
        torch.randn(50, dtype=torch.bfloat16, device=device)[::2],
        torch.randn(30, dtype=torch.complex64, device=device).conj(),
        torch.randn(20_000, dtype=torch.float16, device=device)[1:],
    ]


def wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_power_sums_of_all_kinds_together(device: str, p: float) -> None:
    tensors = mixed(device)
    moduli = [wide(tensor).abs() for tensor in tensors]
    wanted = torch.stack([m.amax() if math.isinf(p) else m.pow(p).sum() for m in moduli])
    sums, total = accelerator.power_sums(tensors, p), accelerator.total_power(tensors, p)
    assert sums.dtype == total.dtype == torch.float64
    torch.testing.assert_close(sums, wanted, rtol=3e-7, atol=0)
    torch.testing.assert_close(total, wanted.amax() if math.isinf(p) else wanted.sum(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("each", [True, False])
def test_scaling_all_kinds_together(device: str, each: bool, foreach: bool) -> None:
    tensors = mixed(device)
    factors = torch.linspace(0.1, 1.0, len(tensors), dtype=torch.float64, device=device)
    if not each:
        factors = factors[2]
    by_hand = factors.expand(len(tensors))
    wanted = [(wide(t) * f).to(t.dtype) for t, f in zip(tensors, by_hand, strict=True)]
    accelerator.scale_(tensors, factors, foreach)
    for tensor, want in zip(tensors, wanted, strict=True):
        # One unit in the last place: where arithmetic is float32, its result is rounded once more.
        eps = torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(tensor, want, rtol=eps, atol=eps * 1e-4)


def test_extremes_of_all_kinds_together(device: str) -> None:
    tensors = [tensor.clamp(max=0.5) if not tensor.is_complex() else tensor for tensor in mixed(device)]
    values = [tensor.abs() if tensor.is_complex() else tensor for tensor in tensors]
    wanted = torch.stack([torch.stack((-value.amin().double(), value.amax().double())) for value in values])
    assert torch.equal(accelerator.extremes(tensors), wanted)
    tensors[0][17] = math.nan
    assert accelerator.extremes(tensors)[0].isnan().all()


def test_which_tensors_lie_in_one_piece() -> None:
    whole = torch.ones(4, 6)
    assert all(map(can_cut, (whole, whole.t(), whole[1:3], torch.nn.Parameter(whole), torch.ones(()))))
    assert not any(map(can_cut, (whole[:, :3], whole[0].expand(4, 6), whole.as_subclass(_Late))))


class _Late(torch.Tensor):
    """As a collective's result: its address is not that of its elements."""
