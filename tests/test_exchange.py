"""launch/exchange.py: what one rank holds reaches all, whatever its dtype and shape."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.ranks import ranks


@ranks(2)
def test_everybody_has_everybody_s() -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "launch"))
    from exchange import exchanged

    rank = dist.get_rank()
    every = [
        # A byte before a float64, which must not lie at an odd address; a scalar; nothing; a name in another alphabet.
        {"odd": torch.tensor([True]), "wide": torch.tensor([[1e-300, 2.0]], dtype=torch.float64)},
        {"ß.weight": torch.arange(6.0).bfloat16().view(2, 3).T, "one": torch.tensor(3.0), "none": torch.empty(0, 4)},
    ]
    assert dist.group.WORLD is not None
    for mine, wanted in ((every, every), ([{}, every[1]], [{}, every[1]])):
        found = exchanged(mine[rank], dist.group.WORLD)
        assert [list(each) for each in found] == [list(each) for each in wanted]
        for here, there in zip(found, wanted, strict=True):
            for name, tensor in there.items():
                assert here[name].dtype == tensor.dtype
                assert torch.equal(here[name], tensor)
