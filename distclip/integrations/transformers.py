"""Clipping inside the Transformers ``Trainer``, and inside whatever is built on it.

``install(trainer, "zclip")`` puts distclip in the place of the trainer's own clipping. Not a callback for
``Trainer(callbacks=...)``: a callback is handed arguments, state and model, but never the trainer, and hears of a step
only after the trainer has clipped, measured the norm once more by ``accelerator.clip_grad_norm_(..., inf)`` and put it
into its log. Nor a mixin, which asks for a class of its own for each trainer (``Seq2SeqTrainer``, TRL's). What is
replaced is on the one trainer object, whatever its class:

===================================  ==============================================================================
``_clip_grad_norm, _get_grad_norm``  between the last backward of a step and ``optimizer.step()``: one clip, which
                                     also measures the ``grad_norm`` of the trainer's log
``training_step``                    the loss, only for rules that look at it
``log``                              what the trainer logs of its training gets the other metrics
``_save_optimizer_and_scheduler``    the clipper's state goes into ``checkpoint-N/distclip.pt``, beside the optimizer's
``_load_optimizer_and_scheduler``    and comes back with ``resume_from_checkpoint``
===================================  ==============================================================================

Under DeepSpeed the clipper acts inside ``engine.step()``, which the trainer reaches inside ``training_step``; the rest
is the same, but a rule cannot see the loss there.

``NEEDED`` lists these internals, and a trainer without them is refused. One whose loop comes by none of them (it steps
by itself) is noticed at the end of its first step, and an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distclip.clipper import GradClipper
from distclip.config import Clip, ClipConfig, as_config
from distclip.hints import optional
from distclip.layout.zero import is_engine
from distclip.warning import warn

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

TESTED = "5.23.0"
"""The version of Transformers that the tests run with."""

FILE = "distclip.pt"
"""What holds the clipper's state in a checkpoint's folder."""

NEEDED = (
    "_clip_grad_norm",
    "_get_grad_norm",
    "_load_optimizer_and_scheduler",
    "_save_optimizer_and_scheduler",
    "accelerator",
    "log",
    "model_wrapped",
    "training_step",
)
"""The attributes of a trainer that distclip reads or replaces."""

# Accelerate's names for where gradients are not yet reduced when the trainer clips, or not the model's own.
_REFUSED = ("MEGATRON_LM", "XLA")


def install(
    trainer: Trainer,
    clip: Clip | None = None,
    *,
    mesh: DeviceMesh | None = None,
) -> TrainerHooks:
    """Let a trainer clip by any rule, in place of its own clipping. Call it before ``trainer.train()``.

    ``max_grad_norm`` of its arguments is without effect from then on; a warning says so where it was set to something
    other than its default, 1.0. The rule has the ``model_wrapped`` of each ``train()`` (DDP, FSDP, a DeepSpeed engine),
    its gradients after accumulation, and the loss scale of ``fp16=True`` taken off.

    In the trainer's own log entries (``logging_steps``), and so in its history and trackers, ``grad_norm`` is the norm
    before clipping, and ``clip_coef``, ``grad_norm_clipped``, ``clip_threshold``, ``clipped``, ``skipped`` and
    ``nonfinite`` stand beside it; of the last step before the entry, as for the trainer's own. ``log_every=N`` leaves
    them out of entries whose step N does not divide. ``log_prefix`` stands before them, without a leading "train/",
    which the trainer's trackers write by themselves.

    Each ``train()`` begins with a rule that remembers nothing, and each ``train(resume_from_checkpoint=...)`` with what
    the checkpoint holds, under any number of ranks.

    Args:
        trainer: a ``transformers.Trainer``, or a subclass.
        clip: a ClipConfig, or only its rule; None reads ``DISTCLIP_CONFIG`` and the environment.
        mesh: whose axes ``pipeline_group``, ``sharded`` and ``replicated`` of the ClipConfig name.

    Returns:
        A handle: ``clipper``, the GradClipper of the running (or last) training, whose ``report`` is that of the last
        step, and ``remove()``, which gives the trainer its own clipping back.

    Raises:
        ImportError: Transformers is not installed.
        TypeError: ``trainer`` is no Trainer.
        RuntimeError: it has been installed already; the Trainer has other internals. In ``train()``: the trainer's own
            loop steps without coming by.
        NotImplementedError: Megatron-LM, XLA. In ``train()``, DeepSpeed: as ``GradClipper``.
        ValueError: a setting does not fit. In ``train()``: the checkpoint is of another rule.

    Example:
        trainer = Trainer(model=model, args=args, train_dataset=data)
        distclip.integrations.transformers.install(trainer, "zclip")
        trainer.train()
    """
    transformers = optional("transformers", "transformers")
    if not isinstance(trainer, transformers.Trainer):
        raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
    return TrainerHooks(trainer, as_config(clip), mesh)


class TrainerHooks:
    """What is replaced on one trainer until ``remove()``. Made by ``install``."""

    def __init__(self, trainer: Any, config: ClipConfig, mesh: DeviceMesh | None) -> None:
        if getattr(trainer, "_distclip_hooks", None) is not None:
            raise RuntimeError("distclip is installed on this trainer already: call remove() on the handle first")
        _check_known(trainer)
        self.clipper: GradClipper | None = None
        """That of the running or last ``train()``; None before the first."""
        self._trainer = trainer
        self._config = config
        self._mesh = mesh
        self._resumed: tuple[Path, dict[str, Any]] | None = None
        self._loss: Tensor | None = None
        self._steps = 0
        self._callback = _callback(self)
        self._own: dict[str, Any] = {}
        self._restore: list[Callable[[], None]] = []
        _warn_of_max_grad_norm(trainer.args, config)
        self._replace("_distclip_hooks", self)
        self._replace("_clip_grad_norm", self._clip)
        self._replace("_get_grad_norm", self._norm)
        self._replace("_load_optimizer_and_scheduler", self._load)
        self._replace("_save_optimizer_and_scheduler", self._save)
        self._replace("log", self._log)
        if any(stage.needs_loss for stage in config.make_rule().stages):
            self._replace("training_step", self._train)
        trainer.add_callback(self._callback)

    def remove(self) -> None:
        """Give the trainer its own clipping back."""
        for restore in self._restore:
            restore()
        self._restore = []
        self._trainer.remove_callback(self._callback)
        if self.clipper is not None:
            self.clipper.detach()

    def _replace(self, name: str, value: object) -> None:
        trainer = self._trainer
        self._own[name] = own = getattr(trainer, name, None)
        if name in vars(trainer):
            self._restore.append(lambda: setattr(trainer, name, own))
        else:
            self._restore.append(lambda: delattr(trainer, name))
        setattr(trainer, name, value)

    def _begin(self) -> None:
        """All is wrapped, and loaded from a checkpoint: make the clipper."""
        if self.clipper is not None:
            self.clipper.detach()
        model, optimizer = self._trainer.model_wrapped, self._trainer.optimizer
        # A DeepSpeed engine steps by itself. Else Accelerate's wrapper brings the scaler along.
        own = {} if is_engine(model) else {"optimizer": optimizer}
        self.clipper = self._config.clipper(model, mesh=self._mesh, **own)
        resumed, self._resumed = self._resumed, None
        # A train() that failed on its way may have left what it read.
        if resumed is not None and self._trainer.state.global_step > 0:
            file, state = resumed
            try:
                self.clipper.load_state_dict(state)
            except ValueError as error:
                raise ValueError(f"{file}: {error}. Delete this file to begin with a new rule.") from None
        self._steps, self._loss = self.clipper.steps, None

    def _clip(self, model: Any) -> Tensor:
        """In the place of the trainer's clipping; returns the norm before, which the trainer logs."""
        assert self.clipper is not None
        if not is_engine(model):
            self.clipper.clip(self._loss)
            self._loss = None
        assert self.clipper.report is not None
        return self.clipper.report.total_norm

    def _norm(self, model: Any, grad_norm: Tensor | None = None) -> Tensor:
        """The trainer asks for it after the clip; with ``max_grad_norm=0`` it asks for no clip."""
        return self._clip(model) if grad_norm is None else grad_norm

    def _train(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch. The trainer has divided its loss by their number."""
        loss: Tensor = self._own["training_step"](*args, **kwargs)
        self._loss = loss if self._loss is None else self._loss + loss
        return loss

    def _check_clipped(self) -> None:
        """A step is over."""
        if self.clipper is None or self.clipper.steps == self._steps:
            raise RuntimeError(
                f"{type(self._trainer).__name__} has made a step without Trainer._clip_grad_norm or _get_grad_norm, "
                "where distclip clips: its training loop is its own. Clip there, by distclip.GradClipper."
            )
        self._steps = self.clipper.steps

    def _log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        due = self._trainer.state.global_step % self._config.log_every == 0
        if "grad_norm" in logs and due and self.clipper is not None and self.clipper.report is not None:
            logs = logs | self.clipper.report.metrics(self._config.log_prefix.removeprefix("train/"))
        self._own["log"](logs, *args, **kwargs)

    def _save(self, output_dir: str) -> None:
        self._own["_save_optimizer_and_scheduler"](output_dir)
        if self._trainer.args.should_save and self.clipper is not None:
            torch.save(self.clipper.state_dict(), Path(output_dir) / FILE)

    def _load(self, checkpoint: str | None) -> None:
        self._own["_load_optimizer_and_scheduler"](checkpoint)
        if checkpoint is None:
            return
        file = Path(checkpoint) / FILE
        if file.is_file():
            self._resumed = file, torch.load(file, weights_only=True)
        else:
            warn(f"{checkpoint} has no {FILE}: the rule begins without memory, and its steps count from 0")


def _callback(hooks: TrainerHooks) -> TrainerCallback:
    from transformers import TrainerCallback

    class DistclipCallback(TrainerCallback):
        """Tells the hooks when training begins, and when a step is over."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            hooks._begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            hooks._check_clipped()

    return DistclipCallback()


def _warn_of_max_grad_norm(args: Any, config: ClipConfig) -> None:
    default = type(args).__dataclass_fields__["max_grad_norm"].default
    if args.max_grad_norm not in (0, None, default):
        warn(
            f"max_grad_norm={args.max_grad_norm} of the training arguments is off: {config.make_rule()!r} of distclip "
            "holds instead. Leave it out to be rid of this warning."
        )


def _check_known(trainer: Any) -> None:
    missing = [name for name in NEEDED if not hasattr(trainer, name)]
    if missing:
        version = getattr(sys.modules.get("transformers"), "__version__", "unknown")
        raise RuntimeError(
            f"transformers {version} has other internals than distclip knows: {type(trainer).__name__} lacks "
            f"{', '.join(missing)}. Install transformers=={TESTED}, or report this version to distclip."
        )
    kind = trainer.accelerator.distributed_type.value
    if kind in _REFUSED:
        raise NotImplementedError(f"distclip does not clip in a Trainer under {kind}")
