"""Clipping in Accelerate's training loops: ``AcceleratedClipper`` for a script of one's own, ``install`` for one that
calls ``accelerator.clip_grad_norm_`` already.

Under DeepSpeed Accelerate steps inside ``accelerator.backward``: whoever calls it afterwards comes too late to clip. So
there a GradClipper acts inside the engine, whose rule must be known before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distclip import amp, engine
from distclip.cache import plan_for
from distclip.clipper import GradClipper
from distclip.config import Clip, ClipConfig, as_config
from distclip.functional import clip_grad_value_
from distclip.hints import optional
from distclip.integrations.deepspeed import configured_norm
from distclip.layout.zero import is_engine
from distclip.optimizers import as_optimizers, parameters_of
from distclip.parameters import Parameters, split
from distclip.report import ClipReport
from distclip.rules.base import Bounds, Rule
from distclip.rules.norm import ClipByGlobalNorm
from distclip.rules.stages import passes_of
from distclip.rules.value import ClipByValue

if TYPE_CHECKING:
    from accelerate import Accelerator

_INSTALLED = "_distclip_installed"


class AcceleratedClipper:
    """A GradClipper that follows an ``Accelerator``, the same two lines under every way to launch.

    ``clip()`` does nothing between accumulation steps, unscales with the Accelerator's scaler, and logs to its
    trackers; the rule's memory is saved and loaded by ``accelerator.save_state`` and ``load_state``. Works in one
    process, under DDP, FSDP1, FSDP2, HSDP, tensor parallelism, and with a DeepSpeed engine, inside whose step (in
    ``accelerator.backward``) it acts.

    Make it on every rank, after ``accelerator.prepare`` and before ``accelerator.load_state``. The Accelerator keeps it
    (and so the model) for ``save_state``: call ``detach()`` before ``accelerator.free_memory()``.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        model: what its ``prepare`` returned for the model.
        optimizer: what it returned for the optimizer, or several. Needed with ``mixed_precision="fp16"``; with a fused
            optimizer it saves a pass over the gradients (see ``GradClipper``). A DeepSpeed engine has its own.
        clip: a ClipConfig, or only a rule: number, text, Rule, list, mapping. None reads ``DISTCLIP_CONFIG``,
            ``DISTCLIP_RULE`` ... from the environment, which ``accelerate launch`` hands on to every rank; what these
            do not say is ``gradient_clipping`` in DeepSpeed's configuration, else a largest norm of 1. The axes that
            ``pipeline_group``, ``sharded`` and ``replicated`` name are those of ``accelerator.torch_device_mesh``.

    Raises:
        TypeError: ``accelerator`` is none.
        ValueError: fp16 without ``optimizer``; under DeepSpeed, a model that was not prepared; see ``ClipConfig``.
        NotImplementedError: Megatron-LM, XLA.
        ImportError: Accelerate is not installed.

    Example:
        >>> from accelerate import Accelerator
        >>> accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> clipper = AcceleratedClipper(accelerator, model, optimizer, clip=1.0)
        >>> for _ in range(2):
        ...     with accelerator.accumulate(model):
        ...         accelerator.backward(model(torch.tensor([[3.0, 4.0]])).sum())
        ...         report = clipper.clip()  # None the first time
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> report.to_dict()["total_norm"]
        5.0
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        clip: Clip | None = None,
    ) -> None:
        _check(accelerator)
        self._accelerator = accelerator
        self._in_engine = is_engine(model)
        if _steps_in_backward(accelerator) and not self._in_engine:
            raise ValueError(
                f"model must be the DeepSpeed engine that accelerator.prepare() returned, got {type(model).__name__}"
            )
        if accelerator.scaler is not None and optimizer is None:
            raise ValueError(
                "optimizer is needed with mixed_precision='fp16', where it is stepped by a GradScaler: "
                "AcceleratedClipper(accelerator, model, optimizer)"
            )
        self.config = _config_of(model, clip)
        """The settings."""
        self.clipper: GradClipper = self.config.clipper(
            model,
            optimizer=None if self._in_engine else optimizer,
            scaler=accelerator.scaler,
            mesh=accelerator.torch_device_mesh,
        )
        """The GradClipper that does it."""
        self._returned = 0
        accelerator.register_for_checkpointing(self)

    @property
    def report(self) -> ClipReport | None:
        """What the last clip did; None before the first."""
        return self.clipper.report

    def clip(self, loss: Tensor | float | None = None) -> ClipReport | None:
        """Clip, once all micro-batches of a step are accumulated; call it between ``accelerator.backward`` and
        ``optimizer.step``. Collective, on all ranks.

        Every ``config.log_every`` clips their metrics go to the Accelerator's trackers, with the number of clips so far
        as ``step``; the main process waits for the device then. Under DeepSpeed the engine has clipped and stepped
        before; this returns and logs its report.

        Args:
            loss: this step's, for rules that look at it (see ``GradClipper.clip``). Not under DeepSpeed.

        Returns:
            The report; None between accumulation steps.

        Raises:
            ValueError: ``loss`` under DeepSpeed.
            RuntimeError, TypeError, OverflowError, Failure: see ``GradClipper.clip``.
        """
        if self._in_engine and loss is not None:
            raise ValueError(
                "loss= comes too late under DeepSpeed: the engine has stepped inside accelerator.backward(). Leave it "
                "out; SkipOnSpike goes by the norm alone then."
            )
        if not self._accelerator.sync_gradients:
            return None
        if not self._in_engine:
            self.clipper.clip(loss)
        if self.clipper.steps == self._returned:
            return None
        self._returned = self.clipper.steps
        self._log()
        return self.report

    def detach(self) -> None:
        """Give a DeepSpeed engine its own clipping back, and let ``save_state`` forget this clipper."""
        self.clipper.detach()
        _unregister(self._accelerator, self)

    def state_dict(self) -> dict[str, Any]:
        """As that of ``GradClipper``; ``accelerator.save_state`` calls it."""
        return self.clipper.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As that of ``GradClipper``; ``accelerator.load_state`` calls it."""
        self.clipper.load_state_dict(state_dict)
        self._returned = self.clipper.steps

    def _log(self) -> None:
        # Only the main process has trackers.
        report = self.report
        if report is not None and self._accelerator.trackers and self.clipper.steps % self.config.log_every == 0:
            self._accelerator.log(report.metrics(self.config.log_prefix), step=self.clipper.steps)


def install(accelerator: Accelerator, rule: float | str | Rule | Sequence[Any] | None = None) -> Installation:
    """Make ``accelerator.clip_grad_norm_`` and ``clip_grad_value_`` distclip's, for scripts that call them.

    Right under every layout then, for a part of the parameters too, and clipping by value under FSDP. With fp16 only
    the optimizers of the given parameters are unscaled, and all ranks learn of an overflow on any. Call it on every
    rank, before or after ``accelerator.prepare``, but before ``load_state``.

    Under DeepSpeed these calls come after the step, so the engine clips by ``rule`` instead (and saves its state with
    ``accelerator.save_state``). The calls then return that step's norm before clipping (None before the first step),
    and raise where they ask for another clipping than the engine has done.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        rule: what the script's calls will ask for: a number is a largest global norm, ``"value=0.5"`` a value, and
            ``"value=0.5 | global_norm=1"`` is both; a call that asks for something else raises. None: under DeepSpeed
            ``gradient_clipping`` of its configuration; elsewhere calls may ask for anything.

    Returns:
        A handle whose ``remove()`` undoes it.

    Raises:
        TypeError: ``accelerator`` is none.
        ValueError: ``rule`` describes none.
        RuntimeError: it is installed already.
        NotImplementedError: Megatron-LM, XLA.
        ImportError: Accelerate is not installed.

    Example:
        >>> from accelerate import Accelerator
        >>> accelerator = Accelerator(cpu=True)
        >>> installed = install(accelerator)
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> accelerator.clip_grad_norm_([weight], 1.0)
        tensor(5.)
        >>> installed.remove()
    """
    return Installation(accelerator, rule)


class Installation:
    """What ``install`` did to one Accelerator, until ``remove()``."""

    def __init__(self, accelerator: Accelerator, rule: float | str | Rule | Sequence[Any] | None) -> None:
        _check(accelerator)
        if getattr(accelerator, _INSTALLED, None) is not None:
            raise RuntimeError("distclip is installed on this Accelerator already: call remove() on its handle first")
        self._accelerator = accelerator
        self._rule = None if rule is None else ClipConfig(rule=rule).make_rule()
        self._clipper: GradClipper | None = None
        self._replaced: dict[str, Callable[..., Any]] = {}
        setattr(accelerator, _INSTALLED, self)
        if not _steps_in_backward(accelerator):
            self._replace("clip_grad_norm_", self._clip_norm)
            self._replace("clip_grad_value_", self._clip_value)
            return
        self._replace("clip_grad_norm_", self._norm_of_step)
        self._replace("clip_grad_value_", self._value_of_step)
        if accelerator.deepspeed_engine_wrapped is None:
            self._replace("prepare", partial(self._prepare, accelerator.prepare))
        else:
            self._enter(accelerator.deepspeed_engine_wrapped.engine)

    def remove(self) -> None:
        """Give the Accelerator, and a DeepSpeed engine, their own clipping back."""
        for name, function in self._replaced.items():
            # Whoever has wrapped it since keeps what he has.
            if vars(self._accelerator).get(name) is function:
                delattr(self._accelerator, name)
        self._replaced = {}
        if self._clipper is not None:
            self._clipper.detach()
            _unregister(self._accelerator, self._clipper)
            self._clipper = None
        if getattr(self._accelerator, _INSTALLED, None) is self:
            delattr(self._accelerator, _INSTALLED)

    def _replace(self, name: str, function: Callable[..., Any]) -> None:
        self._replaced[name] = function
        setattr(self._accelerator, name, function)

    def _clip_norm(self, parameters: Parameters, max_norm: float, norm_type: float = 2) -> Tensor:
        wanted = ClipByGlobalNorm(max_norm, norm_type)
        self._check_announced(wanted)
        return self._clip(parameters, wanted).total_norm

    def _clip_value(self, parameters: Parameters, clip_value: float | Bounds) -> None:
        wanted = ClipByValue(clip_value)
        self._check_announced(wanted)
        if self._accelerator.scaler is None:
            # Without a norm, whose all-reduce only a scaler needs.
            modules, params = split(parameters)
            plan_for(self._modules(modules), params)
            clip_grad_value_(params, clip_value)
        else:
            self._clip(parameters, wanted)

    @torch.no_grad()
    def _clip(self, parameters: Parameters, rule: Rule) -> ClipReport:
        modules, params = split(parameters)
        scaler = self._accelerator.scaler
        optimizers = self._optimizers_of(params) if scaler is not None and scaler.is_enabled() else []
        # One at a time: some may be unscaled already, by a clip of others of their parameters.
        scaled = [each for each in optimizers if amp.scale_of(scaler, [each]) is not None]
        self._accelerator.unscale_gradients(scaled)
        plan = plan_for(
            self._modules(modules),
            params,
            engine.settings_of(rule),
            linear=all(each.linear for each in passes_of(rule)),
        )
        report = engine.clip(plan, rule, engine.Moment(params))
        amp.add(scaler, optimizers, report.nonfinite)
        return report

    def _optimizers_of(self, params: Sequence[Tensor]) -> list[Optimizer]:
        wanted = set(map(id, params))
        optimizers = as_optimizers(self._accelerator._optimizers)
        return [each for each in optimizers if not wanted.isdisjoint(parameters_of([each]))]

    def _modules(self, given: Sequence[nn.Module]) -> list[nn.Module]:
        """All that may know how the parameters are laid out."""
        return list(dict.fromkeys([*self._accelerator._models, *given]))

    def _check_announced(self, wanted: ClipByGlobalNorm | ClipByValue) -> None:
        if self._rule is not None and not _asks_for(wanted, self._rule):
            raise ValueError(f"{_told(wanted)} was called after install(accelerator, {self._rule}): make them agree")

    def _prepare(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        prepared = original(*args, **kwargs)
        wrapped = self._accelerator.deepspeed_engine_wrapped
        if wrapped is not None and self._clipper is None:
            self._enter(wrapped.engine)
        return prepared

    def _enter(self, engine: nn.Module) -> None:
        """Clip inside the engine's step from now on."""
        rule = (configured_norm(engine) or math.inf) if self._rule is None else self._rule
        self._clipper = GradClipper(engine, rule)
        self._accelerator.register_for_checkpointing(self._clipper)

    def _norm_of_step(self, parameters: Parameters, max_norm: float, norm_type: float = 2) -> Tensor | None:
        report = self._check_done(parameters, ClipByGlobalNorm(max_norm, norm_type)).report
        return None if report is None else report.total_norm

    def _value_of_step(self, parameters: Parameters, clip_value: float | Bounds) -> None:
        self._check_done(parameters, ClipByValue(clip_value))

    def _check_done(self, parameters: Parameters, wanted: ClipByGlobalNorm | ClipByValue) -> GradClipper:
        """The engine's clipper, which has done what is ``wanted`` now, or ValueError."""
        if self._clipper is None:
            raise RuntimeError(f"{_told(wanted)} came before accelerator.prepare() has made a DeepSpeed engine")
        rule = self._clipper.rule
        if not _asks_for(wanted, rule):
            raise ValueError(
                f"{_told(wanted)} comes too late under DeepSpeed: the engine has stepped inside accelerator.backward() "
                f"and clipped by {rule}. To have it clip as called: install(accelerator, {str(wanted)!r})"
            )
        given = {id(param) for param in split(parameters)[1] if param.requires_grad}
        trained = [param for param in self._clipper._params.tensors if param.requires_grad]
        missing = sum(id(param) not in given for param in trained)
        if missing:
            raise ValueError(
                f"{_told(wanted)} was given all but {missing} of the {len(trained)} parameters that the DeepSpeed "
                "engine trains, but the engine has clipped all of them together. Pass model.parameters(), or leave the "
                "call out and give parts their own rules: AcceleratedClipper(accelerator, model, "
                "clip={'head.*': 1.0, '*': 0.5})"
            )
        return self._clipper


def _check(accelerator: Any) -> None:
    accelerate = optional("accelerate", "accelerate")
    if not isinstance(accelerator, accelerate.Accelerator):
        raise TypeError(f"accelerator must be an accelerate.Accelerator, got {type(accelerator).__name__}")
    kind = accelerator.distributed_type.value
    if kind in ("MEGATRON_LM", "XLA"):
        raise NotImplementedError(f"distclip does not clip under Accelerate's {kind}, which keeps gradients elsewhere")


def _steps_in_backward(accelerator: Accelerator) -> bool:
    return bool(accelerator.distributed_type.value == "DEEPSPEED")


def _config_of(model: nn.Module, clip: Clip | None) -> ClipConfig:
    configured = configured_norm(model) if clip is None and is_engine(model) else None
    return ClipConfig.load(rule=configured) if configured else as_config(clip)


def _unregister(accelerator: Accelerator, item: object) -> None:
    accelerator._custom_objects = [each for each in accelerator._custom_objects if each is not item]


def _asks_for(wanted: ClipByGlobalNorm | ClipByValue, rule: Rule) -> bool:
    """Whether that is what ``rule`` does, or part of it."""
    if isinstance(wanted, ClipByValue):
        return any(isinstance(stage, ClipByValue) and stage.limits((), 0) == wanted.bounds for stage in rule.stages)
    if wanted.max_norm == math.inf:  # only to know the norm
        return wanted.norm_type == rule.norm_type
    return any(stage.signature == wanted.signature for stage in rule.stages)


def _told(wanted: ClipByGlobalNorm | ClipByValue) -> str:
    """The call that asked for it."""
    if isinstance(wanted, ClipByValue):
        return f"clip_grad_value_(clip_value={wanted.clip_value})"
    order = "" if wanted.norm_type == 2 else f", norm_type={wanted.norm_type:g}"
    return f"clip_grad_norm_(max_norm={wanted.max_norm:g}{order})"
