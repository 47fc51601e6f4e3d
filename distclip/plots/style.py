"""How pictures look: sizes, fonts, colours that colour-blind readers can tell apart, texts from logs."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence

import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.axes import Axes

# Okabe and Ito's palette, and three greys.
INK, GREY, FAINT = "#1f1f1f", "#7a7a7a", "#e4e4e4"
BLUE, SKY, GREEN, ORANGE, VERMILION, PURPLE = "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7"
# Of runs side by side; then the same once more, dashed.
CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, INK)
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))
# A text column of a page, in inches.
WIDTH = 6.9

_LONGEST = 40
_STYLE = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "figure.titlesize": 9,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "ytick.minor.width": 0.4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.1,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    # The same run makes the same file.
    "svg.hashsalt": "distclip",
}


@contextlib.contextmanager
def paper(**settings: str) -> Iterator[None]:
    """Within it, figures are made and saved in this style, whatever a user's matplotlibrc says."""
    with warnings.catch_warnings(), matplotlib.style.context(_STYLE | settings, after_reset=True):
        # A name in a script that the font lacks is shown as boxes, which is not worth a warning.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def plain(text: str, longest: int = _LONGEST) -> str:
    """A text from a log, as a picture can hold it: what no file may contain replaced, the middle of a long one cut."""
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    if len(shown) <= longest:
        return shown
    end = longest // 2
    return f"{shown[: longest - end - 1]}\N{HORIZONTAL ELLIPSIS}{shown[-end:]}"


def legend_above(axes: Axes, entries: Sequence[tuple[Artist, str]]) -> None:
    """A legend over the axes, where it hides no data."""
    if not entries:
        return
    figure = axes.get_figure(root=True)
    assert figure is not None
    columns = _columns([len(label) for _, label in entries], figure.get_figwidth() - 0.9)
    legend = axes.legend(
        [artist for artist, _ in entries],
        # matplotlib leaves out labels that begin with an underscore: the names come later.
        ["-"] * len(entries),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        borderaxespad=0.1,
        borderpad=0.2,
        handlelength=1.6,
        columnspacing=1.4,
    )
    for text, (_, label) in zip(legend.get_texts(), entries, strict=True):
        text.set_text(label)
        text.set_parse_math(False)


def _columns(lengths: Sequence[int], room: float) -> int:
    """Into how many columns of a legend texts of these lengths go, if there is room for so many inches."""

    def width(columns: int) -> float:
        rows = math.ceil(len(lengths) / columns)
        # A letter takes 0.056 inches, the line before the text and the space after it 0.42.
        return sum(0.42 + 0.056 * max(lengths[first : first + rows]) for first in range(0, len(lengths), rows))

    most = next((columns for columns in range(len(lengths), 1, -1) if width(columns) <= room), 1)
    # As few as make no more rows: five and one would be three and three.
    return math.ceil(len(lengths) / math.ceil(len(lengths) / most))


def say(axes: Axes, text: str) -> None:
    """A note in the middle of axes that have nothing to show."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
