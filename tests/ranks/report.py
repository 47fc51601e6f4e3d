"""The text of a failure: the rank that failed first, then what the others were doing."""

from collections.abc import Sequence
from pathlib import Path

from tests.ranks.process import Rank

_MOST_LINES = 20
"""Of a log, or of the traceback of a rank that was not the first to fail."""

_NOISE = ("/tests/ranks/", "/multiprocessing/", 'File "<string>"', "Extension modules: ")
"""What marks the lines of a stack that say nothing about the test."""


def failure(ranks: Sequence[Rank], timeout: float) -> str | None:
    """The report, or None where all ranks returned, or all skipped, and ended well."""
    kinds = {rank.outcome.kind if rank.outcome else "unheard" for rank in ranks}
    if kinds in ({"returned"}, {"skipped"}) and all(rank.exitcode == 0 for rank in ranks):
        return None
    first = _first_to_fail(ranks)
    parts = [_headline(first, ranks, timeout)]
    if first and first.outcome and first.outcome.traceback:
        parts.append(first.outcome.traceback)
    parts += [_of_another(rank) for rank in ranks if rank is not first]
    parts += [_section(f"output of rank {rank.number}", _tail(log)) for rank in ranks if (log := _read(rank.log))]
    return "\n\n".join(parts)


def _first_to_fail(ranks: Sequence[Rank]) -> Rank | None:
    # A rank that was killed had no time to say when; peers that lost their connection to it report within moments.
    for rank in ranks:
        if rank.died:
            return rank
    failed = [(rank.outcome.when, rank.number) for rank in ranks if rank.outcome and rank.outcome.kind != "returned"]
    return ranks[min(failed)[1]] if failed else None


def _headline(first: Rank | None, ranks: Sequence[Rank], timeout: float) -> str:
    if first is None:
        running = sum(rank.exitcode is None for rank in ranks)
        return f"{running} of {len(ranks)} ranks still running at the time limit of {timeout:g} s"
    headline = f"rank {first.number} of {len(ranks)} {first.state}"
    if first.outcome and first.outcome.kind == "skipped":
        headline += " (a test skips on every rank or on none)"
    return headline


def _of_another(rank: Rank) -> str:
    if rank.outcome and rank.outcome.traceback:
        return _section(f"rank {rank.number} raised", _tail(rank.outcome.traceback))
    return _section(f"rank {rank.number} {rank.state}", _read(rank.stacks))


def _section(title: str, text: str) -> str:
    return "\n".join([title, *(f"    {line}" for line in text.splitlines())])


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-_MOST_LINES:])


def _read(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return "\n".join(line for line in lines if not any(mark in line for mark in _NOISE)).strip()
