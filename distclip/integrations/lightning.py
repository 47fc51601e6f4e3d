"""Clipping in the Lightning ``Trainer``, by a callback.

``Trainer(callbacks=[ClipCallback("zclip")])`` needs no change of the ``LightningModule``, and Lightning keeps a
callback's state in its own checkpoints. (A mixin for modules would have to be written into each of them, and Lightning
never calls its hook under manual optimization.) The callback clips

- under automatic optimization in the place of the module's hook ``configure_gradient_clipping``, which Lightning calls
  last: after the last backward of an accumulation, after the loss scale was taken off, and after every
  ``on_before_optimizer_step``, whose norms are those before clipping;
- under manual optimization, where that hook is not called, in its own ``on_before_optimizer_step``: each
  ``optimizer.step()`` comes by there. (The module's own hook of that name comes after it, and sees what was clipped.)

The ``Trainer``'s ``gradient_clip_val`` and the module's own ``configure_gradient_clipping`` and ``clip_gradients`` are
off meanwhile, so nothing is clipped twice.

Both run inside ``optimizer.step(closure)``, when a fused step's hooks have been called already: the gradients are
clipped in place. With a loss scale (``precision="16-mixed"``) Lightning runs the closure before the step, and a fused
one can scale them; Lightning itself refuses to clip there.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from distclip.clipper import GradClipper
from distclip.config import Clip, as_config
from distclip.hints import optional
from distclip.integrations.parts import config_of_part, follow_optimizers, part_of
from distclip.layout.zero import is_engine
from distclip.optimizers import as_optimizers, parameters_of
from distclip.warning import warn

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    # The same code under two names. A script imports one of them.
    _NAME = "lightning.pytorch"
    if _NAME not in sys.modules and "pytorch_lightning" in sys.modules:
        _NAME = "pytorch_lightning"
    Callback = optional(_NAME, "lightning").Callback

_OFF = ("clip_gradients", "configure_gradient_clipping")


class ClipCallback(Callback):
    """Clips by any rule, each step of a ``Trainer``, under every strategy but DeepSpeed.

    Every optimizer is clipped by itself, by the norm of the parameters that it steps, and has a rule of its own.

    Metrics go through ``LightningModule.log``: ``train/grad_norm`` (before clipping), ``train/clip_coef``,
    ``train/grad_norm_clipped``, ``train/clip_threshold``, ``train/clipped``, ``train/skipped``, ``train/nonfinite``;
    of a second optimizer ``train/1/grad_norm`` and so on. Each ``log_every`` steps of an optimizer; the loggers write
    what is there every ``Trainer(log_every_n_steps=)``.

    A rule that looks at the loss is given what went into the ``backward()`` calls since the last step (those through
    Lightning: ``manual_backward``).

    Args:
        clip: a ClipConfig, or only its rule; None reads ``DISTCLIP_CONFIG`` and the environment.
        mesh: whose axes ``pipeline_group``, ``sharded`` and ``replicated`` of the ClipConfig name.

    Raises:
        ImportError: Lightning is not installed.
        ValueError: a setting does not fit. In ``fit()``: the checkpoint is of another rule, or of another number of
            optimizers.
        NotImplementedError: in ``fit()``: the DeepSpeed strategy.

    Example:
        trainer = Trainer(callbacks=[ClipCallback("zclip")], strategy="fsdp")
        trainer.fit(model, data)
    """

    def __init__(
        self,
        clip: Clip | None = None,
        *,
        mesh: DeviceMesh | None = None,
    ) -> None:
        self.clippers: list[GradClipper] = []
        """One for each optimizer of the running or last ``fit()``; their ``report`` is that of the last step."""
        self._config = as_config(clip)
        self._mesh = mesh
        self._optimizers: tuple[Optimizer, ...] = ()
        self._scaler: torch.amp.GradScaler | None = None
        self._resumed: list[dict[str, Any]] = []
        self._loss: Tensor | None = None
        self._sees_loss = any(stage.needs_loss for stage in self._config.make_rule().stages)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the place of Lightning's own clipping."""
        if stage != "fit":
            return
        if trainer.gradient_clip_val:
            self._say_off(f"gradient_clip_val={trainer.gradient_clip_val} of the Trainer")
        hook = type(pl_module).configure_gradient_clipping
        if hook.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning"):
            self._say_off(f"{type(pl_module).__name__}.configure_gradient_clipping")
        pl_module.configure_gradient_clipping = lambda optimizer, *_, **__: self._clip(trainer, pl_module, optimizer)
        pl_module.clip_gradients = lambda *_, **__: self._say_off(f"{type(pl_module).__name__}.clip_gradients")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the module its own hooks back."""
        if stage == "fit":
            _give_back(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The same where ``fit()`` raises: Lightning leaves ``teardown`` out then."""
        _give_back(pl_module)
        self._resumed = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """All is wrapped, and loaded from a checkpoint: make the clippers."""
        model = trainer.strategy.model
        if is_engine(model):
            raise NotImplementedError(
                "ClipCallback does not clip under Lightning's DeepSpeed strategy. Leave it out, and in "
                "on_train_start() call distclip.GradClipper(trainer.strategy.model, rule), which acts in engine.step()."
            )
        self._optimizers = as_optimizers(trainer.optimizers)
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._loss = None
        self.clippers = [self._clipper(model, optimizer, place) for place, optimizer in enumerate(self._optimizers)]
        if self._resumed:
            if len(self._resumed) != len(self.clippers):
                raise ValueError(
                    f"the checkpoint holds the rules of {len(self._resumed)} optimizers, and configure_optimizers() "
                    f"gives {len(self.clippers)}"
                )
            for clipper, state in zip(self.clippers, self._resumed, strict=True):
                clipper.load_state_dict(state)
            self._resumed = []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Remember the loss, for rules that look at it. Lightning has divided it by the number of micro-batches."""
        if self._sees_loss:
            # Multiplied by the loss scale, where there is one.
            loss = loss.detach() / (1.0 if self._scaler is None else self._scaler.get_scale())
            self._loss = loss if self._loss is None else self._loss + loss

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Clip, under manual optimization."""
        if not pl_module.automatic_optimization:
            self._clip(trainer, pl_module, optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The rules' memory, for Lightning's checkpoint. The same on every rank."""
        states = [clipper.state_dict() for clipper in self.clippers] or self._resumed
        return {"clippers": states} if states else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called by Lightning before there are clippers."""
        self._resumed = state_dict["clippers"]

    def _clipper(self, model: Any, optimizer: Optimizer, place: int) -> GradClipper:
        # Without a scaler this step's hooks of the optimizer have run when we clip: it must not be left to them.
        stepping = None if self._scaler is None else optimizer
        part = part_of(model, optimizer)
        config = config_of_part(self._config, place)
        return config.clipper(part, optimizer=stepping, scaler=self._scaler, mesh=self._mesh)

    def _clip(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        (inner,) = as_optimizers(optimizer)
        place = next((place for place, known in enumerate(self._optimizers) if known is inner), None)
        if place is None:
            # (A StopIteration is for Lightning the end of the data.)
            raise RuntimeError(
                f"ClipCallback does not know this {type(inner).__name__}: it was put into trainer.optimizers after "
                "on_train_start(). Make all optimizers in configure_optimizers(), or add_param_group() to one of them."
            )
        # training_step() has returned None. (That, Lightning allows on one process only: nobody waits in a collective.)
        if trainer.world_size == 1 and all(param.grad is None for param in parameters_of([inner]).values()):
            return
        clipper = self.clippers[place]
        follow_optimizers(clipper)
        report = clipper.clip(self._loss)
        self._loss = None
        if clipper.steps % self._config.log_every == 0:
            prefix = self._config.log_prefix + (f"{place}/" if place else "")
            for name, value in report.metrics(prefix).items():
                pl_module.log(name, value, on_step=True, on_epoch=False)

    def _say_off(self, what: str) -> None:
        warn(f"{what} is off: {self._config.make_rule()!r} of distclip's ClipCallback holds instead. Leave it out.")


def _give_back(pl_module: Any) -> None:
    """The module's own hooks."""
    for name in _OFF:
        vars(pl_module).pop(name, None)
