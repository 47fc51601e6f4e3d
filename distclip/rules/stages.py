"""Which rules of a step can decide on the norms of one measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

from torch import Tensor

from distclip.rules.base import Decision, Norms, Rule

_PASSES = "_distclip_passes"


@dataclass(frozen=True)
class Pass:
    """Stages that one measurement serves, and what it has to bring: one read of the gradients, one all-reduce."""

    stages: tuple[Rule, ...]
    signature: str
    """Of the rule that the stages are of; the same on all ranks."""
    norm_type: float
    needs_per_tensor: bool
    needs_tensors: bool
    needs_extremes: bool
    needs_units: bool
    needs_means: bool
    needs_loss: bool
    limits_elements: bool
    reshapes: bool

    @classmethod
    def of(cls, stages: Sequence[Rule], signature: str) -> Pass:
        """The pass of these stages."""
        wanted = {name: any(getattr(stage, name) for stage in stages) for name in _FLAGS}
        wanted["needs_tensors"] |= wanted["needs_units"] or wanted["needs_means"]
        return cls(stages=tuple(stages), signature=signature, norm_type=stages[0].norm_type, **wanted)

    @property
    def linear(self) -> bool:
        """Whether the norm of a sum of parts is all that is asked for, so that Partial gradients can stay so."""
        return not (self.reshapes or self.needs_extremes or self.needs_units or self.needs_means)

    @cached_property
    def wants(self) -> str:
        """A text of what is measured: ranks that differ in it would reduce buffers of different sizes."""
        told = {
            "needs_per_tensor": "norms per tensor",
            "limits_elements": "limits elements",
            "needs_tensors": "names",
            "needs_extremes": "extremes per tensor",
            "needs_units": "norms per row",
            "needs_means": "means per row",
            "needs_loss": "loss",
        }
        return ", ".join([f"norm_type={self.norm_type}", *(text for name, text in told.items() if getattr(self, name))])

    def detailed(self) -> Pass:
        """With the norm of every tensor, whatever the rules need."""
        return replace(self, needs_per_tensor=True)

    def decide(self, norms: Norms) -> list[Decision]:
        """What each stage makes of the norms that those before it leave."""
        decisions = []
        for stage in self.stages:
            decision = stage.decide(norms)
            decisions.append(decision)
            norms = norms.after(decision.coefficient)
        return decisions

    def settle(self, skipped: Tensor) -> None:
        """Tell every stage whether the step counts."""
        for stage in self.stages:
            stage.settle(skipped)


_FLAGS = tuple(field.name for field in fields(Pass) if field.type == "bool")


def passes_of(rule: Rule) -> list[Pass]:
    """The rule's stages, cut where the norms that a stage leaves do not follow from those it was given."""
    stages, signature = rule.stages, rule.signature
    key = (signature, *((id(stage), stage.norm_type, stage.limits_elements) for stage in stages))
    # Kept on the rule: each clip asks several times.
    known, passes = vars(rule).get(_PASSES, (None, []))
    if known != key:
        passes = _cut(stages, signature)
        vars(rule)[_PASSES] = key, passes
    return list(passes)


def forget_passes(rule: Rule) -> None:
    """Let go of what ``passes_of`` keeps on a rule that was made for one clip.

    A rule that is a stage of its own passes would wait for the garbage collector, which long runs switch off.
    """
    vars(rule).pop(_PASSES, None)


def _cut(stages: Sequence[Rule], signature: str) -> list[Pass]:
    groups: list[list[Rule]] = []
    for stage in stages:
        if not groups or _starts_anew(groups[-1], stage):
            groups.append([])
        groups[-1].append(stage)
    return [Pass.of(group, signature) for group in groups]


def _starts_anew(before: list[Rule], stage: Rule) -> bool:
    looks_closer = stage.limits_elements or stage.needs_extremes or stage.needs_units or stage.needs_means
    uneven = any(rule.needs_per_tensor or rule.needs_units for rule in before)
    by_unit = any(rule.needs_units for rule in before) and stage.norm_type != 2.0
    return before[-1].reshapes or before[-1].norm_type != stage.norm_type or (looks_closer and uneven) or by_unit
