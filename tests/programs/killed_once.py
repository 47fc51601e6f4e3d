"""launch/train.py, but rank 1 is killed in one step of torchrun's first attempt; the next one resumes.

torchrun ... --max-restarts 1 tests/programs/killed_once.py STEP [arguments of launch/train.py]
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))

import train


def die_in(step: int) -> None:
    """Kill this process within the all-reduce of that step's clip."""
    begin = train.Training.update

    def update(self: train.Training) -> dict[str, Any]:
        if self.clipper.steps == step - 1:
            dist.all_reduce = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        return begin(self)

    train.Training.update = update  # type: ignore[method-assign]


if __name__ == "__main__":
    step = int(sys.argv.pop(1))
    if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        sys.argv.append("--resume")
    elif os.environ["RANK"] == "1":
        die_in(step)
    sys.exit(train.main())
