"""Kernels in Triton are tried once on each device and dtype; where one fails, torch's own operations serve."""

from __future__ import annotations

from collections.abc import Callable

import torch

from distclip.warning import warn

Test = Callable[[torch.device, torch.dtype], bool]

_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
_verdicts: dict[tuple[Test, torch.device, torch.dtype], bool] = {}
_warned: set[torch.device] = set()


def passed(test: Test, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels that ``test`` tries are right there. The first time it waits for the device."""
    if device.type != "cuda" or dtype not in _DTYPES:
        return False
    key = test, device, dtype
    if key not in _verdicts:
        if torch.cuda.is_current_stream_capturing():
            return False
        _verdicts[key] = _tried(*key)
    return _verdicts[key]


def _tried(test: Test, device: torch.device, dtype: torch.dtype) -> bool:
    # Where the user forbids waiting, a trial may still. Setting the mode warns, so it is left alone elsewhere.
    mode = torch.cuda.get_sync_debug_mode()
    if mode:
        torch.cuda.set_sync_debug_mode("default")
    try:
        if test(device, dtype):
            return True
        trouble = "computes wrong numbers"
    except ImportError:
        return False
    except Exception as error:
        trouble = f"failed: {error!r:.200}"
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)
    if device not in _warned:
        _warned.add(device)
        warn(f"torch's own operations clip gradients on {device}, because Triton {trouble}")
    return False
