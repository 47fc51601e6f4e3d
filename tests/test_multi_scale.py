"""The Triton kernel that scales: on a GPU, or in Triton's interpreter, wherever that installs (TRITON_INTERPRET=1)."""

import os

import pytest
import torch

from distclip.kernels import multi_scale

pytest.importorskip("triton", reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA GPU, or TRITON_INTERPRET=1"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_coefficient_and_one_for_each(dtype: torch.dtype) -> None:
    sizes = (1, 5, 1024, 70_000)
    for coefficients in (torch.tensor(0.3), torch.tensor([0.3, 1.0, 0.0, 2.5])):
        factors = coefficients.double().to(DEVICE)
        tensors = [torch.randn(size, device=DEVICE).to(dtype) for size in sizes]
        wanted = [(t.float() * f.float()).to(dtype) for t, f in zip(tensors, factors.expand(4), strict=True)]
        multi_scale.scale_(tensors, factors)
        # The interpreter cuts float32 off to bfloat16, where a GPU rounds.
        rtol = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0
        for tensor, want in zip(tensors, wanted, strict=True):
            torch.testing.assert_close(tensor, want, rtol=rtol, atol=0)


def test_a_coefficient_of_one_leaves_nan_payloads_alone() -> None:
    tensor = torch.tensor([0x7FC01234, 0x7F800001], dtype=torch.int32, device=DEVICE).view(torch.float32)
    before = tensor.view(torch.int32).clone()
    multi_scale.scale_([tensor], torch.ones((), dtype=torch.float64, device=DEVICE))
    assert torch.equal(tensor.view(torch.int32), before)


def test_other_tensors_in_the_same_place() -> None:
    for size in (10, 20, 10):
        tensors = [torch.ones(size, device=DEVICE), torch.ones(7, device=DEVICE)]
        multi_scale.scale_(tensors, torch.tensor(3.0, dtype=torch.float64, device=DEVICE))
        assert all(bool((tensor == 3).all()) for tensor in tensors)


@pytest.mark.skipif(INTERPRETED, reason="the device check is for CUDA")
def test_what_is_left_to_torch() -> None:
    assert multi_scale.can_scale([torch.ones(3, device="cuda")])
    assert not multi_scale.can_scale([torch.ones(3)])
    assert not multi_scale.can_scale([torch.ones(3, device="cuda", dtype=torch.float64)])
    assert not multi_scale.can_scale([torch.ones(3, 4, device="cuda").t()])
