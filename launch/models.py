"""The two models of launch/train.py: an LSTM that reads images row by row, and a small character transformer."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from data import Data, Digits


class RowLSTM(nn.Module):
    """Many-to-one: the rows of an image go in one after another, the last hidden state names the digit."""

    def __init__(self, row: int, classes: int, *, hidden: int = 128) -> None:
        super().__init__()
        self.lstm = nn.LSTM(row, hidden, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [batch, rows, row] to logits [batch, classes]."""
        states, _ = self.lstm(images)
        logits: Tensor = self.head(states[:, -1])
        return logits


class Block(nn.Module):
    """One pre-norm transformer layer: causal attention, then a two-layer perceptron, each added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        # No bias: softmax ignores a bias of the keys, whose gradient would be nothing but rounding noise.
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width)
        self.perceptron_norm = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, stream: Tensor) -> Tensor:
        """[batch, length, width] to the same shape."""
        stream = stream + self.attend(self.attention_norm(stream))
        added: Tensor = self.perceptron(self.perceptron_norm(stream))
        return stream + added

    def attend(self, normed: Tensor) -> Tensor:
        """Causal multi-head attention over the length axis."""
        projected = self.queries_keys_values(normed).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = projected.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        attended: Tensor = self.attention_out(mixed.transpose(1, 2).flatten(-2))
        return attended


class CharTransformer(nn.Module):
    """Predicts the next character at every position; `blocks` is a list, so that FSDP can wrap each block."""

    def __init__(self, classes: int, context: int, *, width: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.characters = nn.Embedding(classes, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.apply(_initialise)

    def forward(self, text: Tensor) -> Tensor:
        """Character numbers [batch, length] to logits [batch, length, classes]."""
        stream = self.characters(text) + self.positions(torch.arange(text.shape[1], device=text.device))
        for block in self.blocks:
            stream = block(stream)
        logits: Tensor = self.head(self.norm(stream))
        return logits


def _initialise(module: nn.Module) -> None:
    """GPT-2's start: small weights everywhere, so that the first predictions are close to uniform."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


#: The parts that FSDP gathers one at a time.
BLOCKS: tuple[type[nn.Module], ...] = (Block, nn.LSTM)


def make_model(data: Data) -> nn.Module:
    """The model that reads this kind of data."""
    if isinstance(data, Digits):
        return RowLSTM(data.row, data.classes)
    return CharTransformer(data.classes, data.context)
