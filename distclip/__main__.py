"""``python -m distclip``."""

import sys


def main() -> None:
    """The command line, or what it takes to have it."""
    try:
        from distclip.cli import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "click"):
            raise
        sys.exit(f"distclip: the command line needs {error.name}: pip install 'distclip[cli]'")
    run()


if __name__ == "__main__":
    main()
