"""A small network with what trips clipping up: odd sizes, tied and frozen weights, tensors smaller than the job."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block. 7 x 5 and 5 x 7 matrices are cut unevenly by 2 and by 4 ranks."""

    def __init__(self, hidden: int = 7) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5)
        self.up = nn.Linear(5, hidden)
        self.down = nn.Linear(hidden, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(self.norm(x))))
        return x + out


class Net(nn.Module):
    """Token classifier over 11 symbols; `head` is tied to `embed`, `scale` has one element, `frozen` no gradient."""

    def __init__(self, hidden: int = 7) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(2))
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.full((1,), 1.5))
        self.frozen = nn.Linear(5, 5).requires_grad_(False)

    @property
    def first(self) -> Block:
        block = self.blocks[0]
        assert isinstance(block, Block)
        return block

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.frozen(x) + x) * self.scale
        return out


def make_net(hidden: int = 7) -> Net:
    """The same network on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(hidden)


def make_batch(size: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Token sequences and their targets; rank r of w takes rows r, r + w ..."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (size, 6), generator=generator)
    return tokens, torch.randint(11, (size, 6), generator=generator)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    tokens, targets = batch
    logits: Tensor = model(tokens)
    # Large enough that every norm exceeds the thresholds that tests clip at.
    return 10.0 * nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
