"""Pictures as files: the suffix says what kind."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from distclip.plots.figures import comparison_figure, run_figure
from distclip.plots.style import paper
from distclip.runs import Run

SUFFIXES = (".png", ".svg", ".html")


def plot(runs: Sequence[Run], out: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Draw one run, or several side by side, into a file.

    Args:
        runs: as ``distclip.runs.read_run`` gives them; at least one.
        out: a PNG (200 dots an inch), an SVG, or a report in one HTML file that opens without a network; the suffix
            says which. Its folder is made.
        title: None for the run's name and rule; "" for none.

    Returns:
        The file's path.

    Raises:
        ValueError: no runs, another suffix, ``out`` is one of the logs or cannot be written.
    """
    path = checked_out(out, [run.path for run in runs])
    return written(path, _content(runs, path.suffix.lower(), title))


def written(path: Path, content: bytes) -> Path:
    """The file's path, when it is written; its folder is made.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from None
    return path


def checked_out(out: str | os.PathLike[str], logs: Sequence[Path]) -> Path:
    """Where pictures of these logs may go.

    Raises:
        ValueError: another suffix, or one of the logs.
    """
    path = Path(out)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"out must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, got {str(path)!r}")
    if path.resolve() in {log.resolve() for log in logs}:
        raise ValueError(f"out is one of the logs, which it would overwrite: {str(path)!r}")
    return path


def figure_bytes(figure: Figure, suffix: str) -> bytes:
    """The figure as a PNG or, of any other suffix, as an SVG."""
    return png_bytes(figure) if suffix == ".png" else svg_bytes(figure)


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG."""
    stream = io.BytesIO()
    FigureCanvasAgg(figure)
    with paper():
        figure.savefig(stream, format="png")
    return stream.getvalue()


def svg_bytes(figure: Figure, *, letters: bool = True) -> bytes:
    """The figure as an SVG, without a date.

    Args:
        figure: which.
        letters: whether letters are outlines, which look alike everywhere, or text, which can be searched and read
            out.
    """
    stream = io.BytesIO()
    FigureCanvasSVG(figure)
    with paper(**{"svg.fonttype": "path" if letters else "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return stream.getvalue()


def _content(runs: Sequence[Run], suffix: str, title: str | None) -> bytes:
    from distclip.plots.report import html_report

    if not runs:
        raise ValueError("runs must hold at least one run, got none")
    if suffix == ".html":
        return html_report(runs, title=title).encode("utf-8", errors="replace")
    figure = run_figure(runs[0], title=title) if len(runs) == 1 else comparison_figure(runs, title=title)
    return figure_bytes(figure, suffix)
