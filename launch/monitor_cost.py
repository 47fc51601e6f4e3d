"""What watching costs: training steps with a Monitor next to steps without, in one process, in turns, as a ratio.

    python launch/monitor_cost.py

A ratio of 1.00 is none. The machine's noise is in the range.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

import distclip

ROUNDS, STEPS = 20, 30


def main() -> None:
    """Print a line for reports alone, and one for the norms of all tensors in every tenth step."""
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for details_every in (0, 10):
        with tempfile.TemporaryDirectory() as folder:
            plain = training_step(device)
            watched = training_step(device, Path(folder) / "run.jsonl", details_every)
            ratios = [seconds(watched) / seconds(plain) for _ in range(ROUNDS)]
        print(
            f"details_every={details_every}: a step with a Monitor takes {median(ratios):.3f} times as long as one "
            f"without ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def training_step(device: str, log: Path | None = None, details_every: int = 0) -> Callable[[], None]:
    """One step of a perceptron with 24 tensors and 0.8 million elements, clipped; and watched, if there is a log."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(256, 256), nn.Tanh()))).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    clipper = distclip.GradClipper(model, 1.0, details_every=details_every, check="never")
    monitor = None if log is None else distclip.Monitor(clipper, [log], alarms=())
    inputs = torch.randn(64, 256, device=device)

    def step() -> None:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        clipper.clip()
        optimizer.step()
        if monitor is not None:
            monitor.log(loss=loss)

    return step


def seconds(step: Callable[[], None]) -> float:
    """How long some steps take."""
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
