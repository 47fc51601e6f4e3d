"""What is measured: cases, the targets of this project, and the default list."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from distclip.hints import closest

MI = 2**20
# Ranks of the layouts that need several, by default; and what their number must be a multiple of.
RANKS = {"single": 1, "ddp": 2, "fsdp1": 2, "fsdp2": 2, "hsdp": 4, "fsdp2+tp": 4, "tp": 2, "pipeline": 2}
_MULTIPLE = {"hsdp": 2, "fsdp2+tp": 2}
DTYPES = ("float32", "bfloat16", "float16", "float64")
KINDS = {
    "unclipped": "GradClipper.clip() where the norm is below max_norm",
    "clipped": "GradClipper.clip() that halves every gradient",
    "folded": "GradClipper(..., optimizer=).clip() and a fused AdamW step; the extra over the step alone",
    "scaler": "the same under a GradScaler, on the float32 gradients that fp16 autocast leaves: unscale, clip, step, "
    "update; the extra over the step alone",
    "norm": "distclip.grad_norm(model), which changes nothing",
    "function": "distclip.clip_grad_norm_(model, max_norm), the drop-in function, where nothing is clipped",
}
Bound = Literal["torch", "limit"]


@dataclass(frozen=True)
class Target:
    """What this project wants: distclip's time is at most ``most`` times that of ``of``."""

    most: float
    of: Bound = "torch"


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Raises:
        ValueError: a field does not fit; names it and what fits.
    """

    layout: str = "single"
    kind: str = "unclipped"
    tensors: int = 120
    """Of the whole model, over all ranks."""
    numel: int = MI
    """Elements of each tensor, before it is cut over ranks."""
    dtype: str = "float32"
    """Of parameters and gradients."""
    ranks: int = 1
    device: str = "cpu"
    target: Target | None = None
    judged: bool = True
    """Whether memory has a target too: at tiny sizes, what is fixed is a large share."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("--layout", self.layout, RANKS),
            ("--case", self.kind, KINDS),
            ("--dtype", self.dtype, DTYPES),
            ("--device", self.device, ("cpu", "cuda")),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}{closest(value, known)}")
        for name, number in (("--tensors", self.tensors), ("--numel", self.numel)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if self.kind == "scaler" and self.dtype != "float32":
            raise ValueError(
                f"--case scaler measures --dtype float32, which fp16 autocast leaves, got {self.dtype}: torch's "
                "GradScaler refuses to unscale fp16 gradients, and others need no scaling"
            )
        problem = misfit(self.layout, self.ranks)
        if problem:
            raise ValueError(problem)
        if self.layout not in ("single", "ddp", "pipeline") and self.numel % self.ranks:
            raise ValueError(
                f"--numel must be a multiple of the {self.ranks} ranks that --layout {self.layout} cuts tensors over, "
                f"got {self.numel}"
            )
        if self.layout == "pipeline" and self.tensors < self.ranks:
            raise ValueError(
                f"--tensors must be at least one for each of the pipeline's {self.ranks} stages, got {self.tensors}"
            )


def misfit(layout: str, ranks: int) -> str:
    """Why a layout cannot be on so many ranks; "" where it can."""
    if layout == "single":
        return "" if ranks == 1 else f"--layout single is one process, got --ranks {ranks}"
    if ranks < 2:
        return f"--layout {layout} needs two ranks or more, got --ranks {ranks}"
    if layout in _MULTIPLE and (ranks % _MULTIPLE[layout] or ranks < 4):
        return f"--layout {layout} needs an even number of ranks, four or more, got --ranks {ranks}"
    return ""


def default_cases(*, quick: bool = False, ranks: int | None = None, devices: Sequence[str] = ("cpu",)) -> list[Case]:
    """The cases that this project sets itself targets for, and the layouts next to each other.

    Args:
        quick: the same cases at small sizes, which have no targets.
        ranks: of the layouts that need several; None for what each needs; 1 leaves them out.
        devices: where.
    """
    found = [case for device in devices for case in (_ON_CPU if device == "cpu" else _ON_GPU)]
    # The target is one of gloo's.
    found += [
        case if device == "cpu" else replace(case, device=device, target=None) for device in devices for case in _SPREAD
    ]
    if ranks is not None:
        found = [
            replace(case, ranks=1 if case.layout == "single" else ranks)
            for case in found
            if case.layout == "single" or not misfit(case.layout, ranks)
        ]
    found.sort(key=lambda case: case.ranks)
    return [quickened(case) for case in found] if quick else found


def product_of(
    layouts: Sequence[str],
    kinds: Sequence[str],
    tensors: Sequence[int],
    numels: Sequence[int],
    dtypes: Sequence[str],
    *,
    ranks: int | None = None,
    device: str = "cpu",
) -> list[Case]:
    """Every combination of these; none have targets.

    Raises:
        ValueError: see ``Case``.
    """
    every = itertools.product(layouts, tensors, numels, dtypes, kinds)
    return [
        Case(layout, kind, count, numel, dtype, RANKS.get(layout, 1) if ranks is None else ranks, device)
        for layout, count, numel, dtype, kind in every
    ]


def quickened(case: Case) -> Case:
    """The same at a size that takes milliseconds."""
    return replace(case, tensors=min(case.tensors, 24), numel=min(case.numel, 1024), target=None, judged=False)


_ON_CPU = [
    Case("single", "unclipped", 120, MI, target=Target(0.35)),
    Case("single", "clipped", 120, MI, target=Target(0.70)),
    Case("single", "folded", 120, MI, target=Target(0.45)),
    Case("single", "scaler", 120, MI),
    Case("single", "norm", 120, MI),
    Case("single", "function", 120, MI),
    Case("single", "unclipped", 60, MI, "bfloat16", target=Target(0.60)),
    Case("single", "unclipped", 60, MI, "float16", target=Target(0.60)),
    Case("single", "unclipped", 20_000, 64, target=Target(0.40)),
]
_SPREAD = [
    Case("fsdp2", "clipped", 2_000, 1_024, ranks=2, target=Target(0.22)),
    *(
        Case(layout, "clipped", 2_000, 1_024, ranks=ranks)
        for layout, ranks in RANKS.items()
        if layout not in ("single", "fsdp2")
    ),
]
# torch.sum of one flat tensor at nine tenths of its speed, and the same for a norm.
_SPEED = Target(1 / 0.9, "limit")
_ON_GPU = [
    Case("single", "norm", 256, MI, "float32", device="cuda", target=_SPEED),
    Case("single", "norm", 512, MI, "bfloat16", device="cuda", target=_SPEED),
    Case("single", "unclipped", 300, MI, device="cuda", target=Target(0.45)),
    Case("single", "folded", 300, MI, device="cuda", target=Target(0.45)),
    Case("single", "scaler", 300, MI, device="cuda", target=Target(0.30)),
    Case("single", "clipped", 300, MI, device="cuda"),
    Case("single", "function", 300, MI, device="cuda"),
]
