"""Plans of parameter lists that the drop-in functions have seen, kept as long as the parameters live."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_

from torch import Tensor, nn

from distclip.layout import RankGroup, learn
from distclip.layout.memory import Mark, Memory, mark_of
from distclip.parameters import names
from distclip.plan import Plan, make_plan

# Lists that begin with the same parameter: the model, its decayed and undecayed halves, a few subsets.
_LISTS_KEPT = 16


@dataclass(frozen=True)
class _Entry:
    marks: tuple[weakref.ref[Mark], ...]
    settings: str
    pipeline: RankGroup | None
    plan: Plan

    def serves(self, params: Sequence[Tensor], settings: str | None, pipeline: RankGroup | None) -> bool:
        return (
            len(params) == len(self.marks)
            and (settings is None or (settings, pipeline) == (self.settings, self.pipeline))
            and all(map(is_, (ref() for ref in self.marks), map(mark_of, params)))
            and self.plan.holds_for(params)
        )


# By the first parameter. A rank without any takes part in its pipeline's clips all the same.
_entries: Memory[list[_Entry]] = Memory()
_without_parameters: list[_Entry] = []


def plan_for(
    modules: list[nn.Module],
    params: list[Tensor],
    settings: str | None = None,
    pipeline: RankGroup | None = None,
    linear: bool = True,
) -> Plan:
    """The plan of these parameters, made at the first call and whenever they changed. Collective when it is made.

    Args:
        modules: modules that the user passed, which may know more of their parameters than these themselves.
        params: all parameters, each once.
        settings: what the plan is for; None takes any.
        pipeline, linear: see ``make_plan``.
    """
    entries = (_entries.get(params[0]) or []) if params else _without_parameters
    for entry in entries:
        if entry.serves(params, settings, pipeline):
            return entry.plan
    for module in modules:
        learn(module)
    settings = settings or ""
    plan = make_plan(names(modules, params), params, settings=settings, pipeline=pipeline, linear=linear)
    entry = _Entry(tuple(weakref.ref(mark_of(param)) for param in params), settings, pipeline, plan)
    entries[:] = [entry, *(old for old in entries if old.plan.participants.is_current)][:_LISTS_KEPT]
    if params:
        _entries[params[0]] = entries
    return plan
