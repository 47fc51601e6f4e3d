"""README's Python blocks run as they are written."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def setting() -> dict[str, Any]:
    """What the blocks take for granted, as a script around them would have it."""
    import distclip

    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = model(batch).square().sum()
        return result

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [torch.ones(1, 3), torch.zeros(1, 3)]
    names = {"distclip": distclip, "GradClipper": distclip.GradClipper, "step": 0}
    return names | {"model": model, "loss": loss, "optimizer": optimizer, "batches": batches}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_block(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = setting()
    exec(block, names)
    clipper = names.get("clipper")
    if clipper is not None and clipper.report is None:
        clipper.clip()
    if "report.to_dict()" in block:
        assert "'total_norm': " in capsys.readouterr().out


def test_every_block_was_found() -> None:
    assert len(BLOCKS) >= 4
