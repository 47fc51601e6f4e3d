"""The cheap part of the audit, which ``GradClipper`` runs with its clips."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.audit.compare import compared, norms_differ, suspects
from distclip.audit.findings import Finding, ask, findings_of, told_together
from distclip.audit.full import current_layouts, named_groups
from distclip.audit.holdings import Holding, Row, holdings_of, quick_rows, tell
from distclip.handshake import Wire, digest
from distclip.layout import GradLayout, RankGroup, layout_of
from distclip.participants import Participants, connect
from distclip.plan import Plan
from distclip.reduction import StalePlan
from distclip.warning import AuditWarning, warn

When = Literal["first", "always", "never"]
WHEN: tuple[When, ...] = get_args(When)
# Rows of all ranks that a check compares, 72 bytes each; of larger jobs it looks at some tensors.
_MOST_ROWS = 1 << 18


class ClipCheck:
    """Compares the ranks' norms of each tensor, over the groups that layouts and arguments name. Only warns.

    The gradients are read before a clip, since it changes them, and the ranks compare after it: each rank exactly once
    in a ``clip()``, also where that raised, so that nobody waits for a rank that failed or whose plan was stale.

    Args:
        when: "first" is the first clip, and the first after all these ranks together made a new plan (under DDP, where
            a plan is made by one rank alone, the first clip only).
    """

    def __init__(self, when: When) -> None:
        self._when = when
        self.signature = f"check={when}"
        """What ranks must agree on."""
        self._seen: Plan | None = None
        self._asked: Participants | None = None

    def anew(self) -> ClipCheck:
        """One that has asked nobody yet."""
        return ClipCheck(self._when)

    def around(self, plan: Plan, params: Sequence[Tensor], pipeline: RankGroup | None) -> AbstractContextManager[None]:
        """A context for one clip. Collective, where a check is due."""
        if self._when == "never" or (self._when == "first" and plan is self._seen):
            return nullcontext()
        groups = named_groups(plan.layouts, pipeline)
        # Under DDP a plan made anew is this rank's own matter: the others would not come.
        alone = plan.participants.group is None and self._when == "first" and self._known() is not None
        if alone or not groups:
            self._seen = plan
            return nullcontext()
        return _Around(self, plan, params, pipeline)

    def outdated(self, plan: Plan | None, params: Sequence[Tensor]) -> bool:
        """Whether a parameter lies otherwise than the plan says; warns. Looks only if every clip is checked. Local."""
        if plan is None or self._when != "always":
            return False
        for name, param, old in zip(plan.names, params, plan.layouts, strict=True):
            new = layout_of(param)
            same = new == old if old.as_parameter else (new.pieces, new.groups) == (old.pieces, old.groups)
            if not same:
                warn(
                    f"{name} was exchanged in place since the last clip (then {_told(old)}, now {_told(new)}): the "
                    "plan is made anew. See whether the optimizer steps the new one: audit(model, optimizer=...).",
                    AuditWarning,
                )
                return True
        return False

    def _known(self) -> Participants | None:
        """Who was asked before."""
        return self._asked if self._asked is not None and self._asked.is_current else None

    def _to_ask(self, plan: Plan, pipeline: RankGroup | None) -> Participants | None:
        """Who is asked in this clip, None for nobody: the same on all of them. Collective, where the plan is new."""
        known = self._known()
        if plan is self._seen:
            return known
        self._seen = plan
        own = plan.participants
        before = {digest(str(known.ranks if known else ()))}
        if own.group is not None:
            # All participants have this new plan, but perhaps asked others before, or nobody.
            before = set(Wire(own.ranks, own.group).gather(torch.tensor(list(before))).flatten().tolist())
        if before == {digest(str(()))}:
            # Ranks that do not reduce (DDP's) each go by their own sums, which are rounded otherwise where they are
            # made while backward() runs.
            overlap = f", overlap={plan.overlap is not None}" if own.group is None else ""
            self._asked = connect(named_groups(plan.layouts, pipeline), self.signature + overlap)
            return self._asked
        return known if self._when == "always" or before == {digest(str(own.ranks))} else None

    def compare(self, plan: Plan, pipeline: RankGroup | None, holdings: list[Holding], rows: list[Row]) -> list[str]:
        """Tell the asked ranks; returns a message for each kind of finding, the same on all of them. Collective."""
        asked = self._to_ask(plan, pipeline)
        if asked is None or asked.group is None:
            return []
        wire = Wire(asked.ranks, asked.group)
        component = plan.participants.ranks if plan.participants.group is not None else (dist.get_rank(),)
        table = tell(wire, rows, component, most=_MOST_ROWS)
        found = suspects(table, norms_differ)
        if not found:
            return []
        by_kind: dict[str, list[Finding]] = {}
        for finding in findings_of(found, ask(wire, holdings, found), compared(table), pipeline is not None):
            by_kind.setdefault(finding.kind, []).append(finding)
        return [
            f"the norm may be wrong. {' '.join(told_together(findings, most=3))} Call distclip.audit(model) after a "
            "backward() to see all; check='never' does not look."
            for findings in by_kind.values()
        ]


def _told(layout: GradLayout) -> str:
    return f"{layout.system} of shape {tuple(layout.pieces[0].shape) if layout.pieces else 'unknown'}"


class _Around:
    """Reads before, compares after; unless the plan turned out to be stale, so that another clip follows."""

    def __init__(self, check: ClipCheck, plan: Plan, params: Sequence[Tensor], pipeline: RankGroup | None) -> None:
        self._check, self._plan, self._params, self._pipeline = check, plan, params, pipeline
        self._holdings: list[Holding] = []
        self._rows: list[Row] = []

    def __enter__(self) -> None:
        names, params = self._plan.names, self._params
        layouts = current_layouts(self._plan, params)
        try:
            self._holdings = holdings_of(names, params, layouts, self._pipeline)
            self._rows = quick_rows(self._holdings)
        except Exception:
            # Not reduced yet, or of no kind that can be clipped: the clip says so. The others wait for this rank.
            self._holdings = holdings_of(names, params, layouts, self._pipeline, blind=True)
            self._rows = quick_rows(self._holdings)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, StalePlan) or not isinstance(error, Exception | None):
            return
        messages = self._check.compare(self._plan, self._pipeline, self._holdings, self._rows)
        if error is None:
            for message in messages:
                warn(message, AuditWarning)
