"""A run in one HTML file that opens anywhere: numbers, alarms, thresholds, pictures. No scripts, nothing to fetch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import escape

import numpy as np
from matplotlib.axes import Axes

from distclip.plots.columns import Columns
from distclip.plots.comparison import draw_losses, draw_norms_of_runs, draw_shares, names_of
from distclip.plots.figures import heatmap_height, single, title_of
from distclip.plots.heatmap import draw_modules, has_details
from distclip.plots.histogram import draw_histogram
from distclip.plots.inline import COLOURS, inline_svg
from distclip.plots.loss import draw_loss
from distclip.plots.norms import draw_norms
from distclip.plots.share import draw_clipped_share
from distclip.runs import Run
from distclip.suggest import suggest
from distclip.summary import Summary, finite, summary_of

# Inches: on a telephone's width the letters are still large enough.
_WIDTH, _HEIGHT = 4.2, 2.6
# What draws, how high, and what to say of it.
_Picture = tuple[Callable[[Axes], None], float, str]

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f6f6f4; LIGHT }
@media (prefers-color-scheme: dark) { :root { --page: #161616; --card: #212121; DARK } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 72rem; margin: auto; padding: 1.5rem 1rem 3rem }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2rem 0 .75rem; overflow-wrap: anywhere }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
p { margin: .5rem 0; max-width: 48rem; overflow-wrap: anywhere }
.quiet, figcaption, dt { color: var(--grey) }
code { overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0 }
dl div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem }
dt { font-size: .8rem } dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums }
dd small { display: block; font-size: .8rem; color: var(--grey) }
.alarms { list-style: none; padding: 0 }
.alarms li { border-left: .25rem solid var(--orange); background: var(--card); padding: .5rem .8rem; margin: .5rem 0;
  max-width: 48rem; overflow-wrap: anywhere }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1.5rem }
figure { margin: 0 } figcaption { font-size: .85rem }
svg { width: 100%; height: auto; display: block }
svg * { stroke-linejoin: round; stroke-linecap: butt }
.wide { overflow-x: auto; margin-bottom: 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; border-bottom: 1px solid var(--faint) }
th:first-child, td:first-child, .text { text-align: left; overflow-wrap: anywhere }
th { color: var(--grey); font-weight: 500; font-size: .85rem }
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def html_report(runs: Sequence[Run], *, title: str | None = None) -> str:
    """One HTML page about a run, or about several: first side by side, then each.

    Args:
        runs: as ``distclip.runs.read_run`` gives them; at least one.
        title: None for the run's name and rule, or the names of several; "" for none.

    Raises:
        ValueError: there are no runs.
    """
    if not runs:
        raise ValueError("runs must hold at least one run, got none")
    names = names_of(runs)
    heading = (title_of(runs[0]) if len(runs) == 1 else ", ".join(names)) if title is None else title
    parts = [f"<h1>{escape(heading)}</h1>"] if heading else []
    if len(runs) == 1:
        parts.append(_run(runs[0], "run"))
    else:
        parts += [_table_of_runs(runs, names), _pictures(_comparison(runs), "all")]
        for place, (run, name) in enumerate(zip(runs, names, strict=True)):
            parts.append(f"<h2>{escape(name)}</h2>\n{_run(run, f'run{place}')}")
    return _PAGE.format(title=escape(heading or "distclip"), style=_style(), body="\n".join(parts))


def _style() -> str:
    light = " ".join(f"--{name}: {colour};" for colour, (name, _) in COLOURS.items())
    dark = " ".join(f"--{name}: {colour};" for name, colour in COLOURS.values())
    return _STYLE.replace("LIGHT", light).replace("DARK", dark)


def _run(run: Run, name: str) -> str:
    told = summary_of(run)
    parts = [_where_from(run), _numbers(told), "<h3>Alarms</h3>", _alarms(told)]
    parts += ["<h3>Pictures</h3>", _pictures(_of_run(run), name), "<h3>Thresholds to consider</h3>", _thresholds(run)]
    return "\n".join(parts)


def _where_from(run: Run) -> str:
    known = {"rule": "rule", "version": "distclip", "torch": "torch", "world_size": "ranks"}
    facts = [f"{label} {run.info[key]}" for key, label in known.items() if key in run.info]
    if run.broken_lines:
        facts.append(f"{run.broken_lines} lines of the log could not be read")
    return f'<p class="quiet">{escape(" · ".join([*facts, str(run.path)]))}</p>'


def _numbers(told: Summary) -> str:
    tiles = [
        ("steps", f"{told.steps:,}", f"{told.first_step:,} to {told.last_step:,}"),
        ("median norm", _n(told.median_norm), f"90 % below {_n(told.p90_norm)}, 99 % below {_n(told.p99_norm)}"),
        ("largest norm", _n(told.largest_norm), f"at step {told.largest_norm_step:,}"),
        ("clipped", f"{told.clipped:.1%}", f"smallest coefficient {_n(told.smallest_coefficient)}"),
        ("skipped", f"{told.skipped:,}", f"{told.nonfinite:,} steps held an inf or NaN"),
    ]
    if math.isnan(told.largest_norm):
        # Nobody knows a norm, nor a step that had one.
        tiles[1:3] = [("norm", "none", "that is finite")]
    if not math.isnan(told.last_loss):
        tiles.append(("last loss", _n(told.last_loss), f"{_n(told.first_loss)} at first"))
    cells = (f"<div><dt>{a}</dt><dd>{escape(b)}<small>{escape(c)}</small></dd></div>" for a, b, c in tiles)
    return f"<dl>{''.join(cells)}</dl>"


def _alarms(told: Summary) -> str:
    if not told.alarms:
        return '<p class="quiet">None.</p>'
    return f'<ul class="alarms">{"".join(f"<li>{escape(alarm)}</li>" for alarm in told.alarms)}</ul>'


def _thresholds(run: Run) -> str:
    if not finite(run.series("grad_norm")):
        return '<p class="quiet">No step has a finite norm to learn from.</p>'
    found = suggest(run)
    rows = [(f"{each.percentile:g} %", _n(each.threshold), f"{each.clips:.1%}") for each in found.thresholds]
    return f"{_table(('percentile', 'threshold', 'would clip'), rows)}\n<p>{escape(found.advice)}</p>"


def _table_of_runs(runs: Sequence[Run], names: Sequence[str]) -> str:
    head = ("run", "rule", "steps", "last loss", "median norm", "99 % norm", "clipped", "skipped", "inf or NaN")
    rows = []
    for name, told in zip(names, map(summary_of, runs), strict=True):
        numbers = (_n(told.last_loss), _n(told.median_norm), _n(told.p99_norm), f"{told.clipped:.1%}")
        rows.append((name, told.rule, f"{told.steps:,}", *numbers, f"{told.skipped:,}", f"{told.nonfinite:,}"))
    return _table(head, rows, texts={1})


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: Iterable[int] = ()) -> str:
    text = set(texts)

    def line(cells: Sequence[str], tag: str) -> str:
        marks = (' class="text"' if place in text else "" for place in range(len(cells)))
        told = (f"<{tag}{mark}>{escape(cell)}</{tag}>" for cell, mark in zip(cells, marks, strict=True))
        return f"<tr>{''.join(told)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table><thead>{line(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def _of_run(run: Run) -> list[_Picture]:
    found: list[_Picture] = [
        (
            partial(draw_norms, run=run),
            _HEIGHT,
            "The global gradient norm. Ticks at the lower edge: clipped steps; triangles: skipped ones; crosses: steps "
            "whose gradients held an inf or NaN.",
        )
    ]
    if not np.isnan(Columns(run).losses).all():
        found.append((partial(draw_loss, run=run), _HEIGHT, "The loss."))
    found.append((partial(draw_histogram, run=run), _HEIGHT, "How often which norms came, before clipping."))
    found.append((partial(draw_clipped_share, run=run), _HEIGHT, "The share of the steps that were clipped."))
    if has_details(run):
        height = max(_HEIGHT, heatmap_height(run))
        found.append((partial(draw_modules, run=run), height, "Norms of modules before clipping."))
    return found


def _comparison(runs: Sequence[Run]) -> list[_Picture]:
    found: list[_Picture] = []
    if any(not np.isnan(Columns(run).losses).all() for run in runs):
        found.append((partial(draw_losses, runs=runs), _HEIGHT, "Losses; crosses: inf or NaN."))
    found.append((partial(draw_norms_of_runs, runs=runs), _HEIGHT, "Gradient norms before clipping."))
    found.append((partial(draw_shares, runs=runs), _HEIGHT, "The share of the steps that were clipped."))
    return found


def _pictures(pictures: Iterable[_Picture], name: str) -> str:
    found = []
    for place, (draw, height, caption) in enumerate(pictures):
        svg = inline_svg(single(draw, _WIDTH, height), f"{name}-{place}-", caption)
        found.append(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>")
    return f'<div class="pictures">{"".join(found)}</div>'


def _n(value: float) -> str:
    return f"{value:.4g}"
