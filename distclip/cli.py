"""The command line: ``distclip ...``, the same as ``python -m distclip ...``.

Each command is a few lines: a function of the library does the work, and is imported only when it is asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from distclip.runs import Run

app = typer.Typer(
    name="distclip",
    help="Gradient clipping for distributed PyTorch: look at a run before it starts, while it runs and afterwards.\n\n"
    "Logs are the JSON lines that distclip.Monitor(clipper, ['run.jsonl']) writes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
_Log = Annotated[Path, typer.Argument(help="A log of a run, also one that is still going on.")]
_Title = Annotated[str | None, typer.Option(help="Over the picture; empty for none.")]


@app.command(short_help="What clips under a config of Accelerate or DeepSpeed.")
def check(
    config: Annotated[Path, typer.Argument(help="A config of Accelerate (YAML or JSON) or DeepSpeed (JSON).")],
    as_json: _Json = False,
) -> None:
    """Which layout distclip will see under CONFIG, what clips, and what is amiss with it. Starts nothing.

    Exit status: 0, or 1 if something cannot work, or 2 if the file cannot be read.
    """
    from distclip.check import check_config

    checked = check_config(config)
    typer.echo(json.dumps(checked.to_dict()) if as_json else str(checked))
    raise typer.Exit(0 if checked.works else 1)


@app.command(short_help="A run in numbers.")
def summary(log: _Log, as_json: _Json = False) -> None:
    """A run in numbers: its norms, how often and how hard it was clipped, and what the alarms said."""
    from distclip.runs import read_run
    from distclip.summary import summary_of

    found = summary_of(read_run(log))
    if as_json:
        _print_json(found.to_dict())
        return
    told = {
        "run": f"{found.name}, rule {found.rule or 'unknown'}",
        "steps": f"{found.steps} ({found.first_step} to {found.last_step})",
        "grad norm": f"median {_n(found.median_norm)}, 90 % {_n(found.p90_norm)}, 99 % {_n(found.p99_norm)}, "
        f"largest {_n(found.largest_norm)} at step {found.largest_norm_step}",
        "clipped": f"{found.clipped:.1%} of the steps, smallest coefficient {_n(found.smallest_coefficient)}",
        "skipped": f"{found.skipped} steps; {found.nonfinite} held an inf or NaN",
        "loss": f"{_n(found.first_loss)} at first, {_n(found.last_loss)} at last",
    }
    if math.isnan(found.last_loss):
        del told["loss"]
    for name, text in told.items():
        typer.echo(f"{name:<11}{text}")
    for alarm in found.alarms:
        typer.echo(f"alarm      {alarm}")


@app.command(short_help="Thresholds from the norms of a run.")
def suggest(log: _Log, as_json: _Json = False) -> None:
    """Thresholds for the global norm from a run's norms, and what share of its steps each would clip."""
    from distclip.runs import read_run
    from distclip.suggest import suggest as suggestions

    found = suggestions(read_run(log))
    if as_json:
        _print_json(found.to_dict())
        return
    rows = [(f"{each.percentile:g} %", _n(each.threshold), f"{each.clips:.1%}") for each in found.thresholds]
    _print_table(("percentile", "threshold", "clips"), rows, numbers=(0, 1, 2))
    typer.echo(found.advice)


@app.command(short_help="Pictures of a run, or of several next to each other.")
def plot(
    logs: Annotated[list[Path], typer.Argument(help="A log of a run; several are drawn side by side.")],
    out: Annotated[
        Path | None,
        typer.Option(help="A .png, .svg or .html file; by default LOG with .png, or comparison.png beside the first."),
    ] = None,
    title: _Title = None,
    as_json: _Json = False,
) -> None:
    """Draw norms, thresholds, clipped and skipped steps, losses and modules of a run into one file.

    FILE.html is a report with numbers, alarms and thresholds too; it opens without a network.
    """
    default = logs[0].with_suffix(".png") if len(logs) == 1 else logs[0].with_name("comparison.png")
    path = _plot(_read(logs), out or default, title)
    if as_json:
        _print_json({"out": str(path), "runs": [str(log) for log in logs]})
    else:
        typer.echo(path)


@app.command(short_help="Several runs next to each other.")
def compare(
    logs: Annotated[list[Path], typer.Argument(help="Two logs or more.")],
    picture: Annotated[Path | None, typer.Option("--plot", help="Draw them too: a .png, .svg or .html file.")] = None,
    as_json: _Json = False,
) -> None:
    """Several runs next to each other: losses, norms, how often they were clipped, alarms."""
    from distclip.summary import summary_of

    if len(logs) < 2:
        raise ValueError(f"compare needs two logs or more, got {len(logs)}; `distclip summary` tells of one")
    runs = _read(logs)
    found = [summary_of(run) for run in runs]
    if picture is not None:
        _plot(runs, picture, None)
    if as_json:
        _print_json([each.to_dict() for each in found])
        return
    head = (
        "run",
        "rule",
        "steps",
        "last loss",
        "median norm",
        "99 % norm",
        "clipped",
        "skipped",
        "non-finite",
        "alarms",
    )
    rows = [
        (
            each.name,
            each.rule,
            str(each.steps),
            _n(each.last_loss),
            _n(each.median_norm),
            _n(each.p99_norm),
            f"{each.clipped:.1%}",
            str(each.skipped),
            str(each.nonfinite),
            str(len(each.alarms)),
        )
        for each in found
    ]
    _print_table(head, rows, numbers=range(2, len(head)))


@app.command(short_help="All rules, and how to write them.")
def rules(as_json: _Json = False) -> None:
    """All rules: how to write them, what they do, what they remember, and where they come from."""
    from distclip.rules import catalogue

    found = catalogue()
    if as_json:
        _print_json([{**asdict(entry), "rule": entry.rule.__name__} for entry in found])
        return
    rows = [(entry.name, entry.mathematics, entry.defaults, entry.paper) for entry in found]
    _print_table(("rule", "mathematics", "defaults", "paper or implementation"), rows)
    typer.echo("g: gradient, N: its global norm, n: a tensor's. As text: global_norm=1.0, or skip_above=9 | zclip, or")
    typer.echo("head.* -> norm=1 ; * -> zclip; in DISTCLIP_RULE, in distclip.yaml, or distclip.rules.parse(text).")


@app.command(short_help="What is installed, and whether it clips right here.")
def doctor(
    as_json: _Json = False,
    skip_test: Annotated[bool, typer.Option("--skip-test", help="Only tell what is installed.")] = False,
) -> None:
    """What is installed here, and whether two ranks on this machine clip right under every layout.

    Exit status: 0, or 1 if a layout does not work.
    """
    from distclip.doctor import facts, self_test
    from distclip.doctor.facts import missing

    found = facts()
    outcomes = [] if skip_test else self_test()
    works = all(outcome.works for outcome in outcomes)
    if as_json:
        _print_json(found | {"self_test": [asdict(outcome) for outcome in outcomes], "works": works})
        raise typer.Exit(0 if works else 1)
    for name in ("distclip", "torch", "python", "system"):
        typer.echo(f"{name:<11}{found[name]}")
    typer.echo(f"{'backends':<11}{', '.join(found['backends']) or 'none'}")
    typer.echo(f"{'GPUs':<11}{'; '.join(found['gpus']) or 'none'}")
    there = [f"{name} {version}" for name, version in found["packages"].items() if version is not None]
    typer.echo(f"{'packages':<11}{', '.join(there) or 'torch alone'}")
    absent = [f"{name} (distclip[{extra}])" for name, extra in missing(found).items()]
    if absent:
        typer.echo(f"{'missing':<11}{', '.join(absent)}")
    if outcomes:
        typer.echo("\nTwo ranks on the CPU, the global norm against one process in float64:")
        rows = [("ok" if each.works else "FAILS", each.layout, each.message) for each in outcomes]
        _print_table(("", "layout", "result"), rows)
    raise typer.Exit(0 if works else 1)


@app.command(short_help="How long clips take here, next to torch.")
def bench(
    layout: Annotated[
        list[str] | None,
        typer.Option(help="single, ddp, fsdp1, fsdp2, hsdp, fsdp2+tp, tp or pipeline."),
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(help="unclipped, clipped, folded (into AdamW), scaler (fp16's), norm or function (drop-in)."),
    ] = None,
    tensors: Annotated[list[int] | None, typer.Option(help="How many tensors the model has, over all ranks.")] = None,
    numel: Annotated[list[int] | None, typer.Option(help="Elements of each, before it is cut over ranks.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16 or float64.")] = None,
    ranks: Annotated[
        int | None,
        typer.Option(help="Ranks for layouts of several, started here; 1 leaves these out. [2, or 4 where needed]"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each process. [as it has; 1 a rank]")] = None,
    rounds: Annotated[int | None, typer.Option(help="How often each way runs. [11; 20 with --monitor]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [both, where there is a GPU]")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes, three rounds: a look, not a measurement.")
    ] = False,
    monitor: Annotated[
        bool, typer.Option("--monitor", help="Instead: what a distclip.Monitor adds to training steps.")
    ] = False,
    picture: Annotated[Path | None, typer.Option("--plot", help="Draw the ratios too: a .png or .svg file.")] = None,
    as_json: _Json = False,
) -> None:
    """Time distclip, torch's documented way and a plain read of the gradients, in turns, in one process.

    Without --layout, --case, --tensors, --numel or --dtype: a list of cases with this project's targets, for some
    minutes; with any of them every combination of what they name. Each can be given several times. Ratios are medians
    over the rounds; collectives, waits for the GPU and the peak of extra memory are counted apart from them. What
    columns and cases mean stands below the table.

    Layouts of several ranks are measured on ranks that this command starts on this machine, or, under torchrun
    (launch/bench.py), on those of the job.

    distclip bench --quick\n
    distclip bench --threads 2 --plot bench.png\n
    distclip bench --layout fsdp2 --ranks 4 --tensors 500 --numel 65536 --case clipped --case folded

    Exit status: 0, whether targets are met or not; 1 if ranks that it has started fail.
    """
    from distclip.bench.command import Options, run

    asked = {"layout": layout, "kind": case, "tensors": tensors, "numel": numel, "dtype": dtype}
    found = run(Options(asked, ranks, threads, rounds, device, quick, monitor, picture))
    if found is None:
        return
    if as_json:
        _print_json(found.content)
        raise typer.Exit(0 if found.works else 1)
    typer.echo(found.head)
    if found.rows:
        _print_table(found.columns, found.rows, numbers=found.numbers, width=found.width)
    for line in found.notes:
        typer.echo(line)
    raise typer.Exit(0 if found.works else 1)


def main(arguments: list[str] | None = None) -> Any:
    """Run a command; what it raises about files and settings is one line on stderr, and exit status 2."""
    try:
        return app(arguments, prog_name="distclip")
    except (ValueError, TypeError, ImportError) as error:
        typer.echo(f"distclip: {error}", err=True)
        raise SystemExit(2) from None


def _read(logs: Sequence[Path]) -> list[Run]:
    from distclip.runs import read_run

    return [read_run(log) for log in logs]


def _plot(runs: Sequence[Run], out: Path, title: str | None) -> Path:
    from distclip.plots import plot as draw

    return draw(runs, out, title=title)


def _n(value: float) -> str:
    return f"{value:.4g}"


def _print_json(content: Any) -> None:
    """JSON knows no NaN: null stands for it."""
    typer.echo(json.dumps(_without_nan(content), allow_nan=False))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = (), width: int | None = None
) -> None:
    """A table as wide as the terminal, where there is none as ``width``; columns of ``numbers`` to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    right = set(numbers)
    for place, name in enumerate(head):
        table.add_column(name, justify="right" if place in right else "left", overflow="fold")
    for row in rows:
        # Text: brackets in names are no markup.
        table.add_row(*map(Text, row))
    console = Console(highlight=False)
    if width is not None and not console.is_terminal:
        console.width = width
    console.print(table)
