"""One clip from end to end: local gradients, norms, decision, application, report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.apply import Effect, apply
from distclip.gradients import LocalGrads, check_limits, check_rows, local_grads
from distclip.groups import comm_device
from distclip.plan import Plan
from distclip.reduction import Failure, Seen, StalePlan, forewarn, measure
from distclip.report import ClipReport
from distclip.rules.base import Decision, Norms, Rule
from distclip.rules.stages import Pass, passes_of

NonFinite = Literal["propagate", "raise", "skip"]
NONFINITE: tuple[NonFinite, ...] = get_args(NonFinite)


def settings_of(rule: Rule) -> str:
    """What a plan is made for: ranks that differ in it would reduce buffers of different sizes."""
    return "; ".join(each.wants for each in passes_of(rule))


def how_of(nonfinite: NonFinite) -> str:
    """What ranks must agree on in each clip besides the rule."""
    return f", nonfinite={nonfinite}"


@dataclass(frozen=True)
class Moment:
    """What of one step, besides gradients and rule, a verdict is made from."""

    params: Sequence[Tensor]
    nonfinite: NonFinite = "propagate"
    grad_scale: Tensor | None = None
    """What the gradients were multiplied by (a loss scale), 0-d; the verdict is on those without it."""
    step: int = 0
    loss: Tensor | None = None
    measures_all: bool = False
    """Whether the norm of every tensor is measured, whatever the rule needs."""
    tells_all: bool = True
    """Whether the report holds them, where they are measured."""

    def how(self, plan: Plan) -> str:
        """What ranks must agree on in each clip besides the rule."""
        # A rank whose clip raised after the all-reduce could not tell the others any more, which clipped: its number
        # tells them now. Not on an accelerator, where nobody looks and each new text is a copy that waits.
        on_host = plan.wire is not None and plan.wire.type == "cpu"
        return how_of(self.nonfinite) + (f", clip number {self.step + 1}" if on_host else "")

    def passes(self, rule: Rule) -> list[Pass]:
        """The passes that the rule takes."""
        first, *others = passes_of(rule)
        return [first.detailed() if self.measures_all else first, *others]


def clip(plan: Plan, rule: Rule, moment: Moment, foreach: bool | None = None) -> ClipReport:
    """Clip the gradients of ``params`` by ``rule`` in place. Collective: one all-reduce at most for each pass.

    Host syncs: none, but for ``nonfinite="raise"`` on an accelerator, which waits for the norm.

    Raises:
        RuntimeError: the norm is not finite and ``nonfinite="raise"``; on every rank, with no gradient changed.
        Failure: another rank cannot clip.
    """
    grads = own_gradients(plan, rule, moment)
    verdict = judge(plan, grads, rule, moment)
    apply(plan, grads, verdict.effect, foreach=foreach)
    return verdict.report


@dataclass(frozen=True)
class Verdict:
    """What becomes of one step's gradients; the same on every rank."""

    total_norm: Tensor
    """0-d, float64 (the report's may be float32)."""
    effect: Effect
    """What is still to be done to them."""
    report: ClipReport


def judge(plan: Plan, grads: dict[torch.device, LocalGrads], rule: Rule, moment: Moment) -> Verdict:
    """Measure the gradients and ask the rule. Collective, and raises, as ``clip``.

    Changes nothing, but for the gradients of a rule that must see what its first part has made of them.
    """
    passes, scale = moment.passes(rule), moment.grad_scale
    seen = Seen(moment.params, _averaged(plan, moment.loss) if any(each.needs_loss for each in passes) else None)
    outcomes: list[Outcome] = []
    for wanted in passes:
        if outcomes:
            apply(plan, grads, outcomes[-1].effect, scale, unscale=False)
        norms = measure(plan, grads, wanted, moment.how(plan), seen=seen)
        if scale is not None:
            norms = norms.divided_by(scale.to(norms.total.device))
        if not outcomes and moment.nonfinite == "raise":
            raise_if(~norms.finite, rule.norm_type)
        outcomes.append(outcome_of(plan, wanted, replace(norms, step=moment.step)))
    found = ~outcomes[0].norms.finite
    skips = [decision.skip for each in outcomes for decision in each.decisions if decision.skip is not None]
    skipped = torch.stack(skips).any() if skips else torch.zeros_like(found)
    for wanted in passes:
        wanted.settle(skipped)
    report = report_of(plan, outcomes, found, skipped | found if moment.nonfinite == "skip" else skipped)
    if not moment.tells_all:
        report = replace(report, per_tensor=None)
    return Verdict(outcomes[0].norms.total, outcomes[-1].effect, report)


class Outcome(NamedTuple):
    """What the rules of one pass decided."""

    wanted: Pass
    norms: Norms
    decisions: list[Decision]
    effect: Effect


def outcome_of(plan: Plan, wanted: Pass, norms: Norms) -> Outcome:
    """Ask the rules of a pass."""
    decisions = wanted.decide(norms)
    names = plan.described.names if plan.described is not None else ()
    limits = wanted.stages[-1].limits(names, norms.step)
    return Outcome(wanted, norms, decisions, Effect.of(decisions, norms, limits))


def _averaged(plan: Plan, loss: Tensor | None) -> Tensor | None:
    """A loss as all replicas have it whom the norm's all-reduce does not reach (DDP's). Collective over these."""
    if loss is None:
        return None
    reached = set(plan.participants.ranks) if plan.participants.group is not None else set()
    others = {group.ranks: group for layout in plan.layouts for group in layout.replicated}
    for ranks, group in sorted(others.items()):
        if not reached.issuperset(ranks):
            wire = comm_device(group.group, accelerated=loss.device.type != "cpu")
            loss = loss.detach().to(wire, torch.float64, copy=True)
            dist.all_reduce(loss, group=group.group)
            loss = loss / len(ranks)
    return loss


def own_gradients(
    plan: Plan,
    rule: Rule,
    moment: Moment,
    find: Callable[[Plan, Sequence[Tensor]], dict[torch.device, LocalGrads]] = local_grads,
) -> dict[torch.device, LocalGrads]:
    """This rank's gradients; where they cannot be clipped, the others learn of it before this rank raises."""
    first, how = moment.passes(rule)[0], moment.how(plan)
    try:
        if plan.settled:
            forewarn(plan, first, how)
        grads = find(plan, moment.params)
        check_clippable(plan, grads, rule, moment.step)
    except (StalePlan, Failure):
        raise
    except Exception:
        tell(plan, rule, moment, Failure)
        raise
    return grads


def check_clippable(plan: Plan, grads: dict[torch.device, LocalGrads], rule: Rule, step: int) -> None:
    """Raise TypeError, naming the parameter, where the rule is not defined for a gradient."""
    for wanted in passes_of(rule):
        names = plan.described.names if plan.described is not None else ()
        limits = wanted.stages[-1].limits(names, step)
        if limits is not None:
            check_limits(plan, grads, limits)
        if wanted.needs_units or wanted.needs_means:
            check_rows(plan, grads, wanted.needs_means)


def tell(plan: Plan, rule: Rule, moment: Moment, trouble: type[Exception]) -> None:
    """Take part in the others' clip only to tell them of this rank's trouble: StalePlan or Failure.

    Where the all-reduce runs on an accelerator nobody could hear it without waiting: ranks must change alike there.
    """
    if plan.wire is not None and plan.wire.type == "cpu" and plan.participants.is_current:
        with contextlib.suppress(StalePlan, Failure):
            first = moment.passes(rule)[0]
            if plan.settled:
                forewarn(plan, first, moment.how(plan), trouble)
            else:
                measure(plan, {}, first, moment.how(plan), trouble)


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


def report_of(plan: Plan, outcomes: Sequence[Outcome], found: Tensor, skipped: Tensor) -> ClipReport:
    """What a clip did that went through these passes."""
    norms, last = outcomes[0].norms, outcomes[-1]
    factors = [each.effect.smallest for each in outcomes]
    coefficient = torch.ones_like(norms.total)
    for factor in factors:
        coefficient = coefficient if factor is None else coefficient * factor
    per_tensor = None
    if norms.per_tensor is not None:
        everywhere = plan.described is not None
        names = plan.described.names if plan.described is not None else plan.tensors
        here = norms.per_tensor if everywhere else norms.per_tensor[plan.slots_on(norms.per_tensor.device)]
        per_tensor = dict(zip(names, here.unbind(), strict=True))
    # A rule that only skips holds nothing to its threshold, unless it is alone.
    told = [decision for each in outcomes for decision in each.decisions]
    thresholds = [decision.threshold for decision in told if decision.skip is None] or [told[-1].threshold]
    return ClipReport(
        total_norm=returned(plan, norms.total),
        coefficient=coefficient,
        threshold=thresholds[-1],
        clipped=coefficient < 1.0,
        nonfinite=found,
        skipped=skipped,
        # Of rules one after the other with different norms, the last would tell of its own.
        clipped_norm=returned(plan, _after(last))
        if last.effect.scales_only and last.norms.norm_type == norms.norm_type
        else None,
        quantities={name: value for decision in told for name, value in decision.quantities.items()},
        per_tensor=per_tensor,
    )


def _after(outcome: Outcome) -> Tensor:
    """The total norm that a pass leaves."""
    norms = outcome.norms
    for decision in outcome.decisions:
        norms = norms.after(decision.coefficient)
    return norms.total
