"""torch's gradient-clipping functions, with torch's names, order and defaults, right under every layout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distclip import engine
from distclip.amp import refuse_scaled, tell
from distclip.apply import clamp_, scale_
from distclip.cache import plan_for
from distclip.compiled import eager
from distclip.gradients import check_limits, local_grads
from distclip.hints import checked_flag, shown
from distclip.layout.declared import Group, as_rank_group
from distclip.layout.dtensor import is_dtensor
from distclip.parameters import Parameters, split
from distclip.rules.norm import ClipByGlobalNorm, clip_coefficient
from distclip.rules.stages import forget_passes
from distclip.rules.thresholds import as_number, checked
from distclip.rules.value import value_bounds


@eager
@torch.no_grad()
def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    pipeline_group: Group | None = None,
) -> Tensor:
    """Clip the norm of all gradients together, as one process holding the whole model would.

    ``g <- g * min(1, max_norm / (N + 1e-6))``, where N is the ``norm_type`` norm over all gradients of all ranks.
    Collective over the ranks that share the model: none where nothing is sharded, else one all-reduce (the first call
    for a model also agrees on who takes part).

    Args:
        parameters: a module (or several), a tensor, or an iterable of tensors whose ``.grad`` is clipped. A tensor
            given twice counts once. Pass an FSDP1 model itself, at least once. Pass the parameters without regard to
            which have a gradient: ranks whose lists differ from step to step would wait for each other.
        max_norm: at least 0; inf measures and changes nothing.
        norm_type: any p above 0, or inf.
        error_if_nonfinite: raise, on every rank, if the norm is inf or NaN.
        foreach: as in torch; True raises where the device has no foreach kernels.
        pipeline_group: the ranks that hold the stages of a pipeline, this one among them: a ProcessGroup or a 1-D
            DeviceMesh. Every tensor counts apart on each of them, unless ``declare(..., replicated=)`` ties it.

    Returns:
        N before clipping: a plain 0-d float32 tensor (float64 if all parameters are), the same on every rank, on the
        device of the first gradient. If it exceeds float32 it is returned as inf, and clipping is right all the same.

    Raises:
        ValueError: ``max_norm`` is negative or NaN, ``norm_type`` is not above 0.
        TypeError: ``parameters`` holds something else than tensors and modules, or a gradient is not dense or COO.
        RuntimeError: ``error_if_nonfinite`` and the norm is not finite; gradients that FSDP has not reduced yet;
            parameters of an FSDP1 model that distclip has never seen.
        OverflowError: ``|g|**norm_type`` leaves float64.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([weight], max_norm=1.0)
        tensor(5.)
        >>> weight.grad
        tensor([0.6000, 0.8000])

    References:
        ``torch.nn.utils.clip_grad_norm_``; Pascanu et al. (arXiv 1211.5063).
    """
    rule = ClipByGlobalNorm(max_norm, norm_type)
    modules, params = split(parameters, may_be_empty=pipeline_group is not None)
    nonfinite: engine.NonFinite = "raise" if checked_flag("error_if_nonfinite", error_if_nonfinite) else "propagate"
    try:
        plan = plan_for(modules, params, engine.settings_of(rule), as_rank_group("pipeline_group", pipeline_group))
        refuse_scaled(params)
        report = engine.clip(plan, rule, engine.Moment(params, nonfinite), foreach)
    finally:
        forget_passes(rule)
    tell(params, report.nonfinite)
    return report.total_norm


@eager
@torch.no_grad()
def grad_norm(
    parameters: Parameters,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    pipeline_group: Group | None = None,
) -> Tensor:
    """The norm that ``clip_grad_norm_`` would return; changes nothing.

    Collective, arguments, result and errors as there. (``torch.nn.utils.get_total_norm`` takes the gradients instead.)
    """
    return clip_grad_norm_(parameters, math.inf, norm_type, error_if_nonfinite, foreach, pipeline_group=pipeline_group)


@eager
@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Parameters,
    max_norm: float,
    total_norm: Tensor | float,
    foreach: bool | None = None,
) -> None:
    """Scale the gradients by ``min(1, max_norm / (total_norm + 1e-6))``, the second half of ``clip_grad_norm_``.

    No communication, but for the first call for a model.

    Args:
        parameters: as for ``clip_grad_norm_``.
        max_norm: at least 0; inf changes nothing.
        total_norm: the norm as ``grad_norm`` returned it, the same on every rank. A DTensor is reduced first. Where the
            norm exceeds float32 it was returned as inf, which clears the gradients: ``clip_grad_norm_`` knows better.
        foreach: as for ``clip_grad_norm_``.

    Raises:
        ValueError: ``max_norm`` is negative or NaN; ``total_norm`` is a negative number, or a tensor of several.
        TypeError: as for ``clip_grad_norm_``; ``total_norm`` is no real number.
    """
    max_norm = checked("max_norm", max_norm)
    modules, params = split(parameters)
    norm = _as_norm(total_norm)
    grads = local_grads(plan_for(modules, params), params)
    scale_(grads, clip_coefficient(max_norm, norm), foreach)


@eager
@torch.no_grad()
def clip_grad_value_(
    parameters: Parameters,
    clip_value: float | tuple[float, float],
    foreach: bool | None = None,
) -> None:
    """Limit every gradient element: ``g <- max(min(g, hi), lo)``; NaN stays NaN.

    No communication, but for the first call for a model.

    Args:
        parameters: as for ``clip_grad_norm_``.
        clip_value: c, at least 0, for the bounds -c and c; or a pair (lo, hi).
        foreach: as for ``clip_grad_norm_``.

    Raises:
        ValueError: ``clip_value`` is negative or NaN, or lo > hi.
        TypeError: as for ``clip_grad_norm_``; a complex gradient; a sparse one if 0 lies outside the bounds.
    """
    bounds = value_bounds(clip_value)
    modules, params = split(parameters)
    plan = plan_for(modules, params)
    if plan.riding:
        # Elements can be limited only once they are reduced.
        plan = plan_for(modules, params, "limits elements", linear=False)
    grads = local_grads(plan, params)
    check_limits(plan, grads, bounds)
    clamp_(grads, bounds, foreach)


def _as_norm(total_norm: Tensor | float) -> Tensor:
    """What a user passed as a norm; float64, 0-d. A tensor is not looked at, which would wait for its device."""
    if not isinstance(total_norm, Tensor):
        number = as_number("total_norm", total_norm)
        if number < 0:
            raise ValueError(f"total_norm must be at least 0, got {shown(total_norm)}: gradients would change sign")
        return torch.tensor(number, dtype=torch.float64)
    if total_norm.is_complex() or total_norm.is_meta:
        raise TypeError(f"total_norm must be a real number, got a tensor of {total_norm.dtype} on {total_norm.device}")
    if total_norm.numel() != 1:
        raise ValueError(f"total_norm must be one number, got a tensor of shape {tuple(total_norm.shape)}")
    return (total_norm.full_tensor() if is_dtensor(total_norm) else total_norm).double().reshape(())
