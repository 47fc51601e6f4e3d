"""Train a small LSTM on handwritten digits with Lightning Fabric, clipped by any rule of distclip. Copy from here.

All that distclip asks for is `install`, and one `fabric.clip_gradients(model, optimizer)`. On one process, or on many:

    python launch/fabric_train.py --rule zclip
    torchrun --nproc-per-node 2 launch/fabric_train.py --strategy ddp
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

try:
    from lightning.fabric import Fabric
    from lightning.fabric.loggers.csv_logs import CSVLogger

    import data
    import models
    from distclip.integrations.fabric import install
except ModuleNotFoundError as missing:
    name = (missing.name or "").partition(".")[0]
    sys.exit(f"launch/fabric_train.py needs {name}: pip install 'distclip[train,lightning]'")


def main() -> None:
    """Train for some steps, leave a checkpoint, and say where the metrics are."""
    parser = argparse.ArgumentParser(description="Train a small LSTM with Lightning Fabric, clipped by distclip.")
    parser.add_argument("--rule", default="zclip", help="see print(distclip.rules.catalogue()); default: %(default)s")
    parser.add_argument("--steps", type=int, default=80, metavar="N", help="default: %(default)s")
    parser.add_argument("--strategy", default="auto", help="auto, ddp, on GPUs fsdp; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/fabric"), metavar="DIR", help="default: %(default)s")
    options = parser.parse_args()

    logger = CSVLogger(options.out, name="", flush_logs_every_n_steps=1)
    world = int(os.environ.get("WORLD_SIZE", 1))
    fabric = Fabric(devices=world, strategy=options.strategy, loggers=logger)
    fabric.launch()
    torch.manual_seed(0)
    examples = data.Digits()
    model = fabric.setup_module(models.RowLSTM(examples.row, examples.classes))
    optimizer: Any = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9))
    clip = install(fabric, options.rule)  # distclip's, from here on

    for step in range(options.steps):
        images, targets = data.global_batch(examples, 32, seed=0, step=step)
        mine = slice(fabric.global_rank, None, fabric.world_size)
        loss = models.mean_loss(model(fabric.to_device(images[mine])), fabric.to_device(targets[mine]))
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer)  # and logs what it did
        optimizer.step()
        optimizer.zero_grad()

    fabric.save(options.out / "checkpoint.ckpt", {"model": model, "optimizer": optimizer, "clip": clip})
    fabric.print(f"Every step's norm and coefficient: {logger.log_dir}/metrics.csv")


if __name__ == "__main__":
    main()
