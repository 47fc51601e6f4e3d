"""Train with Accelerate, clipped by distclip, under any of the configurations beside this file. Copy from here.

    accelerate launch --config_file launch/accelerate/multi_cpu.yaml launch/accelerate/train.py

distclip takes two lines, which are the same under DDP, FSDP, tensor parallelism and DeepSpeed: a clipper after
accelerator.prepare(), and clip() after accelerator.backward(). How it clips say the environment or a file:

    DISTCLIP_RULE=zclip accelerate launch ...
    DISTCLIP_CONFIG=distclip.yaml accelerate launch ...
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import set_seed
from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # it ships no types
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from distclip.integrations.accelerate import AcceleratedClipper


class Block(nn.Module):
    """A residual layer; what the FSDP configurations wrap one by one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, stream: Tensor) -> Tensor:
        added: Tensor = self.down(nn.functional.gelu(self.up(self.norm(stream))))
        return stream + added


class Classifier(nn.Module):
    """Images [batch, 64] to logits [batch, 10]."""

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(64, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.embed(images)))
        return logits


class JsonLines(GeneralTracker):  # type: ignore[misc]  # Accelerate ships no types
    """One JSON object a line; for --log-with Accelerate's own trackers take its place."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    @property
    def tracker(self) -> Path:
        return self.file

    @on_main_process  # type: ignore[untyped-decorator]
    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        with self.file.open("a") as lines:
            lines.write(json.dumps({"step": step, **values}) + "\n")


class Progress:
    """Epochs done, as a checkpoint keeps them."""

    epochs = 0

    def state_dict(self) -> dict[str, int]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epochs = state["epochs"]


def cut(model: Classifier, mesh: DeviceMesh) -> None:
    """Tensor parallelism, which Accelerate leaves to the script; it asks for ``tp_size`` to know that it was done."""
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    model.tp_size = mesh.size()  # type: ignore[assignment]


def make_loader(batch: int) -> DataLoader[tuple[Tensor, ...]]:
    """1,797 handwritten digits that come with scikit-learn."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    examples = TensorDataset(images, torch.tensor(digits.target))
    return DataLoader(examples, batch_size=batch, shuffle=True, drop_last=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small classifier with Accelerate, clipped by distclip.")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32, help="examples of a micro-batch on each process")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"), help="for steps.jsonl and the checkpoint")
    parser.add_argument("--log-with", help="tensorboard, wandb, ...: a tracker of Accelerate in place of steps.jsonl")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    return parser.parse_args()


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = options.out / "steps.jsonl"
    if not options.resume:
        lines.unlink(missing_ok=True)
    set_seed(0)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else processes without a GPU would train each for itself
        gradient_accumulation_steps=options.accumulate,
        log_with=options.log_with or JsonLines(lines),
        project_dir=options.out,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    accelerator.init_trackers("logs")

    model = Classifier().to(accelerator.device)
    if accelerator.parallelism_config and accelerator.parallelism_config.tp_enabled:
        cut(model, accelerator.torch_device_mesh["tp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    model, optimizer, loader = accelerator.prepare(model, optimizer, make_loader(options.batch))
    clipper = AcceleratedClipper(accelerator, model, optimizer)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if options.resume:
        accelerator.load_state(options.out / "checkpoint")
    accelerator.print(
        f"{accelerator.distributed_type.value} on {accelerator.num_processes} processes, {clipper.config.make_rule()}"
    )

    for epoch in range(progress.epochs, options.epochs):
        loader.set_epoch(epoch)
        for images, targets in loader:
            with accelerator.accumulate(model):
                loss = cross_entropy(model(images), targets)
                accelerator.backward(loss)
                clipper.clip()
                optimizer.step()
                optimizer.zero_grad()
        progress.epochs = epoch + 1
        accelerator.save_state(options.out / "checkpoint")
        assert clipper.report is not None
        report = clipper.report.to_dict()
        accelerator.print(
            f"epoch {progress.epochs}: loss {loss.item():.4f}, gradient norm {report['total_norm']:.4f}, "
            f"times {report['coefficient']:.4f}"
        )
    accelerator.end_training()


if __name__ == "__main__":
    main()
