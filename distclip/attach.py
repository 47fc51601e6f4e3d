"""Clipping inside ``optimizer.step()``, for scripts that nobody wants to edit.

``step`` itself is wrapped: a step pre-hook would come before a closure's backward, whose gradients are those to clip.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from distclip.compiled import eager, eager_frame
from distclip.optimizers import as_optimizers

if TYPE_CHECKING:
    from distclip.clipper import GradClipper

# Frames between GradScaler.step and what it calls.
_DEPTH = 10


class Attachment:
    """A clipper inside one optimizer's ``step()``; ``remove()`` takes it out.

    Raises:
        RuntimeError: another clipper is there already.
        ValueError: the optimizer calls its closure more than once (LBFGS).
    """

    def __init__(self, clipper: GradClipper, optimizer: Optimizer, scaler: torch.amp.GradScaler | None) -> None:
        if getattr(optimizer, "_distclip_attachment", None) is not None:
            raise RuntimeError(
                f"this {type(optimizer).__name__} has a GradClipper attached already: call its detach() first"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("LBFGS makes several gradients in one step: clip inside its closure instead")
        self._clipper, self.optimizer, self.scaler = clipper, optimizer, scaler
        self._step = optimizer.step
        self._clipped = False
        self._active = True
        self._wrapped = _method(optimizer, self._step, self._clip_and_step)
        optimizer.step = self._wrapped  # type: ignore[method-assign]
        optimizer._distclip_attachment = self  # type: ignore[attr-defined]
        if scaler is not None and not hasattr(scaler, "_stepped"):
            _ScalerStep.begin(scaler)

    def remove(self) -> None:
        """Put the optimizer's, and the scaler's, own ``step`` back."""
        if self.optimizer.__dict__.get("step") is self._wrapped:
            _put_back(self.optimizer, self._step)
        else:
            # Somebody (an lr scheduler) has wrapped ours since: it stays, and does nothing more.
            self._active = False
        del self.optimizer._distclip_attachment  # type: ignore[attr-defined]
        if self.scaler is not None and not hasattr(self.scaler, "_stepped"):
            _ScalerStep.end(self.scaler)

    @eager_frame
    def _clip_and_step(self, closure: Callable[[], Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._active:
            return self._step(closure, *args, **kwargs) if closure is not None else self._step(*args, **kwargs)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._clipped:
            self._refuse_unknown_scaler()
            self._clipper.clip()
        result = self._step(*args, **kwargs)
        return result if closure is None else loss

    @contextmanager
    def clipped_under(self, scaler: torch.amp.GradScaler) -> Iterator[None]:
        """Clip before a scaler decides whether to step: torch's decides by what this rank alone has seen."""
        self._clipper._clip_under(scaler)
        self._clipped = True
        try:
            yield
        finally:
            self._clipped = False

    @eager
    def _refuse_unknown_scaler(self) -> None:
        frame = sys._getframe()
        for _ in range(_DEPTH):
            if frame.f_back is None:
                return
            frame = frame.f_back
            caller = frame.f_locals.get("self")
            if isinstance(caller, torch.amp.GradScaler) and caller.is_enabled():
                raise ValueError(
                    "a GradScaler steps this optimizer, and skips step() on the rank that overflows alone, whose peers "
                    "would wait in the clip for ever. Pass it: GradClipper(model, rule, scaler=scaler), or use "
                    "distclip.amp.GradScaler."
                )


class _ScalerStep:
    """The ``step`` of one of torch's GradScalers, for all optimizers that it steps and that have an attachment.

    It asks the optimizer for that and keeps none itself: attachments come and go in any order, and a scaler outlives
    the models that it has scaled.
    """

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self._scaler, self._step = scaler, scaler.step
        self._users = 0

    @classmethod
    def begin(cls, scaler: torch.amp.GradScaler) -> None:
        """One more attachment steps by this scaler."""
        if not isinstance(vars(scaler).get("step"), cls):
            scaler.step = cls(scaler)  # type: ignore[method-assign]
        vars(scaler)["step"]._users += 1

    @classmethod
    def end(cls, scaler: torch.amp.GradScaler) -> None:
        """One less; after the last, the scaler has its own ``step`` again."""
        step = vars(scaler).get("step")
        if isinstance(step, cls):
            step._users -= 1
            if not step._users:
                _put_back(scaler, step._step)

    def __call__(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        (inner,) = as_optimizers(optimizer)
        attachment = getattr(inner, "_distclip_attachment", None)
        if attachment is None or attachment.scaler is not self._scaler or not self._scaler.is_enabled():
            return self._step(optimizer, *args, **kwargs)
        if attachment._clipped:
            # Somebody wrapped the scaler's step between two attachments: an outer one of these has clipped.
            return self._step(optimizer, *args, **kwargs)
        with attachment.clipped_under(self._scaler):
            return self._step(optimizer, *args, **kwargs)


def _put_back(owner: Any, step: Any) -> None:
    """Give an object its class's ``step`` again, or the one that somebody had put on it before."""
    if getattr(step, "__func__", None) is type(owner).step:
        del owner.step
    else:
        owner.step = step


def _method(optimizer: Optimizer, step: Any, inner: Callable[..., Any]) -> Any:
    """A bound method, as lr schedulers want ``step`` to be, with the name and marks of the original."""

    @functools.wraps(step)
    def wrapper(self: Optimizer, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        return inner(closure, args, kwargs)

    return types.MethodType(wrapper, optimizer)
