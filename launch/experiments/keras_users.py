"""For users of Keras and TensorFlow: which rule of distclip does what their clipping does, and that it does.

Keras itself (its torch backend) trains the net of regression.py with each of its arguments; distclip trains it from the
same weights on the same batches, on any number of ranks. TensorFlow is not needed: what its functions do is compared as
their documentation says it, in NumPy and float64.

    pip install keras                 # Keras 3; without it only the functions of TensorFlow are compared
    python launch/experiments/keras_users.py
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import distclip
import regression
from experiment import Outcome, Task, parse, train_all
from picture import save_comparison
from tf_formulas import TENSORFLOW, Grads

#: Arguments of any Keras optimizer.
KERAS = {"clipvalue": "value=1.0", "clipnorm": "norm=1.0", "global_clipnorm": "global_norm=1.0"}

#: A seventh of that of regression.py, with which float32's roundings alone would part the losses within 80 steps.
LEARNING_RATE = 0.01


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    theirs: str
    text: str
    difference: float | None
    """The largest relative one; None where nobody could measure it."""
    against: str

    def __str__(self) -> str:
        measured = "not compared" if self.difference is None else f"{self.difference:.0e}"
        rule = repr(distclip.rules.parse(self.text))
        return f"| `{self.theirs}` | `{rule}` | `{self.text}` | {measured} | {self.against} |"


HEAD = "| TensorFlow, Keras | distclip | as text | difference | compared with |\n|---|---|---|---:|---|"


def train_with_keras(task: Task, argument: str, *, seed: int) -> list[float]:
    """The losses of all steps, by Keras's own training step."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = import_module("keras")
    torch.manual_seed(seed)
    first, _, last = regression.net().children()
    net = keras.Sequential([keras.Input((20,)), keras.layers.Dense(25, activation="relu"), keras.layers.Dense(1)])
    net.set_weights([array for layer in (first, last) for array in _as_keras(layer)])
    optimizer = keras.optimizers.SGD(LEARNING_RATE, momentum=0.8, **{argument: 1.0})
    net.compile(optimizer=optimizer, loss="mean_squared_error")
    losses = []
    for inputs, targets in task.batches():
        net.reset_metrics()  # else the loss is that of all batches so far
        losses.append(float(net.train_on_batch(inputs.numpy(), targets.numpy())))
    return losses


def _as_keras(layer: nn.Module) -> list[Any]:
    """Keras holds a matrix the other way round."""
    assert isinstance(layer, nn.Linear)
    return [layer.weight.detach().numpy().T, layer.bias.detach().numpy()]


def keras_rows(outcomes: Sequence[Outcome], losses: Mapping[str, Sequence[float]]) -> list[Row]:
    """How far the losses of Keras and of distclip are apart."""
    rows = []
    for outcome in outcomes:
        argument = outcome.run.name
        there = differences(outcome, losses[argument]) if argument in losses else None
        against = "Keras, the losses of all steps" if there else "Keras is not installed: pip install keras"
        rows.append(Row(f"SGD(..., {argument}=1.0)", KERAS[argument], max(there) if there else None, against))
    return rows


def differences(outcome: Outcome, losses: Sequence[float]) -> list[float]:
    """Relative, at every step."""
    pairs = zip(outcome.run.series("loss"), losses, strict=True)
    return [abs(ours - theirs) / theirs for ours, theirs in pairs]


def tensorflow_rows() -> list[Row]:
    """Every function on the same gradients as the rule."""
    random = np.random.default_rng(0)
    grads = [random.normal(size=shape) for shape in ((25, 20), (25,), (1, 25), (1,))]
    rows = []
    for function, (text, formula) in TENSORFLOW.items():
        pairs = zip(_clipped(text, grads), formula(grads), strict=True)
        apart = max(float(np.max(np.abs(ours - theirs) / np.abs(theirs))) for ours, theirs in pairs)
        rows.append(Row(function, text, apart, "its documented formula, NumPy in float64"))
    return rows


def _clipped(text: str, grads: Grads) -> Grads:
    params = nn.ParameterList([nn.Parameter(torch.zeros(grad.shape, dtype=torch.float64)) for grad in grads])
    for param, grad in zip(params, grads, strict=True):
        param.grad = torch.tensor(grad)
    distclip.GradClipper(params, distclip.rules.parse(text)).clip()
    return [param.grad.numpy() for param in params if param.grad is not None]


def main() -> None:
    """Train both, compare, and show."""
    given = parse(__doc__.splitlines()[0], epochs=10)
    task = regression.task(given.epochs, given.seed, rate=LEARNING_RATE)
    outcomes = train_all(task, KERAS, seed=given.seed, out=given.out)
    if not outcomes:
        return
    there = find_spec("keras") is not None
    losses = {argument: train_with_keras(task, argument, seed=given.seed) for argument in KERAS if there}
    save(outcomes, losses, given.out)


def save(outcomes: Sequence[Outcome], losses: Mapping[str, Sequence[float]], out: Path) -> None:
    """The table, printed too, and the picture."""
    table = "\n".join([HEAD, *map(str, keras_rows(outcomes, losses) + tensorflow_rows())])
    print(table)
    (out / "table.md").write_text(table + "\n")
    if losses:
        apart = {outcome.run.name: differences(outcome, losses[outcome.run.name]) for outcome in outcomes}
        save_comparison(outcomes, losses, apart, out / "keras_users.png")


if __name__ == "__main__":
    main()
