"""Train a small model with clipped gradients, on one process or on many. Copy from here.

All that distclip asks of a training script stands in `Training`: a GradClipper, made once the model is wrapped, and one
call of clip() between backward() and optimizer.step(). It is the same for every --parallel, but for what a rank cannot
see by itself: `pipeline_group=` names the ranks of the other stages, `declare()` those of the other experts.
"""

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

try:
    import checkpoint
    import data
    import distclip
    import parallel
    import ranks
    import zero
    from arguments import make_rule, parse
    from comparison import Comparison, Run
    from models import make_model, mean_loss
    from options import Options
    from ranks import Job
    from run_log import RunLog
    from spread import make_optimizer
    from step import Step
except ModuleNotFoundError as missing:
    name = (missing.name or "").partition(".")[0]
    sys.exit(f"launch/train.py needs {name}: pip install 'distclip[train]'")


class Training:
    """The model, its optimizer and its clipper, and how they make one step."""

    def __init__(self, options: Options, examples: data.Data, job: Job) -> None:
        torch.manual_seed(options.seed)  # the same weights on every rank, however many there are
        self.options = options
        self.examples = examples
        self.job = job
        model = make_model(examples, experts=options.experts).to(job.device)
        way = parallel.WAYS[options.parallel]
        self.place = way.place(job.rank, job.world)
        self.spread = way.spread(model, job, options)
        self.model = self.spread.model
        self.engine = self.spread.engine
        self.optimizer = self.engine.optimizer if self.engine else make_optimizer(self.model, options)
        if self.spread.experts:
            distclip.declare(self.spread.experts, sharded=self.spread.expert_group)
        self.pipeline_group = self.spread.pipeline_group
        self.clipper = distclip.GradClipper(self.model, make_rule(options.rule), pipeline_group=self.pipeline_group)

    def step(self, number: int) -> Step:
        """Train on the global batch of step `number`. Every rank returns the same numbers."""
        started = time.perf_counter()
        loss = self.backward(number)
        report = self.update()
        return Step(
            step=number,
            loss=ranks.global_mean(loss, self.job),
            total_norm=report["total_norm"],
            clipped_norm=report.get("clipped_norm", math.nan),
            coefficient=report["coefficient"],
            threshold=report["threshold"],
            clipped=report["clipped"],
            nonfinite=report["nonfinite"],
            skipped=report["skipped"],
            lr=self.optimizer.param_groups[0]["lr"],
            seconds=time.perf_counter() - started,
        )

    def update(self) -> dict[str, Any]:
        """Clip, step, and forget the gradients. Returns what the clipper reports."""
        if self.engine:
            self.engine.step()  # clips by itself
            assert self.clipper.report is not None
            return self.clipper.report.to_dict()
        report = self.clipper.clip().to_dict()
        if "clipped_norm" not in report:
            # For the figure. After limiting elements only another read of the gradients can tell it.
            norm = distclip.grad_norm(self.model, pipeline_group=self.pipeline_group)
            report["clipped_norm"] = norm.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return report

    def backward(self, number: int) -> Tensor:
        """Leave the gradient of the global batch's mean loss in .grad; return the mean loss of this rank's share."""
        options = self.options
        batch = data.global_batch(self.examples, options.batch, seed=options.seed, step=number)
        part = parallel.share(batch, self.place, self.job.device)
        if self.spread.pipeline:
            with parallel.autocast(self.model, self.job, options.precision):
                return self.spread.pipeline.backward(part)
        total = torch.zeros((), device=self.job.device)
        for index, (inputs, targets) in enumerate(parallel.microbatches(part, options.accumulate)):
            with parallel.accumulating(self.model, last=index == options.accumulate - 1):
                with parallel.autocast(self.model, self.job, options.precision):
                    logits = self.model(inputs)
                # The wrapper averages over the ranks; this, over the micro-batches.
                loss = mean_loss(logits, targets) / options.accumulate
                if self.engine:
                    zero.backward(self.engine, loss, last=index == options.accumulate - 1)
                else:
                    loss.backward()
            total += loss.detach()
        return total


def train(options: Options, examples: data.Data, job: Job) -> Run:
    """Go through the steps, on all ranks alike. With --resume, start where the newest checkpoint stands."""
    training = Training(options, examples, job)
    state = training.model, training.optimizer, training.clipper
    after = checkpoint.load_newest(options.checkpoint, *state) if options.checkpoint and options.resume else 0
    steps: list[Step] = []
    with RunLog(options.out, after=after, total=options.steps) if job.rank == 0 else nullcontext() as log:
        for number in range(after + 1, options.steps + 1):
            steps.append(training.step(number))
            if log:
                log.write(steps[-1])
            if options.checkpoint and _save_due(options, number):
                checkpoint.save_step(options.checkpoint, number, *state)
    if log:
        # The threshold of these two is one for each tensor or element: it has no place beside the whole norm.
        each = isinstance(training.clipper.rule, distclip.ClipByNorm | distclip.ClipByValue)
        title = f"{options.model}, {options.parallel} on {_ranks(job.world)}, {options.rule}"
        log.finish(title, draw_threshold=not each)
    return steps, parallel.full_parameters(training.spread) if options.compare else {}


def train_alone(options: Options, examples: data.Data, job: Job) -> Run:
    """The same steps on this process alone, each on the whole batch at once; what --compare holds against the ranks."""
    training = Training(replace(options, parallel="single", accumulate=1), examples, replace(job, world=1))
    steps = [training.step(number) for number in range(1, options.steps + 1)]
    return steps, parallel.full_parameters(training.spread)


def main() -> int:
    """Train, show the run and, with --compare, check it. Returns the exit status."""
    options = parse()
    try:
        examples = data.load(options.data, options.text)
    except (OSError, ValueError) as mistake:
        sys.exit(f"--text {options.text}: {mistake}")
    job = ranks.start(options.parallel)
    here = train(options, examples, job)
    # Then the other ranks are done. Rank 0 compares without them, so that none waits so long that it times out.
    ranks.stop()
    if job.rank > 0 or not options.compare:
        return 0
    print(f"Training the same {options.steps} steps again on one process ...", flush=True)
    comparison = Comparison.between(here, train_alone(options, examples, job), precision=options.precision)
    print(comparison)
    return 0 if comparison.agrees else 1


def _save_due(options: Options, number: int) -> bool:
    return number == options.steps or (options.save_every is not None and number % options.save_every == 0)


def _ranks(world: int) -> str:
    return "1 rank" if world == 1 else f"{world} ranks"


if __name__ == "__main__":
    sys.exit(main())
