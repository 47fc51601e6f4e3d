"""The command line: ``distclip ...``, the same as ``python -m distclip ...``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="distclip",
    help="Gradient clipping for distributed PyTorch: look before you start a run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _commands() -> None:
    """Typer would leave out the name of a command that is the only one."""


@app.command()
def check(
    config: Annotated[Path, typer.Argument(help="A config of Accelerate (YAML or JSON) or DeepSpeed (JSON).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Which layout distclip will see under CONFIG, what clips, and what is amiss with it. Starts nothing.

    Exit status: 0, or 1 if something cannot work, or 2 if the file cannot be read.
    """
    from distclip.check import check_config

    checked = check_config(config)
    typer.echo(json.dumps(checked.to_dict()) if as_json else str(checked))
    raise typer.Exit(0 if checked.works else 1)


def main(arguments: list[str] | None = None) -> Any:
    """Run a command; what it raises about files and settings is one line on stderr, and exit status 2."""
    try:
        return app(arguments, prog_name="distclip")
    except (ValueError, TypeError, ImportError) as error:
        typer.echo(f"distclip: {error}", err=True)
        raise SystemExit(2) from None
