"""The arguments of launch/train.py, checked before any process group is made."""

import argparse
import os
import re
from pathlib import Path

import distclip
from checkpoint import find_newest
from options import Options
from parallel import WAYS

#: The data that each model reads.
DATA = {"lstm": "digits", "transformer": "text"}
#: High enough that clipping at 1 shows, low enough that rounding errors don't grow into differences for --compare.
LEARNING_RATE = {"lstm": 0.5, "transformer": 0.2}
LEARNING_RATE_WITH_EXPERTS = 0.1
#: For --parallel ep: enough for one, two or four ranks.
EXPERTS = 4

EXAMPLES = """\
examples:
  python launch/train.py
  torchrun --nproc-per-node 2 launch/train.py --parallel fsdp2 --compare
  torchrun --nproc-per-node 4 launch/train.py --parallel hsdp --model transformer --rule norm=0.5
  torchrun --nproc-per-node 4 launch/train.py --parallel fsdp2+tp --model transformer --compare
"""


def parse(arguments: list[str] | None = None) -> Options:
    """The command line as Options; a mistake ends the program with a line that says what to change."""
    parser = argparse.ArgumentParser(
        description="Train a small model with clipped gradients, on one process or on many.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_task(parser.add_argument_group("what to train"))
    _add_training(parser.add_argument_group("how to train"))
    _add_files(parser.add_argument_group("files and checks"))
    options = _fill_in(parser.parse_args(arguments))
    try:
        _check(options, world=int(os.environ.get("WORLD_SIZE", 1)))
    except ValueError as mistake:
        parser.error(str(mistake))
    return options


def make_rule(text: str) -> distclip.Rule:
    """A fresh rule as --rule names it; "none" measures the norm and changes nothing."""
    try:
        return distclip.rules.parse("global_norm=inf" if text == "none" else text)
    except ValueError as mistake:
        raise ValueError(f"--rule {text}: {mistake}") from mistake


def _fill_in(given: argparse.Namespace) -> Options:
    if given.data is None:
        given.data = DATA[given.model]
    if given.experts is None:
        given.experts = EXPERTS if given.parallel == "ep" else 0
    if given.lr is None:
        given.lr = LEARNING_RATE_WITH_EXPERTS if given.experts else LEARNING_RATE[given.model]
    if given.out is None:
        given.out = Path("runs") / re.sub(r"[^\w.]+", "-", f"{given.model}-{given.parallel}-{given.rule}")
    return Options(**vars(given))


def _check(options: Options, *, world: int) -> None:
    WAYS[options.parallel].check(options, world)
    _check_task(options)
    make_rule(options.rule)
    readers = WAYS[options.parallel].place(0, world).count
    parts = readers * options.accumulate
    if options.batch % parts:
        raise ValueError(
            f"--batch {options.batch} must be divisible by data-parallel ranks x --accumulate = {readers} x "
            f"{options.accumulate}: try --batch {parts * max(1, round(options.batch / parts))}"
        )
    if not options.checkpoint and (options.save_every or options.resume):
        raise ValueError("--save-every and --resume need --checkpoint DIR")
    if options.checkpoint and options.resume:
        step, path = find_newest(options.checkpoint)
        if step >= options.steps:
            raise ValueError(f"--steps {options.steps}: nothing to do after the {step} steps of {path}")


def _check_task(options: Options) -> None:
    if options.data != DATA[options.model]:
        raise ValueError(f"--model {options.model} reads --data {DATA[options.model]}, got --data {options.data}")
    if options.experts and options.model != "transformer":
        raise ValueError(f"--experts goes with --model transformer, got --model {options.model}")
    if options.text and options.data != "text":
        raise ValueError(f"--text goes with --model transformer, got --model {options.model}")
    if options.text and not options.text.is_file():
        raise ValueError(f"--text {options.text}: no such file")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def _add_task(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", choices=DATA, default="lstm", help="default: %(default)s")
    group.add_argument(
        "--experts",
        type=_positive,
        metavar="N",
        help="the transformer's blocks have N perceptrons each, of which a token uses one "
        f"(default: {EXPERTS} with --parallel ep, else a single one for all tokens)",
    )
    group.add_argument("--data", choices=sorted(DATA.values()), help="default: what the model reads")
    group.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to learn (default: Python's help topics)")


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--parallel", choices=WAYS, default="single", help="default: %(default)s")
    group.add_argument(
        "--rule",
        default="global_norm=1.0",
        help="how to clip: global_norm=1.0, norm=0.5 (each tensor), value=0.1 or value=-0.1:0.5 (each element), "
        "none to measure only; default: %(default)s",
    )
    rates = ", ".join(f"{rate:g} for {model}" for model, rate in LEARNING_RATE.items())
    rates += f", {LEARNING_RATE_WITH_EXPERTS:g} with experts"
    group.add_argument(
        "--lr", type=float, metavar="RATE", help=f"learning rate of SGD with momentum 0.9 (default: {rates})"
    )
    group.add_argument(
        "--batch",
        type=_positive,
        default=32,
        metavar="N",
        help="examples a step, all ranks together; default: %(default)s",
    )
    group.add_argument(
        "--accumulate",
        type=_positive,
        default=1,
        metavar="N",
        help="micro-batches a step on each rank, at least 2 fill a pipeline; default: %(default)s",
    )
    group.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    group.add_argument("--steps", type=_positive, default=80, metavar="N", help="default: %(default)s")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and data; default: %(default)s")


def _add_files(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--out", type=Path, metavar="DIR", help="for steps.jsonl and steps.png; default: runs/MODEL-PARALLEL-RULE"
    )
    group.add_argument("--checkpoint", type=Path, metavar="DIR", help="save here after the last step")
    group.add_argument("--save-every", type=_positive, metavar="N", help="and after every N steps")
    group.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --checkpoint DIR")
    group.add_argument(
        "--compare",
        action="store_true",
        help="train the same again on one process; exit with 1 if norms or parameters differ",
    )
