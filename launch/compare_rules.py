"""Train with every clipping rule, at a learning rate where training without clipping diverges: a picture and a table.

Each run is that of launch/train.py on one process, and only the rule differs. The same seed gives the same numbers.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

try:
    from rich.console import Console

    import arguments
    import data
    import ranks
    from curves import save_curves
    from rule_run import RuleRun, markdown, table
    from step import Step
    from train import Training
except ModuleNotFoundError as missing:
    name = (missing.name or "").partition(".")[0]
    sys.exit(f"launch/compare_rules.py needs {name}: pip install 'distclip[train]'")

#: SGD with momentum diverges here without clipping, and trains where the norm of the gradients is held to 0.3.
LEARNING_RATE = {"lstm": 2.0, "transformer": 1.0}

#: Every rule, at thresholds that suit both models. What does not limit the norm enough by itself is chained.
RULES = (
    "none",
    "global_norm=0.3",
    "value=0.003",
    "norm=0.05",
    "average_norm=1e-5",
    "block_rms=0.001",
    "agc=0.01",
    "normalize=0.1",
    "centralize | global_norm=0.3",
    "autoclip=10 | global_norm=0.3",
    "quantile=0.5,window=50,factor=0.2",
    "zclip,z_thresh=0.5,clip_factor=0.3,max_norm=0.5",
    "adagc,lambda_abs=0.1,warmup_steps=20",
    "ema_ratio=1.05,beta=0.98",
    "stable_spam | global_norm=0.3",
    "skip_above=3.5 | global_norm=0.3",
    "skip_on_spike,sigma=3,min_history=20 | global_norm=0.3",
    "*head* -> norm=0.05 ; * -> global_norm=0.3",
)


def train(model: str, rule: str, given: argparse.Namespace) -> RuleRun:
    """Train `model` with `rule`, to the end or until the loss is NaN, from which nothing comes back."""
    rate = LEARNING_RATE[model] if given.lr is None else given.lr
    wanted = {"--model": model, "--rule": rule, "--lr": rate, "--steps": given.steps, "--seed": given.seed}
    options = arguments.parse([f"{name}={value}" for name, value in wanted.items()])
    training = Training(options, data.load(options.data, options.text), ranks.start(options.parallel))
    done: list[Step] = []
    for number in range(1, given.steps + 1):
        done.append(training.step(number))
        if math.isnan(done[-1].loss):
            break
    return RuleRun(model, rule, done)


def train_all(given: argparse.Namespace) -> list[RuleRun]:
    """Every model with every rule, one after another."""
    runs = []
    for model in dict.fromkeys(given.models):
        for rule in dict.fromkeys(given.rules):
            started = time.perf_counter()
            run = train(model, rule, given)
            runs.append(run)
            seconds = time.perf_counter() - started
            print(f"{model}, {rule}: loss {run.final_loss:.4g} after {seconds:.1f} s", flush=True)
    return runs


def save(runs: Sequence[RuleRun], out: Path) -> None:
    """Write all steps, the table and the picture into the directory `out`, and print the table."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "steps.jsonl").write_text("".join(f"{line}\n" for run in runs for line in run.json_lines()))
    (out / "table.md").write_text(markdown(runs))
    save_curves(runs, out / "curves.png")
    # A file or a pipe has no width of its own; rich would take 80 columns.
    Console(width=None if sys.stdout.isatty() else 140).print(table(runs))
    print("files:", *(out / name for name in ("curves.png", "table.md", "steps.jsonl")))


def parse() -> argparse.Namespace:
    """The command line; a mistake, an unknown rule too, ends the program before anything is trained."""
    parser = argparse.ArgumentParser(
        description="Train with every clipping rule, at a learning rate where training without clipping diverges."
    )
    models = list(arguments.DATA)
    parser.add_argument("--models", nargs="+", choices=models, default=models, metavar="MODEL", help="default: all")
    parser.add_argument(
        "--rules",
        nargs="+",
        default=RULES,
        metavar="RULE",
        help="as --rule of launch/train.py, each in quotes; default: " + " ".join(f'"{rule}"' for rule in RULES),
    )
    parser.add_argument("--steps", type=int, default=150, metavar="N", help="of each run; default: %(default)s")
    rates = ", ".join(f"{rate:g} for {model}" for model, rate in LEARNING_RATE.items())
    parser.add_argument("--lr", type=float, metavar="RATE", help=f"learning rate (default: {rates})")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and data; default: %(default)s")
    out = Path("runs/compare-rules")
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="for its files; default: %(default)s")
    given = parser.parse_args()
    try:
        if given.steps < 1:
            raise ValueError(f"--steps {given.steps}: expected 1 or more")
        for rule in given.rules:
            arguments.make_rule(rule)
    except ValueError as mistake:
        parser.error(str(mistake))
    return given


def main() -> None:
    """Train, save, and show."""
    given = parse()
    torch.set_num_threads(1)  # so that sums are added in the same order, however many cores there are
    save(train_all(given), given.out)


if __name__ == "__main__":
    main()
