"""Train a small LSTM on handwritten digits with the Lightning Trainer, clipped by any rule of distclip. Copy from here.

All that distclip asks for is the `ClipCallback`. On one process, or on many:

    python launch/lightning_train.py --rule zclip
    torchrun --nproc-per-node 2 launch/lightning_train.py --strategy ddp
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.loggers import CSVLogger

    import data
    import models
    from distclip.integrations.lightning import ClipCallback
except ModuleNotFoundError as missing:
    name = (missing.name or "").partition(".")[0]
    sys.exit(f"launch/lightning_train.py needs {name}: pip install 'distclip[train,lightning]'")


class Digits(LightningModule):
    """Nothing in it is of distclip."""

    def __init__(self, examples: data.Digits) -> None:
        super().__init__()
        self.model = models.RowLSTM(examples.row, examples.classes)

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        """The mean loss of one batch."""
        images, targets = batch
        loss = models.mean_loss(self.model(images), targets)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


def main() -> None:
    """Train for some steps, and say where the metrics are."""
    parser = argparse.ArgumentParser(description="Train a small LSTM with the Lightning Trainer, clipped by distclip.")
    parser.add_argument("--rule", default="zclip", help="see print(distclip.rules.catalogue()); default: %(default)s")
    parser.add_argument("--steps", type=int, default=80, metavar="N", help="default: %(default)s")
    parser.add_argument("--strategy", default="auto", help="auto, ddp, on GPUs fsdp; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on from this checkpoint")
    options = parser.parse_args()

    examples = data.Digits()
    pairs: Any = torch.utils.data.TensorDataset(examples.images, examples.targets)
    logger = CSVLogger(options.out, name="")
    trainer = Trainer(
        callbacks=[ClipCallback(options.rule)],  # this line is distclip's
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        strategy=options.strategy,
        max_steps=options.steps,
        log_every_n_steps=1,
        logger=logger,
        default_root_dir=options.out,
        enable_model_summary=False,
    )
    batches: Any = torch.utils.data.DataLoader(pairs, batch_size=32 // trainer.world_size, shuffle=True)
    trainer.fit(Digits(examples), batches, ckpt_path=options.resume)
    if trainer.is_global_zero:
        print(f"Every step's loss, norm and coefficient: {logger.log_dir}/metrics.csv")


if __name__ == "__main__":
    main()
