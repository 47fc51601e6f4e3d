"""The optimizers that a clipper knows: which parameters they step, and how a coefficient gets into a fused step.

torch's fused optimizers divide the gradients by ``optimizer.grad_scale`` while they read them, and leave the step out,
on the device, where ``optimizer.found_inf`` is not 0. (They also write the divided gradients back to ``.grad``.) So one
pass over the gradients, and any wait for the norm, can be saved.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from distclip.gradients import version_of
from distclip.hints import several
from distclip.layout.dtensor import is_dtensor
from distclip.layout.memory import Mark

# Left on a gradient whose clipping waits for the step: for which fold, and its version then.
_FOLDED = "_distclip_folded"
# Their optimizers stand for one of torch's.
_FRAMEWORKS = ("accelerate", "lightning", "pytorch_lightning")
# A float32 ``grad_scale`` can hold the inverse of coefficients from here on.
_SMALLEST = 1e-30


def as_optimizers(optimizer: Optimizer | Iterable[Optimizer] | None) -> tuple[Optimizer, ...]:
    """What a user passed as ``optimizer=``: none, one or several; without the wrappers that Accelerate puts on.

    Raises:
        TypeError: it is something else.
    """
    if optimizer is None:
        return ()
    if not isinstance(optimizer, Optimizer) and not several(optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or several, got {type(optimizer).__name__}")
    given = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    for item in given:
        if not isinstance(item, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or several, got {type(item).__name__}")
    return tuple(map(_unwrapped, given))


def scaler_of(optimizer: Optimizer | Iterable[Optimizer] | None) -> torch.amp.GradScaler | None:
    """The one by which Accelerate steps an optimizer that it prepared."""
    for given in optimizer if isinstance(optimizer, list | tuple) else [optimizer]:
        scaler = getattr(given, "scaler", None)
        if isinstance(scaler, torch.amp.GradScaler):
            return scaler
    return None


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    # Only where we know that scalers and frameworks step the inner one: other wrappers do work of their own.
    known = any(base.__module__.partition(".")[0] in _FRAMEWORKS for base in type(optimizer).__mro__)
    inner = getattr(optimizer, "optimizer", None) if known else None
    return _unwrapped(inner) if isinstance(inner, Optimizer) else optimizer


def parameters_of(optimizers: Iterable[Optimizer]) -> dict[int, Tensor]:
    """All parameters that they step, by id."""
    return {id(p): p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def check_covered(optimizers: Sequence[Optimizer], params: Sequence[Tensor]) -> None:
    """Raise ValueError where an optimizer steps parameters that the clipper does not clip, and would not unscale."""
    known = set(map(id, params))
    for optimizer in optimizers:
        others = [p for key, p in parameters_of([optimizer]).items() if key not in known]
        if others:
            raise ValueError(
                f"{type(optimizer).__name__} steps {len(others)} parameters (of shape {tuple(others[0].shape)} ...) "
                "that are not in the clipper's model: their gradients would stay multiplied by the loss scale. Was it "
                "made before the model was wrapped? Else pass all its modules: GradClipper([model, other], ...)."
            )


def check_fused(optimizers: Sequence[Optimizer]) -> None:
    """Raise ValueError for fused optimizers that torch cannot run on DTensors: it would say so in the first step."""
    for optimizer in optimizers:
        operation = {"SGD": "_fused_sgd_", "Adagrad": "_fused_adagrad_"}.get(type(optimizer).__name__)
        fused = any(group.get("fused") for group in optimizer.param_groups)
        if operation and fused and any(map(is_dtensor, parameters_of([optimizer]).values())):
            from torch.distributed.tensor import DTensor

            known = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
            if getattr(torch.ops.aten, operation).default not in known:
                raise ValueError(
                    f"{type(optimizer).__name__}(fused=True) cannot step DTensors (FSDP2, tensor parallel): torch "
                    f"{torch.__version__} has no sharding rule for {operation}. Build it with fused=False, or take "
                    "AdamW or Adam."
                )


def can_fold(optimizers: Sequence[Optimizer], params: Sequence[Tensor]) -> bool:
    """Whether all gradients go through a fused step, which can scale them on its way."""
    if not optimizers or not all(getattr(each, "_step_supports_amp_scaling", False) for each in optimizers):
        return False
    # A group can be taken out of it.
    if not all(group.get("fused", True) for each in optimizers for group in each.param_groups):
        return False
    stepped = parameters_of(optimizers)
    return all(id(param) in stepped for param in params if param.grad is not None)


def inside_step(optimizers: Sequence[Optimizer]) -> bool:
    """Whether one of them is stepping right now: the caller is its closure, and no step is to come."""
    frame = sys._getframe().f_back
    while frame is not None:
        if frame.f_code.co_name == "step" and any(frame.f_locals.get("self") is each for each in optimizers):
            return True
        frame = frame.f_back
    return False


class Fold:
    """A coefficient on its way into the next step of fused optimizers. Sets nothing before that step."""

    def __init__(
        self,
        optimizers: Iterable[Optimizer],
        grad_scale: Tensor,
        found_inf: Tensor | None,
        instead: Callable[[], None],
    ) -> None:
        """
        Args:
            optimizers: those that will step.
            grad_scale: what to divide the gradients by; 0-d.
            found_inf: a 0-d bool: whether to leave the step out. None where nobody asks. A GradScaler's own is added.
            instead: scales the gradients in place, for a step with a closure, which makes new ones.
        """
        self._grad_scale = grad_scale.to(torch.float32)
        self._found_inf = None if found_inf is None else found_inf.to(torch.float32)
        self._instead = instead
        self._token = Mark()
        self.waits = True
        """Whether no step has come yet."""
        self._hooks: dict[Optimizer, list[RemovableHandle]] = {}
        self._set: set[Optimizer] = set()
        for optimizer in optimizers:
            self._hooks[optimizer] = [optimizer.register_step_pre_hook(self._before)]
            for grad in _first_grad(optimizer):
                setattr(grad, _FOLDED, (self._token, version_of(grad)))

    def drop(self) -> None:
        """Forget it: the gradients that it was meant for are gone, or their step raised."""
        for optimizer in self._hooks:
            self._take_off(optimizer)

    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.waits = False
        hooks = self._hooks[optimizer]
        if len(hooks) == 1:
            # Takes this one out: torch may have others to call, and no hook may go while it does. Nor may the other,
            # but that is the last of its kind.
            hooks.append(optimizer.register_step_post_hook(self._after))
        # A GradScaler has set both attributes by now, and deletes them itself.
        scaled = hasattr(optimizer, "found_inf") and optimizer not in self._set
        if not self._is_for(optimizer, scaled):
            self._unset(optimizer)
            return
        if (args[1:2] or (kwargs.get("closure"),))[0] is not None:
            self._instead()
            return
        optimizer.grad_scale = self._grad_scale
        if scaled:
            if self._found_inf is not None:
                # The scaler's notes stay as they are: what a rule skips is no reason to shrink the scale.
                own = self._found_inf.to(optimizer.found_inf.device)
                optimizer.found_inf = torch.maximum(optimizer.found_inf, own)
        else:
            optimizer.found_inf = self._found_inf
            self._set.add(optimizer)

    def _after(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._take_off(optimizer)

    def _take_off(self, optimizer: Optimizer) -> None:
        for hook in self._hooks[optimizer]:
            hook.remove()
        self._unset(optimizer)

    def _unset(self, optimizer: Any) -> None:
        if optimizer in self._set:
            self._set.remove(optimizer)
            del optimizer.grad_scale, optimizer.found_inf

    def _is_for(self, optimizer: Optimizer, scaled: bool) -> bool:
        """Whether the gradients to step with are those that were clipped."""
        grads = list(_first_grad(optimizer))
        told = [getattr(grad, _FOLDED, (None, 0)) for grad in grads]
        if all(told == (self._token, version_of(grad)) for told, grad in zip(told, grads, strict=True)):
            return True
        if not scaled and all(who is not self._token for who, _ in told):
            # The step that was clipped has been given up; these are new.
            return False
        raise RuntimeError(
            "gradients were changed after clip(), which left it to this fused step to scale them. Change them before "
            "clip(), or make the GradClipper without optimizer= so that it scales in place."
        )


def _first_grad(optimizer: Optimizer) -> Iterator[Tensor]:
    grads = (p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    yield from islice(grads, 1)


def fits_grad_scale(coefficient: Tensor) -> bool:
    """Whether a float32 can hold its inverse. Where looking would wait for a device: taken for granted."""
    return coefficient.device.type != "cpu" or not 0 < float(coefficient) < _SMALLEST
