"""Trackers of experiments: Weights & Biases, MLflow, and whatever an Accelerator was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distclip.hints import optional
from distclip.record import Event, Record
from distclip.sinks.base import Sink


class Wandb(Sink):
    """Weights & Biases; alarms as alerts.

    Steps are those of the clipper, on an axis ``<prefix>clip_step`` of their own: W&B drops what comes for a step that
    is over, and the script may log by other steps. Each record moves W&B's own step on: a script that logs with
    ``step=`` would fall behind it, and should leave that out.

    Args:
        run: a run that the script started. None: the current one (``wandb.run``), or a new one made of ``settings``,
            which is then finished at the end.
        settings: of ``wandb.init``: ``project``, ``mode="offline"`` ...
    """

    def __init__(self, run: Any = None, **settings: Any) -> None:
        self._run, self._settings = run, settings
        self._own = False
        self._prefix = ""

    def start(self, run: Mapping[str, Any]) -> None:
        self._prefix = run["prefix"]
        if self._run is None:
            wandb = optional("wandb", "wandb")
            self._own = wandb.run is None
            self._run = wandb.run or wandb.init(**self._settings)
        axis = f"{self._prefix}clip_step"
        self._run.define_metric(axis, hidden=True)
        for name in ("grad_norm*", "clip_*", "clipped", "skipped", "nonfinite*"):
            self._run.define_metric(self._prefix + name, step_metric=axis)
        self._run.config.update({"distclip": {"rule": run["rule"], "version": run["version"]}}, allow_val_change=True)

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            self._run.log(record.prefixed(self._prefix) | {f"{self._prefix}clip_step": record.step})

    def event(self, event: Event) -> None:
        self._run.alert(title=f"distclip: {event.alarm}", text=f"step {event.step}: {event.message}")

    def close(self) -> None:
        if self._own:
            self._run.finish()


class MLflow(Sink):
    """MLflow; alarms as tags of the run.

    Args:
        run_id: of a run that the script started. None: the active one, or a new one made of ``settings``, which is then
            ended at the end.
        settings: of ``mlflow.start_run``: ``experiment_id``, ``run_name`` ...
    """

    def __init__(self, run_id: str | None = None, **settings: Any) -> None:
        self._run_id, self._settings = run_id, settings
        self._own = False
        self._prefix = ""
        self._client: Any = None

    def start(self, run: Mapping[str, Any]) -> None:
        mlflow = optional("mlflow", "mlflow")
        self._prefix = run["prefix"]
        self._client = mlflow.MlflowClient()
        if self._run_id is None:
            self._own = mlflow.active_run() is None
            active = mlflow.start_run(**self._settings) if self._own else mlflow.active_run()
            self._run_id = active.info.run_id
        try:
            self._client.log_param(self._run_id, "distclip_rule", run["rule"])
        except mlflow.exceptions.MlflowException:
            # A param can never change, as it does where a run resumes with another rule; and is shorter than a tag.
            self._client.set_tag(self._run_id, "distclip_rule", run["rule"][:5000])

    def write(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, int(record.time * 1000), record.step)
            for record in records
            for name, value in record.prefixed(self._prefix).items()
        ]
        # The most that a server takes at once.
        for first in range(0, len(metrics), 1000):
            self._client.log_batch(self._run_id, metrics[first : first + 1000])

    def event(self, event: Event) -> None:
        self._client.set_tag(self._run_id, f"distclip.{event.alarm}", f"step {event.step}: {event.message}")

    def close(self) -> None:
        if self._own:
            optional("mlflow", "mlflow").end_run()


class Tracker(Sink):
    """Whatever logs by ``log(values, step=step)``: an ``Accelerator`` with its trackers, one of these, a ``Fabric``.

    Args:
        target: it.
    """

    def __init__(self, target: Any) -> None:
        self._target = target
        self._prefix = ""

    def start(self, run: Mapping[str, Any]) -> None:
        self._prefix = run["prefix"]

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            self._target.log(record.prefixed(self._prefix), step=record.step)
