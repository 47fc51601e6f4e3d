"""A two-layer LSTM that reads handwritten digits row by row: elements limited to 1, the norm held to 2, and neither.

1,500 digits of scikit-learn (8 rows of 8 pixels; no download) to learn from, the other 297 to test; 128 units in each
layer; batches of 100; SGD, learning rate 0.03, momentum 0.9. The loss is summed over a batch: a threshold means nothing
without the scale of the loss, and these two would hardly ever act on a mean.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import experiment  # first: it leads to what lies in launch/
from data import Digits
from models import RowLSTM
from picture import save_curves

RULES = {"none": "global_norm=inf", "value": "value=1.0", "norm": "global_norm=2.0"}
TRAINED, BATCH = 1500, 100


def task(epochs: int, seed: int) -> experiment.Task:
    """Classification of digits."""
    digits = Digits()
    images, targets = digits.images, digits.targets

    def batches() -> Iterator[experiment.Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for chosen in torch.randperm(TRAINED, generator=generator).split(BATCH):
                yield images[chosen], targets[chosen]

    def losses(logits: Tensor, targets: Tensor) -> Tensor:
        # The mean over the batch of this is the sum.
        return BATCH * cross_entropy(logits, targets, reduction="none")

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        """The share of test digits that are named right."""
        right = model(images[TRAINED:]).argmax(1) == targets[TRAINED:]
        return float(right.double().mean())

    return experiment.Task(
        model=lambda: RowLSTM(digits.row, digits.classes, layers=2),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.03, momentum=0.9),
        batches=batches,
        losses=losses,
        score=accuracy,
    )


def main() -> None:
    """Train, save, and show."""
    given = experiment.parse(__doc__.splitlines()[0], epochs=10)
    outcomes = experiment.train_all(task(given.epochs, given.seed), RULES, seed=given.seed, out=given.out)
    if outcomes:
        save_curves(outcomes, given.out / "digits.png", loss="cross-entropy of a batch", window=5)


if __name__ == "__main__":
    main()
