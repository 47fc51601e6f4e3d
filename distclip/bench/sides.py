"""The ways of clipping that are timed against each other, in one process, on one model and one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import distclip
from distclip.bench.cases import Case
from distclip.bench.layouts import Spread, local_grads
from distclip.bench.values import Values

TORCH, OURS, LIMIT, STEP = "torch", "distclip", "limit", "step"
_LOSS_SCALE = 2.0**16


@dataclass(frozen=True)
class Sides:
    """What to run in each round, by name: ``torch`` (where it has a way), ``distclip``, ``limit``; and ``step``, where
    only what clipping adds to a step counts."""

    ways: dict[str, Callable[[], object]]
    values: Values

    @property
    def base(self) -> str | None:
        """What is taken off both sides' times."""
        return STEP if STEP in self.ways else None


def sides_of(case: Case, spread: Spread) -> Sides:
    """Make clipper, optimizer and values. Local."""
    values = Values(local_grads(spread.model), spread.piece, _LOSS_SCALE if case.kind == "scaler" else 1.0)
    # Gradients are normal numbers: where something is clipped, it is halved, which keeps fp16 above its tiny numbers.
    norm = math.sqrt(case.tensors * case.numel)
    max_norm = norm / 2 if case.kind in ("clipped", "folded") else norm * 1000
    make = {"folded": _with_step, "scaler": _with_scaler}.get(case.kind, _alone)
    ways = make(case, spread, max_norm)
    return Sides({**ways, LIMIT: values.read}, values)


def _alone(case: Case, spread: Spread, max_norm: float) -> dict[str, Callable[[], object]]:
    model, settings, clip_norm = spread.model, spread.settings, spread.torch_s
    ours: Callable[[], object] = _clipper(spread, max_norm).clip
    theirs: Callable[[], object] | None = None if clip_norm is None else partial(clip_norm, max_norm)
    if case.kind == "norm":
        ours = partial(distclip.grad_norm, model, **settings)
        if clip_norm is not None:
            theirs = partial(clip_norm, math.inf) if case.layout == "fsdp1" else partial(_total_norm, model)
    elif case.kind == "function":
        ours = partial(distclip.clip_grad_norm_, model, max_norm, **settings)
    return {**({} if theirs is None else {TORCH: theirs}), OURS: ours}


def _total_norm(model: nn.Module) -> Tensor:
    """torch's half of a clip that measures. FSDP1 has no such half: there the whole one measures, up to inf."""
    return nn.utils.get_total_norm([param.grad for param in model.parameters() if param.grad is not None])


def _with_step(case: Case, spread: Spread, max_norm: float) -> dict[str, Callable[[], object]]:
    optimizer = _optimizer(spread.model)
    clipper = _clipper(spread, max_norm, optimizer=optimizer)
    torch_s = spread.torch_s

    def ours() -> None:
        clipper.clip()
        optimizer.step()

    def theirs() -> None:
        assert torch_s is not None
        torch_s(max_norm)
        optimizer.step()

    return {**({} if torch_s is None else {TORCH: theirs}), OURS: ours, STEP: optimizer.step}


def _with_scaler(case: Case, spread: Spread, max_norm: float) -> dict[str, Callable[[], object]]:
    optimizer = _optimizer(spread.model)
    device = next(spread.model.parameters()).device.type
    mine, other = (_scaler(device) for _ in range(2))
    clipper = _clipper(spread, max_norm, optimizer=optimizer, scaler=mine)
    torch_s = spread.torch_s

    def ours() -> None:
        clipper.clip()
        mine.step(optimizer)
        mine.update()

    def theirs() -> None:
        assert torch_s is not None
        other.unscale_(optimizer)
        torch_s(max_norm)
        other.step(optimizer)
        other.update()

    return {**({} if torch_s is None else {TORCH: theirs}), OURS: ours, STEP: optimizer.step}


def _clipper(
    spread: Spread,
    max_norm: float,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> distclip.GradClipper:
    return distclip.GradClipper(
        spread.model, max_norm, optimizer=optimizer, scaler=scaler, check="never", **spread.settings
    )


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)


def _scaler(device: str) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler(device, init_scale=_LOSS_SCALE)
    # It makes the tensor of its scale with the first loss.
    scaler.scale(torch.ones((), device=device))
    return scaler
