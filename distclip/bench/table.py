"""Results as text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from distclip.bench.cases import KINDS, MI, Case
from distclip.bench.measure import COLLECTIVES, MEMORY_SHARE, Row

HEAD = ("case", "torch", "distclip", "read", "/ torch", "half", "target", "met", "/ read", "coll.", "syncs", "memory")
# Of the table where nobody says how wide the terminal is, and of the text below it.
WIDTH = 120
NUMBERS = (1, 2, 3, 4, 5, 8, 9, 10, 11)
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


def label(case: Case) -> str:
    """What is measured, in few words."""
    where = case.layout if case.ranks == 1 else f"{case.layout} on {case.ranks}"
    gpu = ", GPU" if case.device == "cuda" else ""
    return f"{where}{gpu}: {case.tensors:,} x {_size(case.numel)} {_SHORT[case.dtype]}, {case.kind}"


def cells(row: Row) -> tuple[str, ...]:
    """What the table shows of one case, in its columns."""
    target = row.case.target
    base = row.step_seconds or 0.0
    return (
        label(row.case),
        "-" if row.torch_seconds is None else seconds(row.torch_seconds - base),
        seconds(row.distclip_seconds - base),
        seconds(row.limit_seconds),
        _ratio(row.ratio),
        "-" if row.ratio is None else f"{_ratio(row.ratio_low)}-{_ratio(row.ratio_high)}",
        "-" if target is None else f"{target.most:.2f}{' of read' if target.of == 'limit' else ''}",
        "no: " + ", ".join(row.misses) if row.misses else "yes" if target is not None else "-",
        _ratio(row.limit_ratio),
        _pair(row.collectives, row.torch_collectives),
        "-" if row.host_syncs is None else _pair(row.host_syncs, row.torch_host_syncs),
        f"{row.memory_share:.2%}",
    )


def legend(rows: Sequence[Row]) -> list[str]:
    """What the columns and the cases of these rows mean."""
    found = [
        "torch, distclip, read: median times, of the slowest rank of each round. read is one sum of one flat tensor of "
        "as many bytes as the gradients have.",
        "/ torch, / read: distclip's time over theirs, the median of the rounds' ratios, of which half lie between the "
        "numbers of half. target: the most that / torch (or / read) shall be.",
        "coll., syncs: collectives and waits for the GPU of one clip, torch's in brackets. memory: the peak of "
        "what a clip's tensors take, of the gradients' bytes.",
        f"Every case shall have at most {COLLECTIVES} collective, no sync, and below {MEMORY_SHARE:.0%} of memory.",
    ]
    kinds = {row.case.kind for row in rows}
    found += [f"{kind}: {text}." for kind, text in KINDS.items() if kind in kinds]
    if any(row.step_seconds is not None for row in rows):
        found.append("An extra is the whole less the same optimizer's step alone, on both sides, in times and ratios.")
    for layout, way in {row.case.layout: row.torch_way for row in rows}.items():
        if way == "none":
            found.append(f"{layout}: torch documents no way to clip over stages, so there is none to compare with.")
        elif not way.startswith("torch."):
            found.append(f"{layout}: torch's documented way is {way}; torch.nn.utils.clip_grad_norm_ is wrong there.")
    return [line for text in found for line in textwrap.wrap(text, WIDTH, subsequent_indent="  ")]


def seconds(value: float) -> str:
    """A time in the unit that suits it."""
    if abs(value) >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if abs(value) >= 1e-3 else f"{value * 1e6:.3g} us"


def _size(numel: int) -> str:
    return f"{numel:,}" if numel % MI else f"{numel // MI}Mi"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _pair(ours: int, theirs: int | None) -> str:
    return str(ours) if theirs is None else f"{ours} ({theirs})"
