"""Checkpoints with torch.distributed.checkpoint: every rank writes its own shards, and any number of ranks reads them.

What a run needs to go on as if it had never stopped: the model, the optimizer, the clipper (adaptive rules have a
history) and the step. The models draw no random numbers and the data follow from the step, so there is no generator.
"""

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

import zero
from distclip import GradClipper

#: The optimizer's settings for each parameter under its name. In a list, where parameters have numbers, those of two
#: pipeline stages would overwrite each other.
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


def save_step(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, clipper: GradClipper) -> None:
    """Write folder/step-N. All ranks must call."""
    path = folder / f"step-{step:08d}"
    if zero.is_engine(model):
        zero.save(model, path, {"clipper": clipper.state_dict()})
        return
    state = _state(model, optimizer, clipper)
    save(state, checkpoint_id=path, no_dist=not dist.is_initialized())


def load_newest(folder: Path, model: nn.Module, optimizer: Optimizer, clipper: GradClipper) -> int:
    """Read the newest checkpoint of `folder` into all three and return its step. All ranks must call."""
    step, newest = find_newest(folder)
    if zero.is_engine(model):
        clipper.load_state_dict(zero.load(model, newest)["clipper"])
        return step
    state = _state(model, optimizer, clipper)
    load(state, checkpoint_id=newest, no_dist=not dist.is_initialized())
    parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    set_state_dict(model, optimizer, **parts, options=OPTIONS)
    clipper.load_state_dict(state["clipper"])
    return step


def find_newest(folder: Path) -> tuple[int, Path]:
    """The highest step of which `folder` has a checkpoint, and where. Raises ValueError where there is none."""
    # These are written last: without them, the save was cut off.
    complete = [file.parent for name in (".metadata", zero.COMPLETE) for file in folder.glob(f"step-*/{name}")]
    if not complete:
        raise ValueError(f"--resume: no complete checkpoint in --checkpoint {folder}")
    return max((int(path.name.removeprefix("step-")), path) for path in complete)


def _state(model: nn.Module, optimizer: Optimizer, clipper: GradClipper) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer, options=OPTIONS)
    return {"model": model_state, "optimizer": optimizer_state, "clipper": clipper.state_dict()}
