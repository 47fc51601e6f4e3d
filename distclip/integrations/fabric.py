"""Clipping in Lightning Fabric: ``fabric.clip_gradients`` with any rule, under every strategy but DeepSpeed.

Fabric leaves the loop to the user, who says in it where to clip. So the line stays, and what it does is replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from distclip.clipper import GradClipper
from distclip.config import Clip, ClipConfig, as_config
from distclip.integrations.parts import config_of_part, follow_optimizers, part_of
from distclip.layout.zero import is_engine
from distclip.optimizers import as_optimizers
from distclip.warning import warn

# Under these names modules stand inside torch.compile's and Fabric's wrappers.
_WRAPPED = ("_orig_mod", "_forward_module")


def install(
    fabric: Any,
    clip: Clip | None = None,
    *,
    mesh: DeviceMesh | None = None,
) -> FabricClip:
    """Let ``fabric.clip_gradients(model, optimizer)`` clip by any rule.

    Call that as before, on every rank, between the last ``fabric.backward(loss)`` of a step and ``optimizer.step()``.
    It clips what the optimizer steps, by a rule of its own for each optimizer, and returns the norm before clipping. Of
    its own arguments ``clip_val`` and ``max_norm`` are off, with a warning, and so are ``norm_type`` and
    ``error_if_nonfinite``: the rule, and ``nonfinite`` of the ClipConfig, hold instead. Rules that look at the loss are
    given it by ``fabric.clip_gradients(model, optimizer, loss=loss)``, the mean over the accumulated micro-batches.

    Metrics (``train/grad_norm``, ``train/clip_coef`` ...; of a second optimizer ``train/1/grad_norm`` ...) go to the
    loggers of ``Fabric(loggers=)``, each ``log_every`` steps of an optimizer.

    Args:
        fabric: a ``Fabric``.
        clip: a ClipConfig, or only its rule; None reads ``DISTCLIP_CONFIG`` and the environment.
        mesh: whose axes ``pipeline_group``, ``sharded`` and ``replicated`` of the ClipConfig name.

    Returns:
        A handle, which can be part of what ``fabric.save`` and ``fabric.load`` are given.

    Raises:
        TypeError: ``fabric`` is no Fabric.
        RuntimeError: it has been installed already.
        ValueError: a setting does not fit.
        NotImplementedError: in ``clip_gradients()``: DeepSpeed.

    Example:
        clip = distclip.integrations.fabric.install(fabric, "zclip")
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer)
        optimizer.step()
        fabric.save("checkpoint.ckpt", {"model": model, "optimizer": optimizer, "clip": clip})
    """
    if not all(hasattr(fabric, name) for name in ("clip_gradients", "load", "log_dict", "strategy")):
        raise TypeError(f"fabric must be a Lightning Fabric, got {type(fabric).__name__}")
    return FabricClip(fabric, as_config(clip), mesh)


class FabricClip:
    """What stands in one Fabric's ``clip_gradients`` until ``remove()``. Made by ``install``."""

    def __init__(self, fabric: Any, config: ClipConfig, mesh: DeviceMesh | None) -> None:
        if "clip_gradients" in vars(fabric):
            raise RuntimeError("clip_gradients of this Fabric was replaced already: call remove() on the handle first")
        self.clippers: list[GradClipper] = []
        """One for each optimizer, in the order of their first clips; their ``report`` is that of the last clip."""
        self._fabric = fabric
        self._config = config
        self._mesh = mesh
        self._optimizers: list[Optimizer] = []
        self._resumed: list[dict[str, Any]] = []
        self._warned = False
        self._own_load = fabric.load
        fabric.clip_gradients = self._clip
        fabric.load = self._load

    def remove(self) -> None:
        """Give the Fabric its own clipping back."""
        for name in ("clip_gradients", "load"):
            vars(self._fabric).pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """The rules' memory. The same on every rank."""
        return {"clippers": [clipper.state_dict() for clipper in self.clippers] + self._resumed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from what ``state_dict`` returned; optimizers that were not clipped yet, at their first clip.

        Raises:
            ValueError: the state is of another rule. (Of such optimizers: in ``clip_gradients()``.)
        """
        states = list(state_dict["clippers"])
        for clipper in self.clippers:
            clipper.load_state_dict(states.pop(0))
        self._resumed = states

    def _load(self, path: Any, state: dict[str, Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        mine = [name for name, value in (state or {}).items() if value is self]
        remainder = self._own_load(path, state, *args, **kwargs)
        for name in mine:
            assert state is not None
            if state[name] is not self:
                # FSDP and ModelParallel: they put what they read into the dictionary, and load nobody's state.
                self.load_state_dict(state[name])
                state[name] = self
        return remainder

    def _clip(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
        *,
        loss: Tensor | float | None = None,
    ) -> Tensor:
        for name, value in {"clip_val": clip_val, "max_norm": max_norm}.items():
            if value is not None and not self._warned:
                self._warned = True
                warn(
                    f"{name}={value} is off: {self._config.make_rule()!r} of distclip holds instead. Leave it out of "
                    "fabric.clip_gradients()."
                )
        (inner,) = as_optimizers(optimizer)
        place = next((place for place, known in enumerate(self._optimizers) if known is inner), None)
        if place is None:
            place = len(self.clippers)
            self._add(module, inner)
        clipper = self.clippers[place]
        follow_optimizers(clipper)
        report = clipper.clip(loss)
        if clipper.steps % self._config.log_every == 0 and self._fabric.loggers:
            prefix = self._config.log_prefix + (f"{place}/" if place else "")
            self._fabric.log_dict(report.metrics(prefix), step=clipper.steps)
        return report.total_norm

    def _add(self, module: nn.Module, optimizer: Optimizer) -> None:
        for name in _WRAPPED:
            module = module._modules.get(name) or module
        if is_engine(module):
            raise NotImplementedError(
                "distclip does not clip in fabric.clip_gradients() under DeepSpeed. Leave that out: "
                "distclip.GradClipper(<the DeepSpeed engine>, rule) acts inside the engine's step."
            )
        scaler: torch.amp.GradScaler | None = getattr(self._fabric.strategy.precision, "scaler", None)
        part = part_of(module, optimizer)
        config = config_of_part(self._config, len(self.clippers))
        clipper = config.clipper(part, optimizer=optimizer, scaler=scaler, mesh=self._mesh)
        if self._resumed:
            clipper.load_state_dict(self._resumed[0])
            self._resumed = self._resumed[1:]
        self._optimizers.append(optimizer)
        self.clippers.append(clipper)
