"""The gradients' values: kept once more, so that every way of clipping finds the same ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Values:
    """Normal random numbers for some gradients, in one flat tensor of their dtype and device.

    Args:
        grads: this rank's gradients.
        seed: the same for replicas.
        scale: what the numbers are multiplied by, as by a loss scale.
    """

    def __init__(self, grads: Sequence[Tensor], seed: int, scale: float = 1.0) -> None:
        first = grads[0]
        count = sum(grad.numel() for grad in grads)
        generator = torch.Generator(first.device).manual_seed(seed)
        self._flat = torch.empty(count, dtype=first.dtype, device=first.device).normal_(generator=generator).mul_(scale)
        self._parts = list(self._flat.split([grad.numel() for grad in grads]))
        self._grads = [grad.view(-1) for grad in grads]
        # Two 16-bit numbers side by side are a float32 that is as fast to add: reading is all that is to be timed.
        even = count * first.element_size() // 4 * 4 // first.element_size()
        wide = first.element_size() >= 4
        self._read = self._flat if wide else self._flat[:even].view(torch.float32)
        self.nbytes = self._flat.nbytes

    def restore(self) -> None:
        """Write them to the gradients."""
        torch._foreach_copy_(self._grads, self._parts)

    def read(self) -> Tensor:
        """Read as many bytes as the gradients have, as fast as torch can: one sum of one flat tensor."""
        return self._read.sum()
