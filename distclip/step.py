"""How a verdict reaches the optimizers: written to the gradients, folded into a fused step, or the step left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from distclip import amp, engine
from distclip.apply import apply
from distclip.gradients import LocalGrads
from distclip.gradients import found as found_grads
from distclip.optimizers import Fold, can_fold, check_covered, fits_grad_scale, inside_step
from distclip.plan import Plan


class Stepping:
    """The optimizers, and perhaps the scaler, of one clipper."""

    def __init__(self, optimizers: tuple[Optimizer, ...], scaler: torch.amp.GradScaler | None) -> None:
        self.optimizers = optimizers
        self.scaler = scaler
        self._fold: Fold | None = None
        self._folded_scale: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Copied parameters have no gradients: what waits for a step is for those of the original alone.
        return Stepping, (self.optimizers, self.scaler)

    def grad_scale(self, params: Sequence[Tensor], scaler: torch.amp.GradScaler | None) -> Tensor | None:
        """What the gradients are still multiplied by, 0-d; None where they are not.

        Raises:
            ValueError: a scaler without optimizers; optimizers of other parameters.
            RuntimeError: see ``amp.scale_of``.
        """
        if scaler is None or not scaler.is_enabled():
            return None
        if not self.optimizers:
            raise ValueError("scaler= needs optimizer=: GradClipper(model, rule, optimizer=optimizer, scaler=scaler)")
        check_covered(self.optimizers, params)
        scale = amp.scale_of(scaler, self.optimizers)
        if scale is None and self._fold is not None and self._fold.waits:
            # The clip that told the scaler so has left it to a step which is still to come.
            return self._folded_scale
        return scale

    def scales(self, scaler: torch.amp.GradScaler | None) -> bool:
        """Whether the scaler decides on the step."""
        return scaler is not None and scaler.is_enabled()

    def unscaled_before(self) -> bool:
        """Whether a clip has unscaled these gradients already since the scaler's last ``update()``."""
        scaler = self.scaler
        return scaler is not None and scaler.is_enabled() and amp.unscaled_by_clip(scaler, self.optimizers)

    def apply(
        self,
        plan: Plan,
        params: Sequence[Tensor],
        grads: dict[torch.device, LocalGrads],
        verdict: engine.Verdict,
        scaler: torch.amp.GradScaler | None,
        grad_scale: Tensor | None,
        may_skip: bool,
    ) -> str:
        """Do what the verdict says; returns how. Local. Waits for the device only to skip without a fused step.

        Args:
            may_skip: whether the verdict can be to skip.
        """
        if self._fold is not None:
            self._fold.drop()
            self._fold = None
        found, skipped, effect = verdict.report.nonfinite, verdict.report.skipped, verdict.effect
        scaled = self.scales(scaler)
        if scaler is not None and scaled:
            amp.record(scaler, self.optimizers, found, by_clip=True)
        on_host = found.device.type == "cpu"
        if on_host and scaled and found:
            return "skipped"  # by the scaler
        skips = on_host and may_skip and bool(skipped)
        if on_host and grad_scale is None and effect.known_to_be_nothing and not found and not skips:
            return "nothing"
        divisor = _divisor(effect.coefficient, found, grad_scale) if effect.scales_only else None
        if divisor is not None and can_fold(self.optimizers, params) and not inside_step(self.optimizers):
            self._fold = Fold(
                self.optimizers,
                divisor,
                skipped if may_skip else None,
                # Not these gradients: holding them would keep them alive after zero_grad().
                instead=lambda: apply(plan, found_grads(plan, params), effect, grad_scale),
            )
            self._folded_scale = grad_scale
            return "folded"
        if may_skip and skipped:
            # Optimizers pass over parameters without gradient: no update, no decay, no step count.
            for param in params:
                param.grad = None
            return "skipped"
        apply(plan, grads, effect, grad_scale)
        return "in place"


def _divisor(coefficient: Tensor | None, found: Tensor, grad_scale: Tensor | None) -> Tensor | None:
    """What a fused step is to divide gradients by; None where one float32 number cannot say it."""
    scale = torch.ones_like(found, dtype=torch.float64) if grad_scale is None else grad_scale.to(found.device).double()
    if coefficient is None:
        return scale
    if coefficient.ndim or not fits_grad_scale(coefficient):
        return None
    return scale / coefficient
