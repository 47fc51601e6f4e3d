"""GradClipper: one model, one rule, one call per step."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from distclip import engine
from distclip.audit.clips import WHEN, ClipCheck, When
from distclip.layout import learn
from distclip.layout.declared import Group, as_rank_group, carry_over
from distclip.layout.memory import Mark
from distclip.parameters import ModuleParameters, as_modules
from distclip.plan import Plan, make_plan
from distclip.reduction import StalePlan
from distclip.report import ClipReport
from distclip.rules.base import Rule
from distclip.rules.norm import ClipByGlobalNorm
from distclip.warning import warn

# Gradients compared to notice a second clip() of the same step.
_WITNESSES = 8
# What is left on them: who clipped, and their version then. (Weak references would keep Module.to() from swapping
# them.)
_CLIPPED = "_distclip_clipped"


class GradClipper:
    """Clips the gradients of one model by one rule, and keeps the plan and the rule's state.

    Call ``clip()`` on every rank between ``backward()`` and ``optimizer.step()``. The first call, and any after the
    model's parameters were replaced, agrees on who takes part; each costs one all-reduce at most, none where nothing
    is sharded (one process, DDP).

    Args:
        model: the module that is trained, wrapped (DDP, FSDP) as it is trained; or a list of modules.
        rule: a number, the largest global L2 norm, or a rule such as ``ClipByNorm(0.1)``.
        nonfinite: what to do where any gradient of any rank holds an inf or NaN. "propagate": clip on, as torch does,
            so that NaN and 0 reach the parameters; "raise": RuntimeError on every rank, no gradient changed; "skip":
            drop the gradients (``.grad = None``) on every rank, so that ``optimizer.step()`` changes neither
            parameters nor its state. The last two wait for the norm if it is on an accelerator.
        pipeline_group: the ranks that hold the stages of a pipeline, this one among them: a ProcessGroup or a 1-D
            DeviceMesh. Every tensor counts apart on each of them, unless ``declare(..., replicated=)`` ties it.
        check: when to compare the ranks' gradients with what distclip takes them for, over the groups that layouts and
            arguments name (DDP's too), and warn (``AuditWarning``) on every rank where they differ: at the "first"
            clip, "always", "never". It reads the gradients once more, and costs two or three small all-reduces (and
            waits for the device). The same on every rank. ``distclip.audit`` finds more.

    Raises:
        TypeError: ``model`` or ``rule`` is of another type.
        ValueError: ``rule`` is a negative number or NaN, ``nonfinite`` or ``check`` is unknown.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> clipper = GradClipper(model, rule=1.0)
        >>> model(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> clipper.clip().to_dict()["total_norm"]
        5.0
    """

    def __init__(
        self,
        model: nn.Module | Iterable[nn.Module],
        rule: float | Rule = 1.0,
        *,
        nonfinite: engine.NonFinite = "propagate",
        pipeline_group: Group | None = None,
        check: When = "first",
    ) -> None:
        self.rule = _as_rule(rule)
        if nonfinite not in engine.NONFINITE:
            raise ValueError(f"nonfinite must be one of {', '.join(engine.NONFINITE)}, got {nonfinite!r}")
        if check not in WHEN:
            raise ValueError(f"check must be one of {', '.join(WHEN)}, got {check!r}")
        self.nonfinite: engine.NonFinite = nonfinite
        self.report: ClipReport | None = None
        """What the last ``clip()`` did."""
        self.steps = 0
        """Number of clips so far."""
        self._pipeline = as_rank_group("pipeline_group", pipeline_group)
        self._params = ModuleParameters(as_modules(model), may_be_empty=pipeline_group is not None)
        self._plan: Plan | None = None
        self._settings = ""
        self._mark = Mark()
        self._check = ClipCheck(check)

    @torch.no_grad()
    def clip(self) -> ClipReport:
        """Clip this step's gradients in place. Collective, on all ranks that share the model.

        Returns:
            The report, the same on every rank; also kept as ``clipper.report``.

        Raises:
            RuntimeError: a non-finite norm with ``nonfinite="raise"``; gradients that FSDP has not reduced yet; ranks
                that disagree.
            Failure: another rank raised, and says why.
            TypeError: a gradient that the rule cannot be defined for (complex or sparse under ClipByValue).
            OverflowError: ``|g|**p`` leaves float64.
        """
        plan = self._current_plan()
        self._warn_if_out_of_turn()
        params = self._params.tensors
        try:
            self.report = self._clip_by(plan, params)
        except StalePlan:
            # Another rank's parameters changed. It is making its plan anew, and waits for all.
            self._plan = None
            self.report = self._clip_by(self._current_plan(), params)
        self.steps += 1
        for grad in self._witnesses():
            setattr(grad, _CLIPPED, (self._mark, _version(grad)))
        return self.report

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: the rule's state and the number of steps. No side effects, the same on every rank."""
        return {"rule": type(self.rule).__name__, "rule_state": self.rule.state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from what ``state_dict`` returned.

        Raises:
            ValueError: the state is of another rule, or not of a GradClipper.
        """
        missing = {"rule", "rule_state", "steps"} - state_dict.keys()
        if missing:
            raise ValueError(f"state_dict is not of a GradClipper: it has no {', '.join(sorted(missing))}")
        if state_dict["rule"] != type(self.rule).__name__:
            raise ValueError(f"state_dict is of rule {state_dict['rule']}, this clipper has {type(self.rule).__name__}")
        self.rule.load_state_dict(state_dict["rule_state"])
        self.steps = state_dict["steps"]

    def _clip_by(self, plan: Plan, params: list[Tensor]) -> ClipReport:
        with self._check.around(plan, params, self._pipeline):
            return engine.clip(plan, params, self.rule, self.nonfinite)

    def _current_plan(self) -> Plan:
        settings = engine.settings_of(self.rule)
        how = engine.how_of(self.nonfinite)
        changed = self._params.changed
        if self._plan is not None and (
            changed
            or self._settings != settings
            or not self._plan.holds_for(self._params.tensors)
            or self._check.outdated(self._plan, self._params.tensors)
        ):
            engine.tell(self._plan, self.rule, how, StalePlan)
            self._plan = None
        if changed:
            before = self._params.named
            self._params = ModuleParameters(self._params.modules, may_be_empty=True)
            for name in before.keys() & self._params.named.keys():
                carry_over(before[name], self._params.named[name])
        if self._plan is None:
            for module in self._params.modules:
                learn(module)
            self._settings = settings
            self._plan = make_plan(
                list(self._params.named),
                self._params.tensors,
                settings=f"{self.rule.signature}, {settings}{how}, {self._check.signature}",
                pipeline=self._pipeline,
                linear=self.rule.bounds is None,
            )
        return self._plan

    def _witnesses(self) -> list[Tensor]:
        """The gradients that tell whether a clip is the second of its step."""
        grads = (param.grad for param in self._params.tensors if param.grad is not None)
        return list(islice(grads, _WITNESSES))

    def _warn_if_out_of_turn(self) -> None:
        grads = self._witnesses()
        if grads and all(getattr(grad, _CLIPPED, None) == (self._mark, _version(grad)) for grad in grads):
            warn(
                "clip() ran twice on the same gradients: call it once per step, after the last backward() and before "
                "optimizer.step().",
            )
        # The first gradient found ends the search.
        missing = (param.grad is None for param in self._params.tensors if param.requires_grad and param.numel())
        if next(missing, False) and all(missing):
            warn("clip() found no gradient on this rank: call it after backward() and before zero_grad().")


def _version(grad: Tensor) -> int:
    # Writing to a DTensor's local tensor does not show in the DTensor's own version.
    local = getattr(grad, "_local_tensor", grad)
    return -1 if local.is_inference() else int(local._version)


def _as_rule(rule: object) -> Rule:
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, bool) or not isinstance(rule, Real):
        raise TypeError(f"rule must be a number (the largest global L2 norm) or a Rule, got {rule!r}")
    return ClipByGlobalNorm(float(rule))
