"""A recurrent net whose gradients explode in time: clipped it learns the temporal order problem, else nothing.

The problem of Hochreiter and Schmidhuber (1997) as Pascanu, Mikolov and Bengio (2013, arXiv 1211.5063) pose it: of 50
symbols two matter, one near the beginning and one near the middle, and which of the four cases it is has to be said at
the end. A net of 50 tanh units, its recurrent weights orthogonal at first; batches of 32; SGD, learning rate 0.1.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from experiment import Batch, Task, parse, train_all
from picture import save_curves

RULES = {"none": "global_norm=inf", "norm": "global_norm=1.0"}
LENGTH, UNITS, BATCH = 50, 50, 32
#: The two symbols that matter, then the four that do not.
RELEVANT, DISTRACTING = 2, 4


class LastWord(nn.Module):
    """Reads a sequence of symbols, and names the case when it is over."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(RELEVANT + DISTRACTING, UNITS, batch_first=True)
        self.head = nn.Linear(UNITS, RELEVANT**2)
        weights = dict(self.rnn.named_parameters())
        nn.init.orthogonal_(weights["weight_hh_l0"])
        nn.init.zeros_(weights["bias_hh_l0"])
        nn.init.zeros_(weights["bias_ih_l0"])

    def forward(self, symbols: Tensor) -> Tensor:
        """One-hot symbols [batch, length, kinds] to logits [batch, cases]."""
        states, _ = self.rnn(symbols)
        logits: Tensor = self.head(states[:, -1])
        return logits


def sequences(count: int, generator: torch.Generator) -> Batch:
    """`count` random sequences and the case of each: the first symbol that matters, and the second."""
    symbols = RELEVANT + torch.randint(DISTRACTING, (count, LENGTH), generator=generator)
    pair = torch.randint(RELEVANT, (count, 2), generator=generator)
    tenth = LENGTH // 10
    for column, begin in enumerate((tenth, 4 * tenth)):
        place = begin + torch.randint(tenth, (count,), generator=generator)
        symbols[torch.arange(count), place] = pair[:, column]
    return one_hot(symbols, RELEVANT + DISTRACTING).float(), RELEVANT * pair[:, 0] + pair[:, 1]


def task(steps: int, seed: int) -> Task:
    """The temporal order problem."""

    def batches() -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield sequences(BATCH, generator)

    def losses(logits: Tensor, cases: Tensor) -> Tensor:
        return cross_entropy(logits, cases, reduction="none")

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        """The share of 1,000 new sequences that are named right; guessing has a quarter."""
        symbols, cases = sequences(1000, torch.Generator().manual_seed(seed + 1_000_003))
        return float((model(symbols).argmax(1) == cases).double().mean())

    return Task(
        model=LastWord,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        batches=batches,
        losses=losses,
        score=accuracy,
    )


def main() -> None:
    """Train, save, and show."""
    given = parse(__doc__.splitlines()[0], steps=1000)
    outcomes = train_all(task(given.steps, given.seed), RULES, seed=given.seed, out=given.out)
    if outcomes:
        save_curves(outcomes, given.out / "long_sequences.png", loss="cross-entropy", window=20)


if __name__ == "__main__":
    main()
