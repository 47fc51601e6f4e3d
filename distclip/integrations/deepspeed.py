"""GradClipper inside a DeepSpeed engine's ``step()``.

Each of DeepSpeed's optimizers measures, looks for overflow, unscales, clips and steps in one method. Here measuring and
clipping are replaced, on the one optimizer object, and all else is left to it:

============================  =======================================  ===============================
optimizer                     measured in place of                     clipped in place of
============================  =======================================  ===============================
ZeRO 1, 2                     ``check_overflow, scaled_global_norm``   ``unscale_and_clip_grads``
ZeRO 3                        ``check_overflow, _get_norm_groups``     ``unscale_and_clip_grads``
fp16 or bf16 at stage 0       nothing: before the step                 ``unscale_and_clip_grads``
bf16, own accumulation        ``get_grads_for_norm``                   nothing: in its buffer, mostly float32
torch's, at stage 0           nothing: before the step                 nothing: in ``.grad``
============================  =======================================  ===============================

So with ZeRO the gradients are read once for norm and overflow, and clipped in float32 in the pass that takes the loss
scale off. (DeepSpeed updates its loss scale before it divides by it: in a step in which the scale grows its own
gradients come out too small. And at stage 0 with float16 ``engine.backward()`` forgets to multiply by it, DeepSpeed's
pull request 8393. Here gradients are divided by what they were multiplied with.)

With ``nonfinite="propagate"`` it is DeepSpeed that decides on an inf or NaN: it skips the step, but not for bf16 at
stages 1 and 2 without ``check_grad_overflow``, nor for torch's optimizers at stage 0.

What is of its PipelineEngine alone stands in ``deepspeed_pipeline``.

Everything here rests on internals of DeepSpeed. ``NEEDED`` lists them, and an engine without them is refused.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distclip.integrations import deepspeed_pipeline as pipeline
from distclip.layout.zero import homes
from distclip.rules.compose import as_rule
from distclip.warning import warn

if TYPE_CHECKING:
    from distclip.clipper import GradClipper
    from distclip.engine import Verdict

TESTED = "0.19.8"
"""The version of DeepSpeed that the tests run with."""

_ENGINE = (
    "_config",
    "_take_model_step",
    "autotp_size",
    "gradient_clipping",
    "is_gradient_accumulation_boundary",
    "mp_world_size",
    "seq_data_parallel_group",
    "torch_autocast_z0_gradscaler",
)
_ZERO = ("averaged_gradients", "check_overflow", "loss_scale", "overflow", "unscale_and_clip_grads")
_COPIES = ("fp16_groups", "loss_scale", "overflow", "unscale_and_clip_grads")
NEEDED: dict[str, tuple[str, ...]] = {
    "DeepSpeedZeroOptimizer": (
        *_ZERO,
        "bit16_groups",
        "compute_grad_norm",
        "get_param_id",
        "grad_partition_insertion_offset",
        "grad_start_offset",
        "partition_size",
        "real_dp_process_group",
        "scaled_global_norm",
        "single_partition_of_fp32_groups",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (*_ZERO, "_get_norm_groups", "fp16_groups", "fp32_partitioned_groups_flat"),
    "FP16_Optimizer": (*_COPIES, "fp32_groups_flat", "fused_adam_legacy"),
    "FP16_UnfusedOptimizer": (*_COPIES, "fp32_groups", "fused_lamb_legacy"),
    "BF16_Optimizer": (
        "bf16_groups",
        "clip_grad",
        "fp32_groups_gradients",
        "fp32_groups_has_gradients",
        "get_grads_for_norm",
        "overflow",
    ),
}
"""By the class of an engine's optimizer, the attributes that distclip reads or replaces."""


class EngineHooks:
    """What is replaced on one engine: the clipper's rule holds inside its ``step()`` until ``remove()``.

    Raises:
        RuntimeError: the engine has a clipper already; its DeepSpeed has other internals.
        NotImplementedError: a way of working that distclip does not know (see ``_check_known``).
    """

    def __init__(self, engine: Any, clipper: GradClipper) -> None:
        if getattr(engine, "_distclip_hooks", None) is not None:
            raise RuntimeError("this DeepSpeed engine has a GradClipper already: call its detach() first")
        _check_internals(engine)
        _check_known(engine)
        self._engine = engine
        self._clipper = clipper
        self._verdict: Verdict | None = None
        self._grad_scale: Tensor | None = None
        # Whether the optimizer, which knows the scale, ran this step's backward. ZeRO is always asked for it.
        self._backward_scales = False
        self._restore: list[Callable[[], None]] = []
        pipeline.declare_ties(engine)
        self._groups: dict[int, set[int]] = defaultdict(set)
        for home in homes(engine.optimizer):
            self._groups[home.group].add(id(home.param))
        self._install()

    def remove(self) -> None:
        """Give the engine its own clipping back."""
        for restore in reversed(self._restore):
            restore()

    def _install(self) -> None:
        engine, optimizer = self._engine, self._engine.optimizer
        configured = configured_norm(engine)
        if configured and as_rule(configured).signature != self._clipper.rule.signature:
            warn(
                f"gradient_clipping={configured} in DeepSpeed's configuration is off: {self._clipper.rule!r} of this "
                "GradClipper holds instead. Remove it there to be rid of this warning (under Accelerate, whose default "
                "is 1.0: gradient_clipping: 0.0)."
            )
        self._take_step = engine._take_model_step
        self._set(engine, "_distclip_hooks", self)
        self._set(engine, "gradient_clipping", lambda: 0.0)
        self._set(engine, "_take_model_step", self._step)
        kind = type(optimizer).__name__
        if kind == "DeepSpeedZeroOptimizer":
            self._set(optimizer, "compute_grad_norm", True)
            self._set(optimizer, "check_overflow", self._check_overflow)
            self._set(optimizer, "scaled_global_norm", self._scaled_norm)
            self._set(optimizer, "unscale_and_clip_grads", self._clip_partition)
        elif kind == "DeepSpeedZeroOptimizer_Stage3":
            self._set(optimizer, "check_overflow", self._check_overflow)
            self._set(optimizer, "_get_norm_groups", lambda: [self._scaled_norm()])
            self._set(optimizer, "unscale_and_clip_grads", lambda group, _: self._carry_out(self._groups[group]))
        elif kind in ("FP16_Optimizer", "FP16_UnfusedOptimizer"):
            self._set(optimizer, "backward", partial(self._scaled_backward, optimizer.backward))
            self._set(optimizer, "unscale_and_clip_grads", lambda *_, **__: self._carry_out())
        elif kind == "BF16_Optimizer":
            self._set(optimizer, "clip_grad", 0.0)
            self._set(optimizer, "get_grads_for_norm", self._clip_accumulated)
        else:
            # Where the engine looks for whether to count a skipped step, and to let the schedule of the rate wait.
            self._set(optimizer, "overflow", False)

    def _set(self, owner: Any, name: str, value: object) -> None:
        own = vars(owner)
        if name in own:
            self._restore.append(lambda original=own[name]: setattr(owner, name, original))  # type: ignore[misc]
        else:
            self._restore.append(lambda: delattr(owner, name))
        setattr(owner, name, value)

    def _step(self, lr_kwargs: Any) -> None:
        """The engine's own step, with the clip inside."""
        engine, optimizer = self._engine, self._engine.optimizer
        self._verdict = None
        if type(optimizer).__name__ == "BF16_Optimizer":
            optimizer.clip_grad = 0.0  # loading a checkpoint may have set it
        if isinstance(optimizer, torch.optim.Optimizer):
            self._clip_plain(optimizer)
        elif type(optimizer).__name__ in ("FP16_Optimizer", "FP16_UnfusedOptimizer") and self._judged().report.skipped:
            self._overflow()
        self._take_step(lr_kwargs)
        verdict = self._judged()
        self._backward_scales = False
        overflow = bool(getattr(optimizer, "overflow", False))
        skipped = bool(verdict.report.skipped) or overflow or self._scaler_skipped(verdict)
        self._clipper._stepped(verdict, skipped)
        self._verdict = None
        # DeepSpeed has None at stage 0 with float32, the norm times the loss scale with float16 there.
        engine._global_grad_norm = verdict.report.total_norm

    def _judged(self) -> Verdict:
        """This step's verdict. Collective, the first time in a step."""
        if self._verdict is None:
            optimizer = self._engine.optimizer
            scales = self._backward_scales or hasattr(optimizer, "averaged_gradients")
            scale = float(optimizer.loss_scale) if scales else 1.0
            self._grad_scale = None if scale == 1.0 else torch.tensor(scale, dtype=torch.float64)
            self._verdict = self._clipper._judge(self._grad_scale)
        return self._verdict

    def _scaled_backward(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        self._backward_scales = True
        original(*args, **kwargs)

    def _overflows(self) -> bool:
        """Whether the optimizer is to leave the step out, which it does where it sees an overflow."""
        report = self._judged().report
        return bool(report.nonfinite | report.skipped)

    def _overflow(self) -> None:
        """Let an optimizer that looks for overflow by itself find one: it leaves out the step and drops gradients."""
        for group in self._engine.optimizer.fp16_groups:
            for param in group:
                if param.grad is not None:
                    param.grad.view(-1)[:1] = torch.inf

    def _check_overflow(self, partition_gradients: bool = True) -> None:
        self._engine.optimizer.overflow = self._overflows()

    def _scaled_norm(self, norm_type: float = 2) -> Tensor:
        """What the optimizer takes for the norm of the scaled gradients; an inf where it is to skip the step."""
        verdict = self._judged()
        if verdict.report.skipped:
            # ZeRO 1 and 2 with bf16 go on in spite of an inf.
            self._engine.optimizer.overflow = True
        norm = verdict.total_norm
        if self._grad_scale is not None:
            norm = norm * self._grad_scale.to(norm.device)
        return torch.full_like(norm, torch.inf) if self._overflows() else norm

    def _clip_partition(self, grads: list[Tensor], total_norm: Tensor | None) -> None:
        partitions = self._engine.optimizer.single_partition_of_fp32_groups
        for group, partition in enumerate(partitions):
            if any(partition.grad is grad for grad in grads):
                self._carry_out(self._groups[group])

    def _clip_accumulated(self, for_clipping: bool = False) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """Gradients whose norm the optimizer will take to know whether to skip: one, that is the norm itself."""
        norm = self._scaled_norm()
        if not self._overflows():
            self._carry_out()
        return [norm.view(1)], {}

    def _clip_plain(self, optimizer: torch.optim.Optimizer) -> None:
        scaler = self._engine.torch_autocast_z0_gradscaler
        if scaler is not None:
            scaler.unscale_(optimizer)
        skipped = bool(self._judged().report.skipped)
        optimizer.overflow = skipped  # type: ignore[attr-defined]
        if skipped:
            self._engine.zero_grad()
        else:
            self._carry_out()

    def _scaler_skipped(self, verdict: Verdict) -> bool:
        return self._engine.torch_autocast_z0_gradscaler is not None and bool(verdict.report.nonfinite)

    def _carry_out(self, params: set[int] | None = None) -> None:
        self._clipper._carry_out(self._judged(), params, self._grad_scale)


def configured_norm(engine: Any) -> float | None:
    """``gradient_clipping`` in DeepSpeed's configuration: None where it says nothing, 0 for no clipping."""
    # Where it says nothing DeepSpeed clips as well, to 1.0, but nobody asked for it.
    configured: float | None = engine._config._param_dict.get("gradient_clipping")
    return configured


def _check_known(engine: Any) -> None:
    """Refuse engines under which the norm would be wrong or the clip lost."""
    optimizer = engine.optimizer
    inner = type(getattr(optimizer, "optimizer", optimizer)).__name__
    reasons = {
        **pipeline.refused(engine),
        "model parallelism (mpu or autotp)": _slices(engine) > 1 or engine.autotp_size() > 1,
        "Muon, whose updates stand where the gradients were": "muon" in inner.lower(),
        "an optimizer offloaded to NVMe": bool(getattr(optimizer, "swap_optimizer", False)),
        "torch_autocast with float16 under ZeRO": getattr(optimizer, "torch_autocast_gradscaler", None) is not None,
        "a legacy fused optimizer": any(
            getattr(optimizer, name, False) for name in ("fused_adam_legacy", "fused_lamb_legacy")
        ),
        "no optimizer": optimizer is None or type(optimizer).__name__ == "DummyOptim",
    }
    for reason, holds in reasons.items():
        if holds:
            raise NotImplementedError(f"GradClipper does not clip in a DeepSpeed engine with {reason}")


def _slices(engine: Any) -> int:
    """Into how many parts tensors are cut. What a PipelineEngine calls its model parallel ranks are its stages too."""
    return 1 if pipeline.is_pipeline(engine) else int(engine.mp_world_size)


def _check_internals(engine: Any) -> None:
    optimizer = engine.optimizer
    names = NEEDED.get(type(optimizer).__name__, ())
    missing = [name for name in _ENGINE if not hasattr(engine, name)]
    missing += [name for name in names if not hasattr(optimizer, name)]
    if missing:
        version = getattr(sys.modules.get("deepspeed"), "__version__", "unknown")
        raise RuntimeError(
            f"DeepSpeed {version} has other internals than distclip knows: {type(optimizer).__name__} or its engine "
            f"lacks {', '.join(missing)}. Install deepspeed=={TESTED}, or report this version to distclip."
        )
