"""Clipping while backward() runs, for optimizers that step in hooks and free each gradient at once.

There is never a moment at which all gradients exist, so a clip can look at one tensor only: at its elements, at its own
norm, or at what the backward before has told of the global norm. Hooks are those that the optimizers use themselves,
``register_post_accumulate_grad_hook``; FSDP2 calls them when it has reduced a gradient over the ranks. DDP averages
after them, and FSDP1 never calls those of a parameter, so both are refused.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distclip import backward, engine
from distclip.apply import Effect, apply, scale_
from distclip.gradients import check_limits, local_grads, version_of
from distclip.groups import comm_device
from distclip.hints import shown
from distclip.kernels.common import WIDE
from distclip.layout import RankGroup
from distclip.layout.dtensor import is_dtensor, kinds, reduced
from distclip.parameters import ModuleParameters
from distclip.participants import Participants, connect
from distclip.plan import Plan
from distclip.reduction import LocalSums, combined, forewarn, local_sums
from distclip.rules.base import Decision, Rule
from distclip.rules.stages import passes_of

if TYPE_CHECKING:
    from distclip.clipper import GradClipper

# Left on a gradient that was clipped: its version then.
_CLIPPED = "_distclip_clipped_in_backward"
_AGAIN = "Call remove() on the handle and clip_in_backward() again, before the next backward()."


class InBackward:
    """The hooks of one ``GradClipper.clip_in_backward``; ``remove()`` takes them away."""

    def __init__(self, clipper: GradClipper, plan: Plan, params: ModuleParameters, previous_norm: bool) -> None:
        # Hooks keep this object alive, and the garbage collector does not see what a parameter's hooks hold: nothing
        # here may lead back to the parameters.
        self._clipper, self._params = weakref.ref(clipper), weakref.ref(params)
        self._plan, self._rule = plan, clipper.rule
        self._previous = previous_norm
        self._how = f", in backward{' by the previous norm' if previous_norm else ''}"
        _check_layouts(plan, params)
        (self._wanted,) = passes_of(self._rule)
        forewarn(plan, self._wanted, self._how)
        alone = previous_norm or self._rule.limits_elements
        self._tensors = dict(_one_by_one(plan, params.tensors, communicate=not alone))
        self._slots = plan.slots.tolist()
        self._wire = plan.device if plan.wire is None else plan.wire
        # The first backward finds no norm before it: nothing is clipped.
        self._carried = Decision(None, torch.tensor(math.inf, dtype=torch.float64, device=plan.device))
        self._backward = -1
        self._sums = self._nothing()
        trained = [place for place, param in enumerate(params.tensors) if param.requires_grad]
        self._handles = [_hook_first(params.tensors[place], partial(self._clip, place)) for place in trained]
        # What a parameter is in C has the hooks: torch may swap it below the same object, which then has none.
        self._hooked = {id(params.tensors[place]): params.tensors[place]._cdata for place in trained}

    @property
    def active(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    def remove(self) -> None:
        """Take the hooks away: from now on ``clip()`` is allowed again. Local, and idempotent."""
        while self._handles:
            self._handles.pop().remove()

    def state_dict(self) -> dict[str, Any]:
        """The coefficient for the next backward: a number, or one by name of each tensor of this rank; {} if none."""
        coefficient = self._carried.coefficient
        if coefficient is None:
            return {}
        values: Any = coefficient.tolist()
        if coefficient.ndim:
            values = {name: values[slot] for name, slot in zip(self._plan.tensors, self._slots, strict=True)}
        return {"coefficient": values, "threshold": self._carried.threshold.item()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next backward be clipped as that which would have followed ``state_dict``."""
        if not state:
            return
        threshold = torch.full_like(self._carried.threshold, state["threshold"])
        values = state["coefficient"]
        if isinstance(values, dict):
            coefficient = threshold.new_ones(self._plan.slot_count)
            for name, slot in zip(self._plan.tensors, self._slots, strict=True):
                coefficient[slot] = values.get(name, 1.0)
        else:
            coefficient = torch.full_like(threshold, values)
        self._carried = Decision(coefficient, threshold)

    @torch.no_grad()
    def _clip(self, place: int, param: Tensor) -> None:
        """What the hook of the parameter at ``place`` does with its gradient."""
        if self._backward != backward.task():
            self._begin()
        if param.grad is None:
            return
        plan, slot, tensor = self._tensors[place]
        _refuse_clipped(plan.names[0], param.grad)
        if is_dtensor(param) and is_dtensor(param.grad) and kinds(param.grad) != kinds(param):
            param.grad = reduced(param, kinds(param.grad))
        grads = local_grads(plan, [param])
        limits = self._rule.limits(plan.tensors, self._step())
        if limits is not None:
            check_limits(plan, grads, limits)
        device = next(iter(grads), plan.device)
        local = local_sums(plan, grads, self._wanted, device if plan.wire is None else plan.wire)
        self._add(tensor, local)
        if limits is not None:
            apply(plan, grads, Effect(limits=limits))
        elif self._previous:
            scale_(grads, _of_slot(self._carried.coefficient, slot))
        else:
            norms = combined(plan, local, self._wanted, device, self._how)
            scale_(grads, self._rule.decide(replace(norms, step=self._step())).coefficient)
        setattr(param.grad, _CLIPPED, version_of(param.grad))

    def _begin(self) -> None:
        """At the first hook of a backward: is the plan still right? Then have ``_end`` called when it is over."""
        clipper, params = self._clipper(), self._params()
        if clipper is not None and clipper.rule is not self._rule:
            raise RuntimeError(f"clipper.rule was exchanged after clip_in_backward(). {_AGAIN}")
        if params is not None:
            self._refuse_unhooked(params, params)
            if not self._plan.holds_for(params.tensors):
                raise RuntimeError(f"parameters were converted or declared after clip_in_backward(). {_AGAIN}")
        self._backward = backward.task()
        # A backward that raised has left something behind.
        self._sums = self._nothing()
        # FSDP reduces its last gradients in a callback that may be queued after this one: go to the end of the line.
        backward.at_the_end(lambda: backward.at_the_end(self._end))

    def _refuse_unhooked(self, now: ModuleParameters, before: ModuleParameters) -> None:
        for name, param in now.named.items():
            # FSDP2 puts unsharded parameters in the modules for a while.
            unsharded = not is_dtensor(param) and is_dtensor(before.named.get(name, param))
            hooked = self._hooked.get(id(param)) == param._cdata
            if param.requires_grad and not hooked and not unsharded:
                raise RuntimeError(
                    f"the gradient of {name} was not clipped: it was replaced, or became trainable, after "
                    f"clip_in_backward(). {_AGAIN}"
                )

    def _step(self) -> int:
        clipper = self._clipper()
        return 0 if clipper is None else clipper.steps

    def _nothing(self) -> LocalSums:
        zeros = partial(torch.zeros, dtype=torch.float64, device=self._wire)
        extremes = torch.full_like(zeros(2), -math.inf) if self._rule.limits_elements else None
        return LocalSums(zeros(len(self._plan.tensors)), zeros(3), extremes)

    def _add(self, tensor: int, local: LocalSums) -> None:
        """Keep what one tensor adds to the statistics of this backward."""
        self._sums.powers[tensor] = local.powers[0]
        self._sums.range_flags.add_(local.range_flags.to(self._wire))
        if self._sums.extremes is not None and local.extremes is not None:
            torch.maximum(self._sums.extremes, local.extremes.to(self._wire), out=self._sums.extremes)

    @torch.no_grad()
    def _end(self) -> None:
        """After the last gradient of a backward: one all-reduce, the report, and the coefficient for the next."""
        if torch._C._current_autograd_node() is not None:
            raise RuntimeError(
                "clip_in_backward() saw a backward() inside another one, and cannot tell which gradients belong to one "
                "step: checkpoint with use_reentrant=False."
            )
        clipper, params = self._clipper(), self._params()
        if params is not None and params.changed:
            # Looked at here only: while backward() runs, FSDP2 exchanges parameters all the time.
            self._refuse_unhooked(ModuleParameters(params.modules, may_be_empty=True), params)
        if not math.isinf(self._rule.norm_type):
            self._sums.powers.mul_(self._plan.shares.to(self._wire))
        moment = None if clipper is None else clipper._moment()
        wanted = self._wanted.detailed() if moment is not None and moment.measures_all else self._wanted
        norms = combined(self._plan, self._sums, wanted, self._plan.device, self._how)
        outcome = engine.outcome_of(self._plan, wanted, replace(norms, step=self._step()))
        finite = norms.finite
        skipped = torch.zeros_like(finite)
        self._wanted.settle(skipped)
        decision = _together(outcome)
        if clipper is not None:
            if self._previous:
                effect = replace(outcome.effect, coefficient=self._carried.coefficient)
                outcome = outcome._replace(decisions=[self._carried], effect=effect)
            report = engine.report_of(self._plan, [outcome], ~finite, skipped)
            clipper._done(report if moment is None or moment.tells_all else replace(report, per_tensor=None))
        if self._previous:
            self._carried = _where(finite, decision, self._carried)
        self._backward = -1


def check_settings(
    rule: Rule, nonfinite: engine.NonFinite, previous_norm: bool, pipeline: RankGroup | None, scaled: bool
) -> None:
    """Raise ValueError where a clip with these settings cannot be done before all gradients exist."""
    if scaled:
        raise ValueError("clip_in_backward() cannot serve a scaler: gradients are unscaled after backward(), not in it")
    if nonfinite != "propagate":
        raise ValueError(
            f"clip_in_backward() cannot honour nonfinite={nonfinite!r}: when a gradient turns out to be non-finite, "
            "other parameters have been stepped already. Use nonfinite='propagate', or clip() after backward()."
        )
    if pipeline is not None:
        raise ValueError(
            "clip_in_backward() cannot serve pipeline_group: stages end their backward() one after the other, and "
            "would wait for each other. Use clip() after the schedule's step."
        )
    mixed = len(rule.stages) > 1 and any(stage.limits_elements for stage in rule.stages)
    if mixed or len(passes_of(rule)) > 1 or any(_needs_all(stage) for stage in rule.stages):
        raise ValueError(
            f"clip_in_backward() cannot serve {rule!r}, which skips steps, looks at rows or measures more than once. "
            "Use clip() after backward()."
        )
    if rule.limits_elements and previous_norm:
        raise ValueError(f"previous_norm=True means nothing to {rule!r}, which limits each element: leave it out")
    if not rule.limits_elements and not rule.separable and not previous_norm:
        raise ValueError(
            f"{rule!r} needs the norm over all gradients, which nobody knows before backward() ends. Either use a rule "
            "that looks at one tensor at a time (ClipByNorm, ClipByValue), or clip_in_backward(previous_norm=True), "
            "which scales each step's gradients by what the norm of the step before gives."
        )


_WHY_NOT = {
    "DDP": "DistributedDataParallel averages gradients after these hooks have run",
    "FSDP1": "FullyShardedDataParallel never calls hooks of single parameters, and reduces gradients after its own",
    "replicate": "replicate() averages gradients after these hooks have run",
    "fully_shard": "it is kept out of fully_shard (ignored_params), so that nobody averages its gradient before",
}


def _check_layouts(plan: Plan, params: ModuleParameters) -> None:
    """Raise where a gradient is not reduced over the ranks when its hook runs. The same on all ranks."""
    outside = _outside_of_composable(params.modules)
    for name, layout, param in zip(plan.names, plan.layouts, params.tensors, strict=True):
        system = outside.get(id(param), layout.system)
        if param.requires_grad and system not in ("plain", "DTensor"):
            why = _WHY_NOT.get(system, f"{system} reduces gradients after these hooks have run")
            raise RuntimeError(
                f"clip_in_backward() cannot clip {name}: {why}. Use fully_shard (its HSDP mesh replicates too), or "
                "clip() after backward()."
            )
    if plan.settled or plan.riding or not all(layout.as_parameter for layout in plan.layouts):
        raise RuntimeError("there are gradients of an earlier backward(): call zero_grad() before clip_in_backward()")


def _outside_of_composable(modules: list[nn.Module]) -> dict[int, str]:
    """Plain parameters in modules of ``fully_shard`` or ``replicate``, by id: what these reduce later, or never."""
    if not torch.distributed.is_available():
        return {}
    from torch.distributed._composable.contract import _get_registry

    found: dict[int, str] = {}
    for module in (module for root in modules for module in root.modules()):
        for system in {"fully_shard", "replicate"} & (_get_registry(module) or {}).keys():
            found |= {id(param): system for param in module.parameters() if not is_dtensor(param)}
    return found


def _one_by_one(plan: Plan, params: list[Tensor], communicate: bool) -> Iterator[tuple[int, tuple[Plan, int, int]]]:
    """For each parameter's place, a plan for it alone, its slot, and its place among the tensors.

    Collective where gradients are cut and their rule wants the norm of the whole: over the ranks that hold the pieces.
    """
    known: dict[tuple[RankGroup, ...], Participants] = {(): Participants()}
    tensor = 0
    for place, (param, layout) in enumerate(zip(params, plan.layouts, strict=True)):
        groups = layout.sharded if communicate and param.requires_grad else ()
        if groups not in known:
            known[groups] = connect(groups)
        group = known[groups].group
        if layout.pieces:
            single = replace(
                plan,
                names=(plan.names[place],),
                layouts=(layout,),
                tensors=(plan.tensors[tensor],),
                numels=(plan.numels[tensor],),
                slots=torch.zeros(1, dtype=torch.int64),
                slot_count=1,
                shares=torch.ones(1, dtype=torch.float64),
                described=None if plan.described is None else plan.described.part((int(plan.slots[tensor]),)).tensors,
                participants=known[groups],
                guards=frozenset(),
                device=param.device,
                wire=None if group is None else comm_device(group, accelerated=param.device.type != "cpu"),
                wide=param.dtype in WIDE,
            )
            yield place, (single, int(plan.slots[tensor]), tensor)
        tensor += len(layout.pieces)


def check_carried(state: object) -> None:
    """Raise where this is not what ``InBackward.state_dict`` returns.

    Raises:
        ValueError: it names what is wrong.
    """
    if isinstance(state, dict) and not state:
        return
    if not isinstance(state, dict) or state.keys() != {"coefficient", "threshold"}:
        raise ValueError(f"state_dict['in_backward'] must hold coefficient and threshold, got {shown(state)}")
    values = state["coefficient"]
    numbers = [*values.values()] if isinstance(values, dict) else [values]
    for name, each in [*(("coefficient", number) for number in numbers), ("threshold", state["threshold"])]:
        if not isinstance(each, int | float) or isinstance(each, bool) or not each >= 0:
            raise ValueError(f"state_dict['in_backward'][{name!r}] must hold numbers of at least 0, got {shown(each)}")


def _refuse_clipped(name: str, grad: Tensor) -> None:
    if getattr(grad, _CLIPPED, None) == version_of(grad) - 1:
        raise RuntimeError(
            f"the gradient of {name} was clipped in an earlier backward() and another was added to it, which would be "
            "clipped twice. Free it in the optimizer's hook (param.grad = None); to accumulate, call backward() once "
            "on the sum of the losses, or set_requires_gradient_sync(False) under fully_shard."
        )


def _hook_first(param: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Register ``hook`` before all that were registered already."""
    handle: RemovableHandle = param.register_post_accumulate_grad_hook(hook)
    hooks: dict[int, Any] = param._post_accumulate_grad_hooks
    # Not move_to_end: autograd reads the order of insertion, FSDP2 the one that move_to_end changes.
    for key in [key for key in hooks if key != handle.id]:
        hooks[key] = hooks.pop(key)
    return handle


def _of_slot(coefficient: Tensor | None, slot: int) -> Tensor | None:
    return coefficient if coefficient is None or coefficient.ndim == 0 else coefficient[slot]


def _needs_all(rule: Rule) -> bool:
    """Whether it asks for what hooks of single tensors cannot give."""
    return rule.may_skip or rule.needs_units or rule.needs_means or rule.needs_extremes or rule.needs_loss


def _together(outcome: engine.Outcome) -> Decision:
    """The decisions of a pass as one."""
    return replace(outcome.decisions[-1], coefficient=outcome.effect.coefficient)


def _where(finite: Tensor, new: Decision, old: Decision) -> Decision:
    """``new``, but ``old`` where the norm was not finite: an inf or NaN must not scale the gradients that follow."""
    if new.coefficient is None:
        return new
    before = torch.ones_like(new.coefficient) if old.coefficient is None else old.coefficient
    return Decision(torch.where(finite, new.coefficient, before), torch.where(finite, new.threshold, old.threshold))
