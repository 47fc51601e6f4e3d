"""Python blocks of README and docs/ run as they are written."""

import contextlib
import io
import os
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip
from tests.ranks import run_ranks
from tests.test_deepspeed import start_deepspeed

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# The others are scripts of their own, which tests/test_documents.py starts.
BLOCKS = [
    pytest.param(block, id=f"{document.stem}: {block.strip().splitlines()[-1][:40]}")
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for block in re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)
    if not block.startswith("# first_clip.py")
]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.experts = nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.experts(self.embed(tokens))
        return out


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    result: Tensor = model(batch).square().sum()
    return result


def setting() -> dict[str, Any]:
    """What the blocks take for granted, as a script around them would have it; every group is this one rank."""
    model = Model()
    loss(model, torch.tensor([1, 2])).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    groups = dict.fromkeys(("pp_group", "ep_group", "embedding_group"), dist.group.WORLD)
    names: dict[str, Any] = {"distclip": distclip, "torch": torch, "GradClipper": distclip.GradClipper}
    names |= {"loss": loss, "step": 0, "device": "cpu"}
    return names | groups | {"model": model, "stage": model, "optimizer": optimizer, "batches": [torch.tensor([3])]}


def logged(path: Path) -> dict[str, Any]:
    """A log, and somewhere to draw it."""
    from matplotlib.figure import Figure

    model = Model()
    clipper = distclip.GradClipper(model, 1.0)
    with distclip.Monitor(clipper, [path]):
        loss(model, torch.tensor([1, 2])).backward()
        clipper.clip()
    return {"axes": Figure().subplots()}


def frameworks(model: nn.Module) -> dict[str, Any]:
    """Trainers that have not begun."""
    from lightning.fabric import Fabric
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(output_dir=tempfile.mkdtemp(), use_cpu=True, report_to=[])
    return {"trainer": Trainer(model=model, args=arguments), "fabric": Fabric(accelerator="cpu", devices=1)}


def run(block: str) -> str:
    names = setting()
    if "deepspeed" in block:
        names["deepspeed"] = start_deepspeed()
        names["config"] = {
            "train_batch_size": 1,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
        }
    if "torchtitan" in block:
        names["torchtitan"] = SimpleNamespace(distributed=SimpleNamespace(utils=SimpleNamespace()))
    if "fabric.install" in block:
        names |= frameworks(names["model"])
    os.chdir(tempfile.mkdtemp())
    if "runs/mine.jsonl" in block:
        names |= logged(Path("runs/mine.jsonl"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(block, names)
        clipper = names.get("clipper")
        if clipper is not None and clipper.report is None:
            clipper.clip()
    return printed.getvalue()


@pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning")  # DeepSpeed's calls
@pytest.mark.filterwarnings("ignore:step 61. the gradient norm jumped to 78:UserWarning")  # a picture's bad labels
@pytest.mark.parametrize("block", BLOCKS)
def test_block(block: str) -> None:
    (printed,) = run_ranks(run, 1, block)
    if "report.to_dict()" in block:
        assert "'total_norm': " in printed
    if "distclip.audit(" in block:
        assert "No finding." in printed
    if "spikes.jsonl" in block:
        assert printed == "11 steps were clipped\n"
    if "except ValueError as error" in block:
        assert "max_norm" in printed


def test_settings_are_read(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(# distclip\.yaml.*?)```", README, re.DOTALL)
    (tmp_path / "distclip.yaml").write_text(block)
    config = distclip.ClipConfig.load(tmp_path / "distclip.yaml", environ={})
    assert str(config.make_rule()) == "head.* -> norm=0.5 ; * -> skip_above=100 | global_norm=1.0"
    assert (config.nonfinite, config.pipeline_group, config.sharded) == ("skip", "pp", {"experts.*": "ep"})


def test_every_block_was_found() -> None:
    documents = {str(block.id).partition(":")[0] for block in BLOCKS}
    assert documents >= {
        "README",
        "install",
        "first_clip",
        "which_layout",
        "choosing_a_rule",
        "reading_the_plots",
        "faq",
    }
    assert len(BLOCKS) >= 25
