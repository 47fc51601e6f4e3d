"""The two models of launch/train.py: an LSTM that reads images row by row, and a small character transformer."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from data import Data, Digits
from experts import Experts

#: Attention heads of the transformer.
HEADS = 4


class RowLSTM(nn.Module):
    """Many-to-one: the rows of an image go in one after another, the last hidden state names the digit."""

    def __init__(self, row: int, classes: int, *, hidden: int = 128, layers: int = 1) -> None:
        super().__init__()
        self.lstm = nn.LSTM(row, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [batch, rows, row] to logits [batch, classes]."""
        states, _ = self.lstm(images)
        logits: Tensor = self.head(states[:, -1])
        return logits


class Block(nn.Module):
    """One pre-norm transformer layer: causal attention, then a two-layer perceptron, each added to the stream."""

    def __init__(self, width: int, *, experts: int) -> None:
        super().__init__()
        self.head_width = width // HEADS
        self.attention_norm = nn.LayerNorm(width)
        # No bias: softmax ignores a bias of the keys, whose gradient would be nothing but rounding noise.
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width)
        self.perceptron_norm = nn.LayerNorm(width)
        several = [_perceptron(width) for _ in range(experts or 1)]
        self.perceptron = Experts(width, several) if experts else several[0]

    def forward(self, stream: Tensor) -> Tensor:
        """[batch, length, width] to the same shape."""
        stream = stream + self.attend(self.attention_norm(stream))
        added: Tensor = self.perceptron(self.perceptron_norm(stream))
        return stream + added

    def attend(self, normed: Tensor) -> Tensor:
        """Causal multi-head attention over the length axis."""
        # Head by head, not queries first: so, every part of a cut weight (tensor parallelism) is of whole heads.
        projected = self.queries_keys_values(normed).unflatten(-1, (-1, 3, self.head_width))
        queries, keys, values = projected.permute(3, 0, 2, 1, 4)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        attended: Tensor = self.attention_out(mixed.transpose(1, 2).flatten(-2))
        return attended


class Embedding(nn.Module):
    """Where the stream begins: a vector for the character, another for its position, added."""

    def __init__(self, classes: int, context: int, width: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(classes, width)
        self.positions = nn.Embedding(context, width)

    def forward(self, text: Tensor) -> Tensor:
        """Character numbers [batch, length] to [batch, length, width]."""
        stream: Tensor = self.characters(text) + self.positions(torch.arange(text.shape[1], device=text.device))
        return stream


def char_transformer(classes: int, context: int, *, experts: int, width: int = 64, depth: int = 2) -> nn.Sequential:
    """Character numbers [batch, length] to logits of the next character at every position, [batch, length, classes].

    A row of named layers, so that a pipeline's stage is a slice of it and FSDP can wrap each block.
    """
    layers = OrderedDict[str, nn.Module](embedding=Embedding(classes, context, width))
    for number in range(depth):
        layers[f"block{number}"] = Block(width, experts=experts)
    layers["prediction"] = nn.Sequential(OrderedDict(norm=nn.LayerNorm(width), head=nn.Linear(width, classes)))
    return nn.Sequential(layers).apply(_initialise)


def _perceptron(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def _initialise(module: nn.Module) -> None:
    """GPT-2's start: small weights everywhere, so that the first predictions are close to uniform."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


#: The parts that FSDP gathers one at a time.
BLOCKS: tuple[type[nn.Module], ...] = (Block, nn.LSTM)


def make_model(data: Data, *, experts: int) -> nn.Module:
    """The model that reads this kind of data; `experts` is the number in each block of a transformer, 0 for none."""
    if isinstance(data, Digits):
        return RowLSTM(data.row, data.classes)
    return char_transformer(data.classes, data.context, experts=experts)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, the mean over all predictions of either model."""
    return functional.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())
