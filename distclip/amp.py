"""Loss scaling: a clip takes the place of ``scaler.unscale_``, and every rank hears of every overflow.

torch's ``GradScaler`` looks for overflow on each rank by itself. Where gradients are cut (FSDP, tensor, pipeline or
expert parallel), one rank skips the step and shrinks its scale, and the others do not. A clip knows better: its norm is
finite on every rank or on none, and it is finite exactly if every gradient element is. So the clip measures the scaled
gradients, tells the scaler what it found, and takes the scale off in the pass that clips.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

__all__ = ["GradScaler"]

# Left in a scaler's notes on an optimizer by the clip that unscaled its gradients.
_BY_CLIP = "distclip_unscaled"


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` for every place where one is expected; its ``state_dict`` is torch's.

    What is different:

    - With ``GradClipper.attach(optimizer)``, ``step(optimizer)`` clips first, so that a script needs no other change.
      The clip unscales: with a fused optimizer the gradients are read once for overflow, norm and step together, where
      torch's way (``unscale_``, clip, ``step``) goes over them five times.
    - ``clip_grad_norm_`` and its kin, called after ``unscale_``, tell it what they found on all ranks, so that all skip
      the same steps and shrink the scale alike, under every layout. Called on gradients that are still scaled, they
      raise instead of clipping by a norm that is 65,536 times too large (from the second step on: before, nobody knows
      which parameters it scales).
    - Gradients in float16 are accepted.

    Without clipping it behaves as torch's does.

    Args:
        device, init_scale, growth_factor, backoff_factor, growth_interval, enabled: see ``torch.amp.GradScaler``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._scaled = False
        if self.is_enabled():
            _alive.add(self)

    def scale(self, outputs: Any) -> Any:
        """``torch.amp.GradScaler.scale``."""
        self._scaled = True
        return super().scale(outputs)

    def unscale_(self, optimizer: Optimizer) -> None:
        """``torch.amp.GradScaler.unscale_``."""
        self._stepped.add(optimizer)
        super().unscale_(optimizer)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """``torch.amp.GradScaler.step``, after the clip of a ``GradClipper`` that is attached to the optimizer."""
        self._stepped.add(optimizer)
        attachment = getattr(optimizer, "_distclip_attachment", None)
        if attachment is None or not self.is_enabled():
            return super().step(optimizer, *args, **kwargs)
        with attachment.clipped_under(self):
            return super().step(optimizer, *args, **kwargs)

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """``torch.amp.GradScaler.update``."""
        self._scaled = False
        super().update(new_scale)

    def _unscale_grads_(self, optimizer: Any, inv_scale: Any, found_inf: Any, allow_fp16: bool) -> Any:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)

    def _serves(self, params: Sequence[Tensor]) -> list[Optimizer]:
        """The optimizers that step some of these parameters."""
        if not self._scaled:
            return []
        wanted = set(map(id, params))
        return [each for each in self._stepped if any(id(p) in wanted for g in each.param_groups for p in g["params"])]


_alive: weakref.WeakSet[GradScaler] = weakref.WeakSet()


def refuse_scaled(params: Sequence[Tensor]) -> None:
    """Raise RuntimeError where a ``distclip.amp.GradScaler`` knows that these gradients are still scaled."""
    for scaler in _alive:
        for optimizer in scaler._serves(params):
            if _stage(scaler, optimizer) is OptState.READY:
                raise RuntimeError(
                    f"these gradients are still multiplied by the loss scale {scaler.get_scale():g}: call "
                    "scaler.unscale_(optimizer) before clipping, or let GradClipper(model, rule, optimizer=optimizer, "
                    "scaler=scaler) do both."
                )


def tell(params: Sequence[Tensor], found: Tensor) -> None:
    """Let those scalers know what a clip of these parameters found on all ranks."""
    for scaler in _alive:
        add(scaler, scaler._serves(params), found)


def add(scaler: torch.amp.GradScaler, optimizers: Sequence[Optimizer], found: Tensor) -> None:
    """Note what a clip found on all ranks for those of the optimizers whose gradients ``unscale_`` has unscaled."""
    for optimizer in optimizers:
        if _stage(scaler, optimizer) is OptState.UNSCALED:
            # What unscale_, or a clip of its other parameters, has found stays found. (1 and not a sum of several:
            # fused kernels skip for no other number.)
            before = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
            # FSDP1's have a shape of (1,).
            flags = [found, *(flag.view(()).to(found.device) > 0 for flag in before)]
            record(scaler, [optimizer], torch.stack(flags).any())


def scale_of(scaler: torch.amp.GradScaler, optimizers: Sequence[Optimizer]) -> Tensor | None:
    """What the gradients are multiplied by, 0-d float32; None where they are not, or not any more.

    Raises:
        RuntimeError: the optimizer has stepped since the last ``update()``, some optimizers are unscaled and others
            not, or there was another backward since the clip that unscaled them.
    """
    stages = [_stage(scaler, optimizer) for optimizer in optimizers]
    if OptState.STEPPED in stages:
        raise RuntimeError("clip() ran after scaler.step(): clip before it, and call scaler.update() after it")
    if all(stage is OptState.UNSCALED for stage in stages):
        return None
    if OptState.UNSCALED in stages:
        raise RuntimeError("scaler.unscale_() was called for some of the clipper's optimizers only: leave it to clip()")
    if scaler._scale is None:
        raise RuntimeError("scaler= was given, but no loss went through scaler.scale(loss).backward() before clip()")
    return scaler._scale


def record(scaler: torch.amp.GradScaler, optimizers: Sequence[Optimizer], found: Tensor, by_clip: bool = False) -> None:
    """Note what ``unscale_`` would: that gradients are unscaled, and whether any rank has an inf or NaN."""
    assert scaler._scale is not None
    for optimizer in optimizers:
        notes = scaler._per_optimizer_states[id(optimizer)]
        # A copy for each: update() adds them up in place.
        flag = found.to(scaler._scale.device, torch.float32, copy=True)
        notes["found_inf_per_device"] = {scaler._scale.device: flag}
        notes["stage"] = OptState.UNSCALED
        notes[_BY_CLIP] = by_clip or notes.get(_BY_CLIP, False)


def unscaled_by_clip(scaler: torch.amp.GradScaler, optimizers: Sequence[Optimizer]) -> bool:
    """Whether a clip has unscaled these gradients since the last ``update()``."""
    return any(scaler._per_optimizer_states[id(each)].get(_BY_CLIP, False) for each in optimizers)


def _stage(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> OptState:
    stage: OptState = scaler._per_optimizer_states[id(optimizer)]["stage"]
    return stage
