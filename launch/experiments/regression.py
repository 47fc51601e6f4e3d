"""The classic tutorial: regression on make_regression's targets explodes to NaN, unless every element is limited to 1.

1,000 examples of 20 features; 25 hidden ReLU units; batches of 128; SGD, learning rate 0.07, momentum 0.8; 50 epochs.
Targets of some hundreds make gradients as large, and the first steps throw the weights further out than the
next ones can bring them back.
"""

from collections.abc import Iterator

import torch
from sklearn.datasets import make_regression  # type: ignore[import-untyped]  # it ships no types
from torch import Tensor, nn

from experiment import Batch, Task, parse, train_all
from picture import save_curves

RULES = {"none": "global_norm=inf", "value": "value=1.0"}
BATCH = 128


def net() -> nn.Module:
    """20 features to one number; Glorot's weights and small biases, as in the tutorial."""
    layers = nn.Linear(20, 25), nn.Linear(25, 1)
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.constant_(layer.bias, 0.01)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared errors."""
    return (outputs - targets).square().squeeze(1)


def task(epochs: int, seed: int, rate: float = 0.07) -> Task:
    """Regression, at this learning rate."""
    x, y = make_regression(n_samples=1000, n_features=20, noise=0.1, random_state=1)
    # A column, as the outputs are: [128] next to [128, 1] would be compared pair by pair, and only the mean be learnt.
    inputs, targets = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)[:, None]

    def batches() -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for chosen in torch.randperm(len(inputs), generator=generator).split(BATCH):
                yield inputs[chosen], targets[chosen]

    @torch.no_grad()
    def explained(model: nn.Module) -> float:
        """The share of the targets' variance that is explained, R squared."""
        return 1 - (squares(model(inputs), targets).mean() / targets.var(correction=0)).item()

    return Task(
        model=net,
        optimizer=lambda params: torch.optim.SGD(params, lr=rate, momentum=0.8),
        batches=batches,
        losses=squares,
        score=explained,
    )


def main() -> None:
    """Train, save, and show."""
    given = parse(__doc__.splitlines()[0], epochs=50)
    outcomes = train_all(task(given.epochs, given.seed), RULES, seed=given.seed, out=given.out)
    if outcomes:
        save_curves(outcomes, given.out / "regression.png", loss="mean squared error", log_steps=True)


if __name__ == "__main__":
    main()
