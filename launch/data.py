"""Real data that needs no download: scikit-learn's handwritten digits, and text that ships with Python."""

from pathlib import Path
from pydoc_data.topics import topics

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # it ships no types
from torch import Tensor

Batch = tuple[Tensor, Tensor]


class Digits:
    """1,797 handwritten digits: inputs [count, 8 rows, 8 pixels] from 0 to 1, targets [count]."""

    classes = 10
    row = 8

    def __init__(self) -> None:
        digits = load_digits()
        self.images = torch.tensor(digits.images, dtype=torch.float32) / 16
        self.targets = torch.tensor(digits.target)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """`count` random examples."""
        chosen = torch.randint(len(self.images), (count,), generator=generator)
        return self.images[chosen], self.targets[chosen]


class Text:
    """Windows of a text: inputs [count, context] are character numbers, targets the same windows one further on."""

    context = 64

    def __init__(self, text: str) -> None:
        if len(text) <= self.context:
            raise ValueError(f"it has {len(text)} characters, and one training window needs {self.context + 1}")
        vocabulary = sorted(set(text))
        numbers = {character: number for number, character in enumerate(vocabulary)}
        self.classes = len(vocabulary)
        self.characters = torch.tensor([numbers[character] for character in text])

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """`count` random windows."""
        starts = torch.randint(len(self.characters) - self.context, (count, 1), generator=generator)
        windows = self.characters[starts + torch.arange(self.context + 1)]
        return windows[:, :-1], windows[:, 1:]


Data = Digits | Text


def load(name: str, text: Path | None) -> Data:
    """The data that --data and --text name.

    Raises:
        OSError, ValueError: where `text` cannot be read or learnt from.
    """
    if name == "digits":
        return Digits()
    # The help topics inside every CPython are half a megabyte of English.
    return Text(text.read_text(encoding="utf-8") if text else "\n".join(topics[name] for name in sorted(topics)))


def global_batch(data: Data, size: int, *, seed: int, step: int) -> Batch:
    """The examples of one step, all ranks together.

    They depend on (seed, step) alone: 1, 2 and 4 ranks train on the same examples, which is what makes --compare
    meaningful, and a resumed run needs no position in the data but its step.
    """
    return data.draw(size, torch.Generator().manual_seed(1_000_003 * seed + step))
