"""The Triton kernel that scales: on a GPU, or in Triton's interpreter, wherever that installs (TRITON_INTERPRET=1)."""

import os

import pytest
import torch
from torch import Tensor

from distclip.kernels import multi_scale
from distclip.kernels.chunks import cut

pytest.importorskip("triton", reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    # Triton 3.4's interpreter uses numpy in an older way.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def scale_(tensors: list[Tensor], coefficients: Tensor) -> None:
    chunks = cut(tensors)
    assert chunks is not None
    multi_scale.scale_(tensors, chunks, coefficients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_coefficient_and_one_for_each(dtype: torch.dtype) -> None:
    sizes = (1, 5, 16_384, 70_000)
    for coefficients in (torch.tensor(0.3), torch.tensor([0.3, 1.0, 0.0, 2.5])):
        factors = coefficients.double().to(DEVICE)
        tensors = [torch.randn(size, device=DEVICE).to(dtype) for size in sizes]
        wanted = [(t.float() * f.float()).to(dtype) for t, f in zip(tensors, factors.expand(4), strict=True)]
        scale_(tensors, factors)
        # The interpreter cuts float32 off to bfloat16, where a GPU rounds.
        rtol = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0
        for tensor, want in zip(tensors, wanted, strict=True):
            torch.testing.assert_close(tensor, want, rtol=rtol, atol=0)


def test_a_coefficient_of_one_leaves_nan_payloads_alone() -> None:
    tensor = torch.tensor([0x7FC01234, 0x7F800001], dtype=torch.int32, device=DEVICE).view(torch.float32)
    before = tensor.view(torch.int32).clone()
    scale_([tensor], torch.ones((), dtype=torch.float64, device=DEVICE))
    assert torch.equal(tensor.view(torch.int32), before)


def test_other_tensors_in_the_same_place() -> None:
    for size in (10, 20, 10):
        tensors = [torch.ones(size, device=DEVICE), torch.ones(7, device=DEVICE)]
        scale_(tensors, torch.tensor(3.0, dtype=torch.float64, device=DEVICE))
        assert all(bool((tensor == 3).all()) for tensor in tensors)


def test_a_part_of_a_buffer_and_nothing_beside_it() -> None:
    for before in range(1, 5):
        room = torch.ones(before + 20_000 + 3, device=DEVICE)
        scale_([room[before:-3]], torch.tensor(3.0, dtype=torch.float64, device=DEVICE))
        assert room.tolist() == [1.0] * before + [3.0] * 20_000 + [1.0] * 3


def test_a_coefficient_below_float32() -> None:
    factor = 1e-40 / 3
    for size in (5, 8192):
        tensor = torch.full((size,), 1e38, device=DEVICE)
        scale_([tensor], torch.tensor(factor, dtype=torch.float64, device=DEVICE))
        torch.testing.assert_close(tensor, torch.full_like(tensor, 1e38 * factor), rtol=2e-7, atol=0)


def test_a_write_shows_in_the_version() -> None:
    tensor = torch.ones(3, device=DEVICE)
    scale_([tensor], torch.tensor(3.0, dtype=torch.float64, device=DEVICE))
    assert tensor._version == 1
