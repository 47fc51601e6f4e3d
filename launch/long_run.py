"""Does anything grow, slow down or drift apart in a long run? Thousands of small steps under FSDP2, watched.

    NPROC=2 SCRIPT=launch/long_run.py launch/torchrun.sh
    NPROC=2 SCRIPT=launch/long_run.py launch/torchrun.sh --without-distclip

A clipper with an adaptive rule, a Monitor that logs every step, and checkpoints with the clipper's state. Fails where a
rank's memory grew after the warm-up, where objects stayed, or where ranks differ in a bit. The second command is the
same loop with torch's clipping, to tell what torch itself leaves behind.
"""

import argparse
import hashlib
import json
import sys
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import distclip
import ranks
from exchange import exchanged
from windows import Drift, Watch, read_windows

WIDTH, BATCH = 16, 8
#: Every so many steps the loss is multiplied, so that the rule has something to clip.
SPIKE_EVERY, SPIKE = 97, 30.0
#: Clips of an old and of a new clipper, at most.
ROUNDS = 200


class LongRun:
    """The model of this rank, what trains it, what clips it, and a digest of all that ranks must agree on."""

    def __init__(self, options: argparse.Namespace, job: ranks.Job) -> None:
        self.options, self.job = options, job
        self.device = job.device
        torch.manual_seed(0)  # the same weights on every rank
        self.model = make_model().to(job.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, foreach=False)
        self.clipper: distclip.GradClipper | None = None
        self.monitor: distclip.Monitor | None = None
        if not options.without_distclip:
            self.clipper = distclip.GradClipper(self.model, distclip.ZClip())
            self.monitor = distclip.Monitor(self.clipper, [options.out / "steps.jsonl"], alarms=())
        self.watch = Watch(windows_of(options.out, job.rank), options.window)
        self.digest = hashlib.sha256()
        self.told: list[Tensor] = []

    def run(self) -> None:
        """All steps."""
        for step in range(1, self.options.steps + 1):
            with self.watch.step():
                self.step(step)
            if step % self.options.save_every == 0:
                self.save(step)
            if step % self.options.window == 0:
                self.end_window(step)
        if self.monitor is not None:
            self.monitor.close()
        self.add(*(each.full_tensor() for each in self.model.parameters() if isinstance(each, DTensor)))
        if self.clipper is not None:
            self.digest.update(json.dumps(self.clipper.state_dict(), default=Tensor.tolist).encode())

    def step(self, number: int) -> None:
        """Train on one batch."""
        self.clip(self.backward(number))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def backward(self, number: int) -> Tensor:
        """Leave the gradients of a batch, of which every rank has its own; the loss."""
        inputs, targets = batch_of(number, self.job)
        loss = nn.functional.mse_loss(self.model(inputs), targets)
        (loss * SPIKE if number % SPIKE_EVERY == 0 else loss).backward()
        return loss.detach()

    def clip(self, loss: Tensor) -> None:
        """Clip, log, and keep what the other ranks must have to the bit."""
        if self.clipper is None or self.monitor is None:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.told.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
            return
        report = self.clipper.clip()
        self.monitor.log(loss=loss)
        self.told += [report.total_norm, report.coefficient, report.threshold]

    def save(self, step: int) -> None:
        """A checkpoint of all that a run needs to go on."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        if self.clipper is not None:
            state["clipper"] = self.clipper
        save(state, checkpoint_id=self.options.out / "checkpoints" / f"step-{step:08d}")

    def end_window(self, step: int) -> None:
        """Let go of what waits to be read, and see what is still held."""
        self.add(*self.told)
        self.told.clear()
        if self.monitor is not None:
            self.monitor.flush()
        self.watch.end_window(step)

    def age(self) -> float:
        """How long a clip takes, as a multiple of a new clipper's: in turns, so that a busy machine slows both."""
        assert self.clipper is not None
        clippers = self.clipper, distclip.GradClipper(self.model, distclip.ZClip())
        seconds: tuple[list[float], list[float]] = [], []
        for number in range(2 * min(ROUNDS, self.options.steps)):
            self.backward(number)
            dist.barrier()  # nobody waits for the other's backward
            started = time.perf_counter()
            clippers[number % 2].clip()
            seconds[number % 2].append(time.perf_counter() - started)
            self.optimizer.zero_grad()
        old, new = map(median, seconds)
        return old / new

    def add(self, *tensors: Tensor) -> None:
        """Let the digest be one of these, too."""
        for tensor in tensors:
            self.digest.update(json.dumps(tensor.double().tolist()).encode())


def make_model() -> nn.Sequential:
    """A perceptron of a thousand parameters, cut over all ranks."""
    model = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, 1))
    fully_shard(model[0])
    fully_shard(model)
    return model


def batch_of(step: int, job: ranks.Job) -> tuple[Tensor, Tensor]:
    """This rank's examples of a step: points, and the sine of their sum with some noise."""
    generator = torch.Generator().manual_seed(step * job.world + job.rank)
    inputs = torch.randn(BATCH, WIDTH, generator=generator)
    targets = inputs.sum(1, keepdim=True).sin() + 0.1 * torch.randn(BATCH, 1, generator=generator)
    return inputs.to(job.device), targets.to(job.device)


def windows_of(out: Path, rank: int) -> Path:
    """Where a rank writes what it held."""
    return out / f"windows-{rank}.jsonl"


def judge(out: Path, warm_up: int, digests: list[str]) -> bool:
    """Tell what became of every rank; whether nothing grew and all have the same bits."""
    sound = True
    for rank in range(len(digests)):
        drift = Drift.over(read_windows(windows_of(out, rank)), warm_up)
        print(f"rank {rank}, {drift.steps} steps after the warm-up: {drift}")
        for growth in drift.growth():
            print(f"rank {rank} GREW: {growth}")
            sound = False
    if len(set(digests)) == 1:
        print(f"ranks are equal to the bit: {digests[0][:16]}")
    else:
        print(f"ranks DIFFER: {', '.join(digest[:16] for digest in digests)}")
        sound = False
    return sound


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Thousands of small clipped steps, and what they leave behind.")
    parser.add_argument("--steps", type=int, default=20_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--window", type=int, default=500, metavar="N", help="look every N steps; default: %(default)s")
    parser.add_argument(
        "--warm-up", type=int, default=4_000, metavar="N", help="compare with the look at step N; default: %(default)s"
    )
    parser.add_argument(
        "--save-every", type=int, default=2_000, metavar="N", help="steps from checkpoint to checkpoint; %(default)s"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/long"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--without-distclip", action="store_true", help="clip by torch, for comparison")
    options = parser.parse_args()
    for name in ("window", "save_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: expected 1 or more")
    # The looks at and after the warm-up: with one alone there is nothing to compare.
    first = max(1, -(-options.warm_up // options.window))
    if options.steps // options.window <= first:
        parser.error(
            f"--warm-up {options.warm_up}: after step {first * options.window}, the first look from there on, "
            f"--steps {options.steps} leaves no other --window of {options.window}"
        )
    return options


def main() -> int:
    """Run, and on rank 0 tell. Returns the exit status."""
    options = parse()
    # torch 2.13 says so of every Linear on the CPU. Nothing here writes into their outputs.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    job = ranks.start("fsdp2")
    run = LongRun(options, job)
    run.run()
    digest = torch.frombuffer(bytearray(run.digest.digest()), dtype=torch.uint8)
    digests = [bytes(told["digest"].tolist()).hex() for told in exchanged({"digest": digest})]
    age = None if options.without_distclip else run.age()
    ranks.stop()
    if job.rank > 0:
        return 0
    if age is not None:
        print(f"a clip after {options.steps} steps takes {age:.2f} times as long as that of a new clipper")
    return 0 if judge(options.out, options.warm_up, digests) else 1


if __name__ == "__main__":
    sys.exit(main())
