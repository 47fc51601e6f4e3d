"""What the experiments share: a model trained under one rule after another, on one process or under torchrun.

Under torchrun each rank reads its part of every batch, and DistributedDataParallel averages the gradients. What
clipping did comes from the JSON lines of distclip's Monitor.

One process alone reads every batch in two parts, one after the other, as two ranks do at the same time. So one process
and two ranks add the same numbers, and train to the same bits. That matters here: on the edge of stability training is
chaotic, and other roundings of the same sums would lead to other losses after some dozens of steps.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip.runs import Run, read_run
from distclip.summary import summary_of

sys.path.append(str(Path(__file__).parent.parent))

import ranks

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, and how: all but the rule."""

    model: Callable[[], nn.Module]
    optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
    batches: Callable[[], Iterable[Batch]]
    """Inputs and targets of every step, of all ranks together."""
    losses: Callable[[Tensor, Tensor], Tensor]
    """Outputs and targets to the loss of each example, [batch]."""
    score: Callable[[nn.Module], float]
    """How good the trained model is."""


@dataclass(frozen=True)
class Outcome:
    """One run."""

    run: Run
    score: float

    @property
    def died(self) -> int | None:
        """The first step whose loss or gradients were not finite; None where there is none."""
        for record in self.run.records:
            if record.is_set("nonfinite") or not math.isfinite(record.metrics["loss"]):
                return record.step
        return None

    def __str__(self) -> str:
        found = summary_of(self.run)
        end = f"not finite from step {self.died} on" if self.died else f"last loss {found.last_loss:.4g}"
        return (
            f"{found.name:<12} {found.rule:<18} {found.steps:>5} steps  largest norm {found.largest_norm:<9.3g} "
            f"clipped {found.clipped:>4.0%}  score {self.score:<7.4g} {end}"
        )


def parse(description: str, **numbers: int) -> argparse.Namespace:
    """The command line: an option for each of `numbers`, with its default, --seed and --out."""
    parser = argparse.ArgumentParser(description=description)
    for name, default in {**numbers, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help="default: %(default)s")
    out = Path("runs") / Path(sys.argv[0]).stem
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="for its files; default: %(default)s")
    given = parser.parse_args()
    for name in numbers:
        if getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)}: expected 1 or more")
    return given


def train_all(task: Task, rules: Mapping[str, str], *, seed: int, out: Path) -> list[Outcome]:
    """Train under every rule, and tell of it. Collective; the outcomes are rank 0's, the others return none."""
    torch.set_num_threads(1)  # so that sums are added in the same order, however many cores there are
    job = ranks.start("ddp" if "RANK" in os.environ else "single")
    outcomes = []
    for name, rule in rules.items():
        log = out / f"{name}.jsonl"
        if job.rank == 0:
            log.unlink(missing_ok=True)  # it would be added to
        model = train(task, rule, seed=seed, job=job, log=log)
        if job.rank == 0:
            outcomes.append(Outcome(read_run(log), task.score(model)))
            print(outcomes[-1], flush=True)
    ranks.stop()
    return outcomes


def train(task: Task, rule: str, *, seed: int, job: ranks.Job, log: Path) -> nn.Module:
    """One run, to the end or until the loss is NaN, from which nothing comes back. Returns the trained model."""
    torch.manual_seed(seed)  # the same weights on every rank
    model = task.model().to(job.device)
    trained = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = task.optimizer(trained.parameters())
    clipper = distclip.GradClipper(trained, distclip.rules.parse(rule))
    parts = max(2, job.world)
    with distclip.Monitor(clipper, [log], log_every=50) as monitor:
        for inputs, targets in task.batches():
            here = torch.zeros((), device=job.device)
            for part in range(job.rank, parts, job.world):
                outputs = trained(inputs[part::parts].to(job.device))
                losses = task.losses(outputs, targets[part::parts].to(job.device))
                # The mean over the ranks of all this is the batch's mean loss, however unequal the parts are.
                loss = losses.sum() * (job.world / len(inputs))
                loss.backward()
                here += loss.detach()
            report = clipper.clip()
            whole_loss = ranks.global_mean(here, job)
            if report.clipped_norm is None:
                # After single elements were limited, only another read of the gradients can tell.
                monitor.log(grad_norm_clipped=distclip.grad_norm(trained))
            monitor.log(loss=whole_loss)
            optimizer.step()
            optimizer.zero_grad()
            if math.isnan(whole_loss):
                break
    return model
