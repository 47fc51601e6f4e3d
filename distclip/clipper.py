"""GradClipper: one model, one rule, one call per step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from distclip import engine
from distclip.apply import apply
from distclip.attach import Attachment
from distclip.audit.clips import WHEN, ClipCheck, When
from distclip.compiled import eager
from distclip.gradients import found, version_of
from distclip.hints import checked_flag, shown
from distclip.in_backward import InBackward, check_carried, check_settings
from distclip.layout import learn
from distclip.layout.declared import Group, as_rank_group, carry_over
from distclip.layout.memory import Mark
from distclip.layout.zero import is_engine
from distclip.optimizers import as_optimizers, check_fused, scaler_of
from distclip.overlap import Overlap
from distclip.parameters import ModuleParameters, as_modules
from distclip.plan import Plan, make_plan
from distclip.reduction import Failure, StalePlan
from distclip.report import ClipReport
from distclip.rules.base import Rule
from distclip.rules.compose import as_rule
from distclip.rules.stages import passes_of
from distclip.rules.state import check_is_dict, whole_or_not
from distclip.rules.thresholds import as_number, checked_choice, checked_every
from distclip.step import Stepping
from distclip.warning import warn

ReportHook = Callable[["GradClipper", ClipReport, Tensor | None], None]
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
        rule: a number, the largest global L2 norm; a rule such as ``ClipByNorm(0.1)``; a list of these (``Chain``) or
            a dict by parameter names (``PerGroup``).
        optimizer: the one that steps these parameters, or several. With a fused one (``fused=True``) the gradients are
            not written: its step scales them, and leaves itself out where ``nonfinite="skip"`` says so, without a wait
            for the device. (torch's fused kernels write the scaled gradients back to ``.grad``.) Steps with a closure,
            rules with a coefficient for each tensor, and other optimizers are served in place.
        scaler: a ``torch.amp.GradScaler``, FSDP1's ``ShardedGradScaler`` or a ``distclip.amp.GradScaler``. ``clip()``
            unscales if nobody has, and tells it of an overflow on any rank, so that all ranks skip the step and shrink
            the scale alike. Needs ``optimizer``; that of an optimizer which Accelerate prepared is known.
        nonfinite: what to do where any gradient of any rank holds an inf or NaN. "propagate": clip on, as torch does,
            so that NaN and 0 reach the parameters; "raise": RuntimeError on every rank, no gradient changed (not with
            a dynamic loss scale, which overflows now and then as a matter of course); "skip": drop the gradients
            (``.grad = None``) on every rank, so that ``optimizer.step()`` changes neither parameters nor its state. The
            last two wait for the norm if it is on an accelerator.
        pipeline_group: the ranks that hold the stages of a pipeline, this one among them: a ProcessGroup or a 1-D
            DeviceMesh. Every tensor counts apart on each of them, unless ``declare(..., replicated=)`` ties it.
        check: when to compare the ranks' gradients with what distclip takes them for, over the groups that layouts and
            arguments name (DDP's too), and warn (``AuditWarning``) on every rank where they differ: at the "first"
            clip, "always", "never". It reads the gradients once more, and costs two or three small all-reduces (and
            waits for the device). The same on every rank. ``distclip.audit`` finds more.
        details_every: in every so many clips, the first among them, ``report.per_tensor`` holds the norm of each tensor
            of all ranks, whatever the rule needs. They ride in the all-reduce of every clip (8 bytes a tensor), without
            another read. 0 for none.
        overlap: measure gradients while ``backward()`` still runs, so that ``clip()`` has the all-reduce left alone.
            The clip's numbers are the same, and so are its collectives. Ranks may differ in it if they reduce the norm;
            where nothing is sharded (DDP) it must be the same on all, or they would round their norms in two ways:
            an error at the first clip, by ``check``. See below.

    ``overlap=True`` moves the read of the gradients into ``backward()`` and does not save it: it can pay where a device
    has room beside ``backward()`` (while it waits for others, say). A CPU has none: there ``clip()`` is shorter, and
    whole steps take a few percent longer. From the second clip on:

    - Served are FSDP2 (after its reduce-scatter), DTensors on all ranks of the job, DDP (each bucket when it is
      averaged), and any model in a job of one rank. All others are measured at ``clip()``, as are gradients that were
      set or edited after ``backward()``, and what a rule wants besides norms (extremes, rows).
    - DDP gets a communication hook, which averages as it does by itself, and which it keeps. Register one of your own
      before the first ``clip()``: gradients are then measured at ``clip()``, as under ``find_unused_parameters``,
      ``static_graph`` and mixed precision. Within ``join()`` it divides by the number of all ranks.
    - Writes that torch does not count (``GradScaler.unscale_``, collectives of torch.distributed, ``.data``,
      ``torch._foreach_*`` on DTensors) are found by comparing: of the clips that are served, the 1st, 2nd, 4th ...
      256th and then every 256th read the gradients once more, and wait for the device. Where they differ, it warns and
      goes on without overlap. Such writes that begin later are not seen before the next of these.

    Raises:
        TypeError: ``model`` or ``rule`` is of another type.
        ValueError: ``rule`` is a negative number or NaN, ``nonfinite`` or ``check`` is unknown, ``details_every`` is
            negative, ``overlap`` with a DeepSpeed engine.

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
        rule: float | Rule | Sequence[Any] | Mapping[Any, Any] = 1.0,
        *,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        nonfinite: engine.NonFinite = "propagate",
        pipeline_group: Group | None = None,
        check: When = "first",
        details_every: int = 0,
        overlap: bool = False,
    ) -> None:
        self.rule = as_rule(rule)
        checked_choice("nonfinite", nonfinite, engine.NONFINITE)
        checked_choice("check", check, WHEN)
        overlap = checked_flag("overlap", overlap)
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"scaler must be a torch.amp.GradScaler, got {shown(scaler)}")
        self.nonfinite: engine.NonFinite = nonfinite
        self.report: ClipReport | None = None
        """What the last ``clip()`` did."""
        self.steps = 0
        """Number of clips so far."""
        self.details_every = checked_every("details_every", details_every, 0)
        """In every so many clips the report holds the norm of each tensor; 0 for none. The same on every rank."""
        self._nonfinite_steps: Tensor | int = 0
        self._report_hooks: OrderedDict[int, ReportHook] = OrderedDict()
        if overlap and is_engine(model):
            raise ValueError(
                "overlap=True cannot serve a DeepSpeed engine, which reduces gradients itself: leave it out"
            )
        self._overlap = Overlap() if overlap else None
        if is_engine(model):
            from distclip.integrations.deepspeed_pipeline import stages_of

            pipeline_group = stages_of(model, pipeline_group)
        self._pipeline = as_rank_group("pipeline_group", pipeline_group)
        self._params = ModuleParameters(as_modules(model), may_be_empty=pipeline_group is not None)
        self._plan: Plan | None = None
        self._settings = ""
        self._mark = Mark()
        self._hooks = None
        self._in_backward: InBackward | None = None
        # What load_state_dict brought for it before it was there.
        self._resumed: dict[str, Any] = {}
        self._check = ClipCheck(check)
        self._stepping = Stepping(as_optimizers(optimizer), scaler_of(optimizer) if scaler is None else scaler)
        check_fused(self._stepping.optimizers)
        self._attachment: Attachment | None = None
        self._detached = self._stepping
        if is_engine(model):
            from distclip.integrations.deepspeed import EngineHooks

            self._hooks = EngineHooks(model, self)

    def __getstate__(self) -> dict[str, Any]:
        # The plan names process groups and wrappers of here; hooks belong to this clipper's parameters and watchers.
        state = vars(self) | {
            "_plan": None,
            "_report_hooks": OrderedDict(),
            "_check": self._check.anew(),
            "_in_backward": None,
            "_resumed": self._resumed if self._in_backward is None else self._in_backward.state_dict(),
            "_attachment": None,
            "_stepping": self._detached,
        }
        return {"attached": None if self._attachment is None else self._attachment.optimizer, "state": state}

    def __setstate__(self, found: dict[str, Any]) -> None:
        vars(self).update(found["state"])
        # copy.copy leaves the optimizer to the original, which is in its step already.
        if found["attached"] is not None and getattr(found["attached"], "_distclip_attachment", None) is None:
            # torch copies an optimizer without what was put on it, and steps would no longer be clipped.
            self.attach(found["attached"])

    def attach(self, optimizer: Optimizer) -> GradClipper:
        """From now on clip inside every ``optimizer.step()``, after its closure if it has one. Local.

        A step of the optimizer, or of a GradScaler with it, needs no ``clip()`` before it any more; lr schedulers and
        Accelerate's wrapped optimizers work as before. With a GradScaler only if it was given as ``scaler=``, or is a
        ``distclip.amp.GradScaler``.

        Returns:
            The clipper itself.

        Raises:
            RuntimeError: the optimizer has a clipper attached already.
            ValueError: fused SGD or Adagrad on DTensors, LBFGS; in ``step()``: a GradScaler that the clipper does not
                know, which would step on some ranks only.
        """
        (inner,) = as_optimizers(optimizer)
        if self._attachment is not None:
            raise RuntimeError("this clipper is attached already: call detach() first")
        check_fused([inner])
        before = self._stepping
        stepping = Stepping(before.optimizers or (inner,), before.scaler or scaler_of(optimizer))
        self._attachment = Attachment(self, inner, stepping.scaler)
        self._stepping, self._detached = stepping, before
        return self

    def detach(self) -> None:
        """Undo ``attach``; give a DeepSpeed engine its own clipping back. Nothing happens where there is neither."""
        for held in (self._hooks, self._attachment):
            if held is not None:
                held.remove()
        if self._attachment is not None:
            self._stepping = self._detached
        self._hooks = self._attachment = None

    @eager
    def clip(self, loss: Tensor | float | None = None) -> ClipReport:
        """Clip this step's gradients in place. Collective, on all ranks that share the model.

        Args:
            loss: this step's, for rules that look at it (``SkipOnSpike``): a scalar, averaged over the ranks that pass
                one (of a pipeline, its last stage). Replicas pass it all or none; under DDP it costs a collective.

        Returns:
            The report, the same on every rank; also kept as ``clipper.report``.

        Raises:
            RuntimeError: a non-finite norm with ``nonfinite="raise"``; gradients that FSDP has not reduced yet; ranks
                that disagree; on the CPU, the clip before raised on other ranks alone (by an error in
                ``Rule.decide``). From torch.distributed, with a note: a rank was lost; no gradient was changed here,
                but for those of a rule that takes several all-reduces.
            Failure: another rank raised, and says why.
            TypeError: a gradient that the rule cannot be defined for (complex or sparse under ClipByValue).
            OverflowError: ``|g|**p`` leaves float64.
            ValueError: ``loss`` is no scalar.
            TypeError: ``loss`` is no number.
        """
        if self._hooks is not None:
            raise RuntimeError("engine.step() clips by itself: do not call clip(), read clipper.report after the step")
        if self._in_backward is not None and self._in_backward.active:
            raise RuntimeError(
                "clip_in_backward() is active: gradients are clipped while backward() runs. Leave clip() out, or call "
                "remove() on what clip_in_backward() returned."
            )
        return self._clip_under(self._stepping.scaler, _as_scalar(loss))

    @torch.no_grad()
    def _clip_under(self, scaler: torch.amp.GradScaler | None, loss: Tensor | None = None) -> ClipReport:
        """``clip()`` with this scaler."""
        plan = self._current_plan()
        try:
            self._warn_if_out_of_turn()
        except Warning:
            # Warnings are errors here: one that this rank alone has is told before the others wait for it.
            engine.tell(plan, self.rule, self._moment(), Failure)
            raise
        try:
            report = self._clip_by(plan, scaler, loss)
        except StalePlan:
            # Another rank's parameters changed. It is making its plan anew, and waits for all.
            self._plan = None
            report = self._clip_by(self._current_plan(), scaler, loss)
        for grad in self._witnesses():
            setattr(grad, _CLIPPED, (self._mark, version_of(grad)))
        return self._done(report, loss)

    def register_report_hook(self, hook: ReportHook) -> RemovableHandle:
        """Have ``hook(clipper, report, loss)`` called after every clip, wherever it happens: in ``clip()``, in an
        attached optimizer, in an engine's step or in backward.

        The report's fields are 0-d tensors, so a hook that only keeps it costs nothing. ``loss`` is what was passed to
        ``clip(loss=...)``, of this rank, or None.

        Returns:
            A handle whose ``remove()`` ends it.
        """
        handle = RemovableHandle(self._report_hooks)
        self._report_hooks[handle.id] = hook
        return handle

    def _done(self, report: ClipReport, loss: Tensor | None = None) -> ClipReport:
        """One more clip is over."""
        found = report.nonfinite.to(torch.int64)
        before = self._nonfinite_steps
        self._nonfinite_steps = found + (before.to(found.device) if isinstance(before, Tensor) else before)
        self.report = replace(report, nonfinite_steps=self._nonfinite_steps)
        self.steps += 1
        for hook in list(self._report_hooks.values()):
            hook(self, self.report, loss)
        return self.report

    def clip_in_backward(self, *, previous_norm: bool = False) -> InBackward:
        """From now on clip each gradient as soon as ``backward()`` has made it, instead of by ``clip()``.

        For optimizers that step in ``register_post_accumulate_grad_hook`` and free the gradient. The clip comes before
        every such hook, whenever that was registered. Collective, as the first ``clip()``; call it between two steps,
        on the wrapped model (a part of a DDP model looks like any module, and would be clipped before it is averaged).
        Afterwards each ``backward()`` is a step: at its end one all-reduce (none where nothing is sharded) makes
        ``clipper.report``, of the norm before clipping; every participating rank must have at least one gradient.

        What is clipped by:

        - Rules that limit elements (ClipByValue) and rules of single tensors (``Rule.separable``: ClipByNorm) act at
          once, as ``clip()`` would. The norm of a tensor that is cut costs one all-reduce in its hook, so hooks must
          run in the same order on all ranks that hold it. They do where these run the same model: autograd's order
          follows from the forward, and FSDP2 reduces gradients in that order.
        - All others need ``previous_norm=True``: gradients are scaled by what the rule made of the norms of the
          backward before. The first is not clipped. Norms that were not finite are passed over: the coefficient before
          them stays. ``report.coefficient`` and ``threshold`` are those applied, ``total_norm`` is this backward's.

        Works in one process and with DTensors (FSDP2, HSDP, ``replicate`` in its DTensor form, tensor parallel). Plain
        gradients are taken to be whole: whoever averages them by hand does so in ``param.register_hook``, which runs
        before. Not with a GradScaler, which unscales later (ValueError).

        Args:
            previous_norm: clip by the norm of the previous backward.

        Returns:
            A handle whose ``remove()`` ends it.

        Raises:
            ValueError: the rule needs the norm of all gradients and ``previous_norm`` is False (or it limits elements
                and that is True); ``nonfinite`` is not "propagate"; there is a ``pipeline_group``; ``overlap=True``.
            RuntimeError: DDP, FSDP1, or parameters that ``fully_shard`` ignores: their gradients are not reduced yet
                when hooks run; it is active already; there are gradients; ranks disagree. In ``backward()``: a gradient
                that was clipped before and not freed; parameters replaced, converted or unfrozen since (seen while the
                clipper lives); reentrant checkpointing.
        """
        if self._in_backward is not None and self._in_backward.active:
            raise RuntimeError("clip_in_backward() is active already: call remove() on what it returned first")
        if self._overlap is not None:
            raise ValueError("clip_in_backward() leaves clip() nothing to do: make the clipper without overlap=True")
        previous_norm = checked_flag("previous_norm", previous_norm)
        check_settings(self.rule, self.nonfinite, previous_norm, self._pipeline, self._stepping.scaler is not None)
        plan = self._current_plan()
        self._in_backward = InBackward(self, plan, self._params, previous_norm)
        self._in_backward.load_state_dict(self._resumed)
        self._resumed = {}
        return self._in_backward

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: the rule's state and the number of steps. No side effects, the same on every rank."""
        state: dict[str, Any] = {
            "rule": type(self.rule).__name__,
            "rule_state": self.rule.state_dict(),
            "steps": self.steps,
            "nonfinite_steps": int(self._nonfinite_steps),
        }
        carried = self._in_backward.state_dict() if self._in_backward is not None else {}
        return state | ({"in_backward": carried} if carried else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from what ``state_dict`` returned. Where that raises, the clipper stays as it was.

        Raises:
            ValueError: the state is of another rule, not of a GradClipper, or damaged; names the key.
            TypeError: it is no dict.
        """
        check_is_dict("state_dict", state_dict)
        missing = {"rule", "rule_state", "steps"} - state_dict.keys()
        if missing:
            raise ValueError(f"state_dict is not of a GradClipper: it has no {', '.join(sorted(missing))}")
        unknown = state_dict.keys() - {"rule", "rule_state", "steps", "nonfinite_steps", "in_backward"}
        if unknown:
            raise ValueError(
                f"state_dict holds {shown(sorted(unknown, key=str))}, which this version of distclip does not know"
            )
        kind, own = state_dict["rule"], type(self.rule).__name__
        if not isinstance(kind, str) or kind != own:
            raise ValueError(
                f"state_dict is of rule {kind if isinstance(kind, str) else shown(kind)}, this clipper has {own}"
            )
        steps = checked_every("state_dict['steps']", state_dict["steps"], 0)
        nonfinite_steps = checked_every("state_dict['nonfinite_steps']", state_dict.get("nonfinite_steps", 0), 0)
        carried = state_dict.get("in_backward", {})
        check_carried(carried)
        with whole_or_not([self.rule]):  # one of somebody's own may take a part before it raises
            self.rule.load_state_dict(state_dict["rule_state"])
        self.steps, self._nonfinite_steps = steps, nonfinite_steps
        if self._in_backward is not None and self._in_backward.active:
            self._in_backward.load_state_dict(carried)
        else:
            self._resumed = carried

    def _clip_by(self, plan: Plan, scaler: torch.amp.GradScaler | None, loss: Tensor | None) -> ClipReport:
        params, step = self._params.tensors, self._stepping
        with self._check.around(plan, params, self._pipeline):
            moment = self._moment(self._grad_scale(plan, scaler), loss)
            grads = engine.own_gradients(plan, self.rule, moment)
            verdict = engine.judge(plan, grads, self.rule, moment)
        may_skip = self.nonfinite == "skip" or any(stage.may_skip for stage in self.rule.stages)
        applied = step.apply(plan, params, grads, verdict, scaler, moment.grad_scale, may_skip)
        report = replace(verdict.report, applied=applied)
        return replace(report, skipped=report.skipped | report.nonfinite) if step.scales(scaler) else report

    def _moment(self, grad_scale: Tensor | None = None, loss: Tensor | None = None) -> engine.Moment:
        # Measured in every clip, and told in some: steps that differ between ranks must not make buffers differ.
        every = self.details_every
        told = every == 0 or self.steps % every == 0 or any(each.needs_per_tensor for each in passes_of(self.rule))
        return engine.Moment(self._params.tensors, self.nonfinite, grad_scale, self.steps, loss, every > 0, told)

    def _grad_scale(self, plan: Plan, scaler: torch.amp.GradScaler | None) -> Tensor | None:
        """See ``Stepping.grad_scale``; where that raises, the others learn of it before."""
        try:
            grads = self._witnesses()
            if grads and not self._clipped(grads) and self._stepping.unscaled_before():
                raise RuntimeError(
                    "clip() ran in the middle of an accumulation: the gradients of the backward() since are multiplied "
                    "by the loss scale, those from before are not any more. Clip once, after the last backward(), and "
                    "call scaler.update() after scaler.step()."
                )
            return self._stepping.grad_scale(self._params.tensors, scaler)
        except Exception:
            engine.tell(plan, self.rule, self._moment(), Failure)
            raise

    def _current_plan(self) -> Plan:
        settings = engine.settings_of(self.rule)
        if self.details_every:
            settings += f", details_every={self.details_every}"
        changed = self._params.changed
        if self._plan is not None and (
            changed
            or self._settings != settings
            or not self._plan.holds_for(self._params.tensors)
            or self._check.outdated(self._plan, self._params.tensors)
        ):
            engine.tell(self._plan, self.rule, self._moment(), StalePlan)
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
            passes = passes_of(self.rule)
            self._plan = make_plan(
                list(self._params.named),
                self._params.tensors,
                settings=f"{self.rule.signature}, {settings}{engine.how_of(self.nonfinite)}, {self._check.signature}",
                pipeline=self._pipeline,
                linear=all(each.linear for each in passes),
                describe=any(each.needs_tensors for each in passes) or self.details_every > 0,
                by_rows=any(each.needs_units or each.needs_means for each in passes),
            )
            self._plan.overlap = self._overlap
        if self._overlap is not None:
            self._overlap.follow(self._plan, self._params, passes_of(self.rule)[0].norm_type)
        return self._plan

    @torch.no_grad()
    def _judge(self, grad_scale: Tensor | None) -> engine.Verdict:
        """For a framework that steps by itself: what is to be done with its gradients. Collective."""
        plan = self._current_plan()
        try:
            return self._judge_by(plan, grad_scale)
        except StalePlan:
            self._plan = None
            return self._judge_by(self._current_plan(), grad_scale)

    def _judge_by(self, plan: Plan, grad_scale: Tensor | None) -> engine.Verdict:
        params = self._params.tensors
        with self._check.around(plan, params, self._pipeline):
            moment = self._moment(grad_scale)
            grads = engine.own_gradients(plan, self.rule, moment, find=found)
            return engine.judge(plan, grads, self.rule, moment)

    @torch.no_grad()
    def _carry_out(self, verdict: engine.Verdict, params: set[int] | None, grad_scale: Tensor | None) -> None:
        """Do it to the gradients of ``params`` (by id; None for all)."""
        assert self._plan is not None
        tensors = self._params.tensors
        only = None if params is None else {place for place, param in enumerate(tensors) if id(param) in params}
        apply(self._plan, found(self._plan, tensors, only=only), verdict.effect, grad_scale)

    def _stepped(self, verdict: engine.Verdict, skipped: bool) -> None:
        """The framework's step is over."""
        self._done(replace(verdict.report, skipped=torch.full_like(verdict.report.skipped, skipped)))

    def _witnesses(self) -> list[Tensor]:
        """The gradients that tell whether a clip is the second of its step."""
        grads = (param.grad for param in self._params.tensors if param.grad is not None)
        return list(islice(grads, _WITNESSES))

    def _clipped(self, grads: list[Tensor]) -> bool:
        """Whether nobody has written to them since this clipper did."""
        return all(getattr(grad, _CLIPPED, None) == (self._mark, version_of(grad)) for grad in grads)

    def _warn_if_out_of_turn(self) -> None:
        grads = self._witnesses()
        if grads and self._clipped(grads):
            warn(
                "clip() ran twice on the same gradients: call it once per step, after the last backward() and before "
                "optimizer.step().",
            )
        # The first gradient found ends the search.
        missing = (param.grad is None for param in self._params.tensors if param.requires_grad and param.numel())
        if next(missing, False) and all(missing):
            warn("clip() found no gradient on this rank: call it after backward() and before zero_grad().")


def _as_scalar(loss: Tensor | float | None) -> Tensor | None:
    if loss is None:
        return None
    scalar = loss if isinstance(loss, Tensor) else torch.tensor(as_number("loss", loss))
    if scalar.is_complex() or scalar.is_meta:
        raise TypeError(f"loss must be a real number, got a tensor of {scalar.dtype} on {scalar.device}")
    if scalar.numel() != 1:
        raise ValueError(f"loss must be a scalar, got a tensor of shape {tuple(scalar.shape)}: pass its mean")
    return scalar.detach().view(())
