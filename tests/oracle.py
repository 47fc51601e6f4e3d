"""The truth: gradients gathered to whole tensors on one process, in float64, and NumPy's arithmetic on them.

Gathering goes through each system's own metadata, never through distclip's layouts.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

Whole = dict[str, NDArray[np.float64]]


def whole_grads(model: nn.Module) -> Whole:
    """Every tensor's gradient, whole, in float64, by the name that the unwrapped model gives it; collective."""
    found: Whole = {}
    flattened: set[int] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel) and module._handle is not None:
            handle = module._handle
            flattened |= {id(param) for param in (handle.flat_param, *(handle.flat_param._params or ()))}
            found |= {clean(f"{prefix}.{name}"): grad for name, grad in _flat_grads(handle)}
    for name, param in model.named_parameters():
        if param.grad is not None and id(param) not in flattened:
            grad = param.grad.full_tensor() if isinstance(param.grad, DTensor) else param.grad
            found[clean(name)] = _numpy(grad)
    return found


def _flat_grads(handle: Any) -> Iterator[tuple[str, NDArray[np.float64]]]:
    flat_param = handle.flat_param
    if flat_param.grad is None:
        return
    local = flat_param.grad.detach()
    if handle.uses_sharded_strategy:
        parts = [torch.empty_like(local) for _ in range(handle.process_group.size())]
        dist.all_gather(parts, local, group=handle.process_group)
        local = torch.cat(parts)
    sizes = [*flat_param._numels_with_padding, local.numel() - sum(flat_param._numels_with_padding)]
    parts = list(local.split(sizes)[:-1])
    # Under use_orig_params each original tensor is followed by alignment padding, which is no gradient.
    real = [part for part, padding in zip(parts, flat_param._is_padding_mask, strict=True) if not padding]
    # A frozen tensor has a place, and rubbish, in the flat gradient.
    owners = flat_param._params or [flat_param] * len(real)
    for name, shape, part, owner in zip(flat_param._fqns, flat_param._shapes, real, owners, strict=True):
        if owner.requires_grad:
            yield name, _numpy(part.view(shape))


def _numpy(grad: Tensor) -> NDArray[np.float64]:
    dense = grad.detach().to_dense() if grad.is_sparse else grad.detach()
    wide = dense.to(torch.complex128).abs() if dense.is_complex() else dense.double()
    return wide.cpu().numpy().copy()


def clean(name: str) -> str:
    # The test networks themselves call nothing by these names.
    for wrapper in ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"):
        name = name.replace(f"{wrapper}.", "")
    return name.lstrip(".")


def norm(grads: Whole, p: float = 2.0) -> float:
    """``|| (||g_i||_p)_i ||_p``, accumulated over scaled values so that float64's range suffices for any input."""
    elements = np.concatenate([np.zeros(1), *(np.abs(grad).ravel() for grad in grads.values())])
    largest = float(elements.max())
    if math.isinf(p) or largest == 0.0 or not math.isfinite(largest):
        return largest
    total: float = ((elements / largest) ** p).sum()
    return largest * math.pow(total, 1.0 / p)


def clip_by_global_norm(grads: Whole, max_norm: float, p: float = 2.0) -> Whole:
    coefficient = min(1.0, max_norm / (norm(grads, p) + 1e-6))
    return {name: np.asarray(grad * coefficient) for name, grad in grads.items()}


def clip_by_norm(grads: Whole, max_norm: float) -> Whole:
    return {name: np.asarray(grad * (max_norm / max(norm({name: grad}), max_norm))) for name, grad in grads.items()}


def clip_by_value(grads: Whole, low: float, high: float) -> Whole:
    return {name: np.asarray(np.clip(grad, low, high)) for name, grad in grads.items()}


def assert_same(got: Whole, want: Whole, dtype: torch.dtype = torch.float32, all_float64: bool = False) -> None:
    """Equal to one unit in the last place of ``dtype``, or to what the norm promises if that is less."""
    assert got.keys() == want.keys()
    info = torch.finfo(dtype)
    for name, grad in want.items():
        rounded = torch.from_numpy(grad).to(dtype).double().numpy()
        rtol = max(info.eps, 1e-12 if all_float64 else 1e-6)
        np.testing.assert_allclose(got[name], rounded, rtol=rtol, atol=info.smallest_normal * info.eps, err_msg=name)
