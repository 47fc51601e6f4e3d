"""One clip from end to end: local gradients, norms, decision, application, report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from distclip.apply import clamp_, scale_
from distclip.gradients import LocalGrads, check_limits, local_grads
from distclip.plan import Plan
from distclip.reduction import Failure, StalePlan, forewarn, measure
from distclip.report import ClipReport
from distclip.rules.base import Decision, Norms, Rule

NonFinite = Literal["propagate", "raise", "skip"]
NONFINITE: tuple[NonFinite, ...] = get_args(NonFinite)


def settings_of(rule: Rule) -> str:
    """What a plan is made for: ranks that differ in it would reduce buffers of different sizes."""
    limits = ", limits elements" if rule.bounds is not None else ""
    return f"norm_type={rule.norm_type}{', norms per tensor' if rule.needs_per_tensor else ''}{limits}"


def how_of(nonfinite: NonFinite) -> str:
    """What ranks must agree on in each clip besides the rule."""
    return f", nonfinite={nonfinite}"


def clip(
    plan: Plan, params: Sequence[Tensor], rule: Rule, nonfinite: NonFinite = "propagate", foreach: bool | None = None
) -> ClipReport:
    """Clip the gradients of ``params`` by ``rule`` in place. Collective: at most one all-reduce.

    Host syncs: none, but for ``nonfinite="raise"`` on an accelerator, which waits for the norm.

    Raises:
        RuntimeError: the norm is not finite and ``nonfinite="raise"``; on every rank, with no gradient changed.
        Failure: another rank cannot clip.
    """
    grads = own_gradients(plan, params, rule, nonfinite)
    verdict = judge(plan, grads, rule, nonfinite)
    carry_out(plan, grads, rule, verdict, foreach=foreach)
    return verdict.report


@dataclass(frozen=True)
class Verdict:
    """What becomes of one step's gradients; the same on every rank."""

    total_norm: Tensor
    """0-d, float64 (the report's may be float32)."""
    coefficient: Tensor | None
    """As a rule decided it (see ``Decision``)."""
    report: ClipReport


def judge(
    plan: Plan,
    grads: dict[torch.device, LocalGrads],
    rule: Rule,
    nonfinite: NonFinite = "propagate",
    grad_scale: Tensor | None = None,
) -> Verdict:
    """Measure the gradients and ask the rule. Changes nothing. Collective, and raises, as ``clip``.

    Args:
        grad_scale: what the gradients were multiplied by (a loss scale), 0-d; the verdict is on those without it.
    """
    norms = measure(plan, grads, rule, how_of(nonfinite))
    if grad_scale is not None:
        norms = norms.divided_by(grad_scale.to(norms.total.device))
    found = ~norms.total.isfinite()
    if nonfinite == "raise":
        raise_if(found, rule.norm_type)
    decision = rule.decide(norms)
    report = report_of(plan, rule, norms, decision, found)
    if nonfinite == "skip":
        report = replace(report, skipped=found)
    return Verdict(norms.total, decision.coefficient, report)


def carry_out(
    plan: Plan,
    grads: dict[torch.device, LocalGrads],
    rule: Rule,
    verdict: Verdict,
    grad_scale: Tensor | None = None,
    foreach: bool | None = None,
) -> None:
    """Change gradients, all or some, as the verdict on all says, and take ``grad_scale`` off them. Local."""
    coefficient = None if rule.bounds is not None else _of_this_rank(plan, verdict.coefficient)
    if grad_scale is not None:
        scale = grad_scale.to(verdict.total_norm.device).double()
        coefficient = scale.reciprocal() if coefficient is None else coefficient / scale
    scale_(grads, coefficient, foreach)
    if rule.bounds is not None and not known_to_be_one(verdict.coefficient):
        clamp_(grads, rule.bounds, foreach)


def known_to_be_one(coefficient: Tensor | None) -> bool:
    """Whether nothing changes, where that can be seen without waiting for a device."""
    return coefficient is None or (coefficient.device.type == "cpu" and bool((coefficient == 1.0).all()))


def own_gradients(
    plan: Plan,
    params: Sequence[Tensor],
    rule: Rule,
    nonfinite: NonFinite,
    find: Callable[[Plan, Sequence[Tensor]], dict[torch.device, LocalGrads]] = local_grads,
) -> dict[torch.device, LocalGrads]:
    """This rank's gradients; where they cannot be clipped, the others learn of it before this rank raises."""
    how = how_of(nonfinite)
    try:
        if plan.settled:
            forewarn(plan, rule, how)
        grads = find(plan, params)
        if rule.bounds is not None:
            check_limits(plan, grads, rule.bounds)
    except (StalePlan, Failure):
        raise
    except Exception:
        tell(plan, rule, how, Failure)
        raise
    return grads


def tell(plan: Plan, rule: Rule, how: str, trouble: type[Exception]) -> None:
    """Take part in the others' clip only to tell them of this rank's trouble: StalePlan or Failure.

    Where the all-reduce runs on an accelerator nobody could hear it without waiting: ranks must change alike there.
    """
    if plan.wire is not None and plan.wire.type == "cpu" and plan.participants.is_current:
        with contextlib.suppress(StalePlan, Failure):
            if plan.settled:
                forewarn(plan, rule, how, trouble)
            else:
                measure(plan, {}, rule, how, trouble)


def _of_this_rank(plan: Plan, coefficient: Tensor | None) -> Tensor | None:
    """Of one coefficient for each tensor of the job, those for this rank's."""
    if coefficient is None or coefficient.ndim == 0:
        return coefficient
    return coefficient[plan.slots.to(coefficient.device)]


def raise_if(found: Tensor, norm_type: float) -> None:
    """Raise on every rank where any holds an inf or NaN."""
    if found:
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite: on some rank a "
            "gradient holds an inf or NaN. No gradient was changed. To clip regardless, set error_if_nonfinite=False "
            "(GradClipper: nonfinite='propagate' or 'skip')."
        )


def returned(plan: Plan, norm: Tensor) -> Tensor:
    """A norm in the dtype that users see."""
    return norm if plan.float64 else norm.float()


def report_of(plan: Plan, rule: Rule, norms: Norms, decision: Decision, found: Tensor) -> ClipReport:
    """What a clip did that measured ``norms`` and applied ``decision``."""
    coefficient = torch.ones_like(norms.total)
    if decision.coefficient is not None and decision.coefficient.numel():
        coefficient = decision.coefficient.amin()
    per_tensor = None
    if norms.per_tensor is not None:
        per_tensor = dict(
            zip(plan.tensors, norms.per_tensor[plan.slots.to(norms.per_tensor.device)].unbind(), strict=True)
        )
    return ClipReport(
        total_norm=returned(plan, norms.total),
        coefficient=coefficient,
        threshold=decision.threshold,
        clipped=coefficient < 1.0,
        nonfinite=found,
        skipped=torch.zeros_like(found),
        clipped_norm=None if rule.bounds is not None else returned(plan, _after(norms, decision, rule.norm_type)),
        per_tensor=per_tensor,
    )


def _after(norms: Norms, decision: Decision, p: float) -> Tensor:
    """The total norm that the decision leaves."""
    if decision.coefficient is None:
        return norms.total
    if decision.coefficient.ndim == 0:
        return norms.total * decision.coefficient
    assert norms.per_tensor is not None
    norm: Tensor = torch.linalg.vector_norm(norms.per_tensor * decision.coefficient, p)
    return norm
