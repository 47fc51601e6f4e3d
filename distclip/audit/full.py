"""``audit``: the whole comparison of layouts and gradients."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from distclip import engine
from distclip.audit import own
from distclip.audit.compare import bits_differ, compared, suspects, total_norm
from distclip.audit.findings import Finding, ask, findings_of, rank_names
from distclip.audit.holdings import Flag, Holding, Table, holdings_of, tell, thorough_rows
from distclip.audit.table import Audit, AuditRow
from distclip.audit.values import difference, partial_powers
from distclip.handshake import Wire, digest
from distclip.layout import GradLayout, RankGroup, layout_of, learn
from distclip.layout.declared import Group, as_rank_group, declared_of
from distclip.parameters import ModuleParameters, as_modules
from distclip.participants import connect
from distclip.plan import Plan, make_plan
from distclip.rules.norm import ClipByGlobalNorm
from distclip.rules.thresholds import checked

# The norm of the one collective is float32, its sums are float64.
_NORM = 1e-6


@torch.no_grad()
def audit(
    model: nn.Module | Iterable[nn.Module],
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    pipeline_group: Group | None = None,
    group: Group | None = None,
    tolerance: float = 0.0,
) -> Audit:
    """Compare what distclip takes the model's layout for with what the ranks hold. Collective, slow, changes nothing.

    Asked are the ranks that the groups of layouts and arguments connect, DDP's included, and those of ``group``: each
    of them must call it, with the same arguments. What no group names (undeclared experts, a forgotten
    ``pipeline_group`` or all-reduce) only ``group=dist.group.WORLD`` can find. After a backward, and before ``clip()``,
    the gradients are compared too: it reads each once, hashes it, and gathers only those that are Partial (or, with
    ``tolerance``, that differ).

    Args:
        model: as for ``GradClipper``.
        optimizer: one or several, to be checked for having the model's parameters.
        pipeline_group: as for ``GradClipper``.
        group: further ranks to ask: a ProcessGroup or a 1-D DeviceMesh.
        tolerance: by how much of the tensor's largest element replicas may differ; 0 wants equal bits.

    Returns:
        The audit: ``print`` it for a table of this rank's tensors, and all findings; ``audit.ok`` without any.

    Raises:
        TypeError: ``model``, ``optimizer`` or a group is of another type.
        ValueError: ``tolerance`` is negative or NaN; this rank is not in a group.
        RuntimeError: the ranks name another pipeline, or pass another tolerance; on all of them.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> print(audit(model))
        rank 0
        name    shape  dtype    local shape  system  sharded over  replicated over  holders  gradient
        weight  1x2    float32  1x2          plain   -             -                1        no
        No finding. No rank has a gradient: after a backward() audit also compares the gradients.
    """
    tolerance = checked("tolerance", tolerance)
    optimizers = own.as_optimizers(optimizer)
    params = ModuleParameters(as_modules(model), may_be_empty=True)
    for module in params.modules:
        learn(module)
    pipeline, asked = as_rank_group("pipeline_group", pipeline_group), as_rank_group("group", group)
    view = _view(params, pipeline, asked, tolerance)
    notes = [*view.notes, *own.aliased(params.named), *own.forgotten(params.named, optimizers)]
    found = own.shared(view.wire, notes)
    table = tell(view.wire, thorough_rows(view.holdings), view.component)
    found += _disagreements(view, table, tolerance)
    if any(finding.kind in ("shapes", "left-out") for finding in found):
        found = [finding for finding in found if finding.kind != "plan"]  # which says the same with fewer words
    total = slow = None
    backward = bool(table.has(Flag.GRADIENT).any())
    if backward:
        slow = float(total_norm(table, partial_powers(view.wire, view.holdings, table)))
        total, wrong = _norm(view, params.tensors, slow, max(_NORM, tolerance))
        found += _told(wrong, bool(found))
    return Audit(
        rows=tuple(_row(holding, table, view.pipeline) for holding in view.holdings),
        findings=tuple(found),
        rank=view.rank,
        ranks=view.wire.ranks,
        stages=view.pipeline.ranks if view.pipeline else (),
        backward=backward,
        tolerance=tolerance,
        total_norm=total,
        slow_norm=slow,
    )


@dataclass(frozen=True)
class _View:
    """The model as this rank sees it, and the ranks that it asks."""

    rank: int
    wire: Wire
    pipeline: RankGroup | None
    holdings: list[Holding]
    plan: Plan | None
    """None where it cannot be made, or gradients are not reduced yet."""
    component: tuple[int, ...]
    """The ranks whose gradients make up one norm with this rank's."""
    notes: list[own.Note]


def _view(params: ModuleParameters, pipeline: RankGroup | None, asked: RankGroup | None, tolerance: float) -> _View:
    """Collective over the asked ranks."""
    notes: list[own.Note] = []
    if asked is not None and _some_name_none(asked, pipeline):
        what = f"pipeline_group names {rank_names(pipeline.ranks)}" if pipeline else "no pipeline_group is named"
        notes.append(("pipeline", "", f"{what}; pass it on every rank that holds a stage. Audited without it."))
        pipeline = None
    layouts = [layout_of(param) for param in params.tensors]
    groups = named_groups(layouts, pipeline) + ([asked] if asked else [])
    stages = f"pipeline of {len(pipeline.ranks)} ranks" if pipeline else "no pipeline_group"
    participants = connect(groups, f"audit with tolerance={tolerance}, {stages}")
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    plan: Plan | None = None
    try:
        plan = make_plan(list(params.named), params.tensors, settings="audit", pipeline=pipeline)
        layouts = current_layouts(plan, params.tensors)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        notes.append(("plan", "", f"no plan for clipping can be made: {error}"))
    reducing = plan is not None and plan.participants.group is not None
    component = plan.participants.ranks if plan is not None and reducing else (rank,)
    said, blind = own.unreduced({layout.guard for layout in layouts if layout.guard is not None})
    notes += said
    return _View(
        rank=rank,
        wire=Wire(participants.ranks if participants.group else (rank,), participants.group),
        pipeline=pipeline,
        holdings=holdings_of(list(params.named), params.tensors, layouts, pipeline, blind),
        plan=None if blind else plan,
        component=component,
        notes=notes,
    )


def _some_name_none(asked: RankGroup, pipeline: RankGroup | None) -> bool:
    """Whether some ranks of the group name a pipeline and others do not. Collective."""
    told = Wire(asked.ranks, asked.group).gather(torch.tensor([int(pipeline is not None)]))
    return bool(told.any() and not told.all())


def named_groups(layouts: Iterable[GradLayout], pipeline: RankGroup | None) -> list[RankGroup]:
    """All groups that layouts and arguments name, those over which nothing is reduced (DDP's) included."""
    groups = {group for layout in layouts for group in (*layout.groups, *layout.replicated)}
    return [*groups, *([pipeline] if pipeline else [])]


def current_layouts(plan: Plan, params: Sequence[Tensor]) -> list[GradLayout]:
    """The layouts of the gradients as they are now: where the plan reduces a Partial one first, before that."""
    return [
        layout_of(param, plan.settled[place]) if place in plan.settled else layout
        for place, (param, layout) in enumerate(zip(params, plan.layouts, strict=True))
    ]


def _disagreements(view: _View, table: Table, tolerance: float) -> list[Finding]:
    """What does not agree between ranks. Collective."""
    found = suspects(table, bits_differ)
    if tolerance:
        differing = {suspect.identities[0] for suspect in found if suspect.kind == "replicas"}
        spread = difference(view.wire, view.holdings, table, differing)
        found = [s for s in found if s.kind != "replicas" or not spread[s.identities[0]] <= tolerance]
    if not found:
        return []
    facts = ask(view.wire, view.holdings, found)
    return findings_of(found, facts, compared(table), view.pipeline is not None)


def _norm(view: _View, params: Sequence[Tensor], slow: float, tolerance: float) -> tuple[float | None, Finding | None]:
    """The norm as a clip computes it, and how it is wrong on any rank. Collective."""
    wire = view.wire
    if not bool(wire.gather(torch.tensor([view.plan is not None])).all()):
        return None, None
    assert view.plan is not None
    fast, error = _measured(view.plan, params)
    said = [json.loads(text) for text in wire.texts(json.dumps([fast, error]))]
    errors = {rank: text for rank, (_, text) in zip(wire.ranks, said, strict=True) if text}
    if errors:
        # A rank that raised says why, the others only that one did.
        rank = min(errors, key=lambda rank: ("another rank" in errors[rank], rank))
        return None, Finding("no-norm", "", (rank,), f"the norm cannot be computed: on rank {rank}, {errors[rank]}")
    wrong = {rank: norm for rank, (norm, _) in zip(wire.ranks, said, strict=True) if not _near(norm, slow, tolerance)}
    if not wrong:
        return fast, None
    values = ", ".join(f"{norm:.6g} on rank {rank}" for rank, norm in list(wrong.items())[:4])
    message = f"clipping would use {values}, but the distinct pieces that the asked ranks hold make {slow:.6g}."
    return fast, Finding("norm", "", tuple(wrong), message)


def _told(wrong: Finding | None, explained: bool) -> list[Finding]:
    """What is wrong with the norm, given whether other findings are its cause."""
    if wrong is None or (wrong.kind == "no-norm" and explained):
        return []
    cause = " The other findings are why." if explained else " Nothing else is wrong: please report it to distclip."
    return [replace(wrong, message=wrong.message + (cause if wrong.kind == "norm" else ""))]


def _near(norm: float, slow: float, tolerance: float) -> bool:
    return math.isclose(norm, slow, rel_tol=tolerance) or not (math.isfinite(norm) or math.isfinite(slow))


def _measured(plan: Plan, params: Sequence[Tensor]) -> tuple[float, str]:
    """The norm of one clip that changes nothing, or why there is none."""
    before = [param.grad for param in params]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what findings tell
            return engine.clip(plan, ClipByGlobalNorm(math.inf), engine.Moment(params)).total_norm.item(), ""
    except (RuntimeError, TypeError, OverflowError) as error:
        return math.nan, str(error)
    finally:
        # Partial gradients may have been reduced, sparse ones coalesced.
        for param, grad in zip(params, before, strict=True):
            if param.grad is not grad:
                param.grad = grad


def _row(holding: Holding, table: Table, pipeline: RankGroup | None) -> AuditRow:
    held, layout = holding.held, holding.held.layout
    same = (table["identity"] == digest(holding.identity)) & (table["piece"] == digest(holding.place))
    local = getattr(held.param, "_local_tensor", held.param)
    cut = (*layout.sharded, *layout.apart, *([pipeline] if pipeline and layout.tie is None else []))
    return AuditRow(
        name=held.name,
        shape=tuple(held.piece.shape),
        dtype=held.param.dtype,
        local_shape=(held.piece.span[1],) if held.piece.span else tuple(local.shape),
        system=layout.system + (" + declare" if declared_of(held.param) else ""),
        sharded=tuple(group.ranks for group in cut),
        replicated=tuple(sorted(set(table.ranks[same].tolist()))),
        gradient=held.param.grad is not None,
    )
