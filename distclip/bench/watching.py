"""What watching costs: training steps with a Monitor next to steps without, in turns, in one process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn

import distclip
from distclip.bench.rounds import ratios, timed


@dataclass(frozen=True)
class Watching:
    """How many times as long a step with a Monitor takes as one without."""

    details_every: int
    """In every so many steps the norms of all tensors are measured too; 0 for none."""
    device: str
    threads: int
    rounds: int
    steps: int
    """In a round."""
    ratio: float
    """The median of the rounds' ratios."""
    ratio_lowest: float
    ratio_highest: float
    step_seconds: float
    """Of a step without; the median."""

    def __str__(self) -> str:
        return (
            f"details_every={self.details_every}: a step with a Monitor takes {self.ratio:.3f} times as long as one "
            f"without ({self.ratio_lowest:.2f} to {self.ratio_highest:.2f}; {self.step_seconds * 1e3:.3g} ms on the "
            f"{self.device.replace('cuda', 'GPU').replace('cpu', 'CPU')}, threads: {self.threads})"
        )


def watching(*, rounds: int = 20, steps: int = 30, device: str = "cpu", threads: int = 1) -> list[Watching]:
    """Measure it for reports alone, and with the norms of all tensors in every tenth step.

    Args:
        rounds: how often steps with and steps without run.
        steps: how many each time.
        device: "cpu" or "cuda".
        threads: of the CPU.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return [_watching(details_every, rounds, steps, device) for details_every in (0, 10)]
    finally:
        torch.set_num_threads(before)


def _watching(details_every: int, rounds: int, steps: int, device: str) -> Watching:
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "plain": _steps(steps, device),
            "watched": _steps(steps, device, Path(folder) / "run.jsonl", details_every),
        }
        for way in ways.values():
            way()
        times = timed(ways, rounds)
    found = ratios(times, "watched", "plain")
    each = median(times["plain"]) / steps
    threads = torch.get_num_threads()
    return Watching(details_every, device, threads, rounds, steps, median(found), min(found), max(found), each)


def _steps(count: int, device: str, log: Path | None = None, details_every: int = 0) -> Callable[[], None]:
    """Steps of a perceptron with 24 tensors and 0.8 million elements, clipped; and watched, if there is a log."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(256, 256), nn.Tanh()))).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    clipper = distclip.GradClipper(model, 1.0, details_every=details_every, check="never")
    monitor = None if log is None else distclip.Monitor(clipper, [log], alarms=())
    inputs = torch.randn(64, 256, device=device)

    def run() -> None:
        for _ in range(count):
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            clipper.clip()
            optimizer.step()
            if monitor is not None:
                monitor.log(loss=loss)
        if device == "cuda":
            torch.cuda.synchronize()

    return run
