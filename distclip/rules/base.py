"""A clipping rule: mathematics on norms, ignorant of ranks and shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distclip.hints import shown
from distclip.rules.tensors import Tensors
from distclip.rules.thresholds import schedule_name

Bounds = tuple[float, float]
Limits = Bounds | Mapping[int, Bounds]
"""The smallest and the largest element let through: of all tensors, or by the place of each that is limited."""


@dataclass(frozen=True)
class Norms:
    """What a rule sees of one step's gradients. Float64, of the full (unsharded) tensors, equal on every rank."""

    total: Tensor
    """The rule's ``norm_type`` norm over all gradients, 0-d."""
    per_tensor: Tensor | None = None
    """The same norm of each tensor, shape ``(tensors,)``, where the rule asked for it."""
    extremes: Tensor | None = None
    """The largest of -g and of g over all elements, shape ``(2,)``, where the rule limits elements."""
    per_tensor_extremes: Tensor | None = None
    """The same of each tensor, shape ``(tensors, 2)``, where the rule ``needs_extremes``. Complex: of the modulus."""
    unit_norms: Tensor | None = None
    """L2 norm of each unit's gradient (see ``Tensors``), shape ``(units,)``, where the rule ``needs_units``."""
    weight_norms: Tensor | None = None
    """L2 norm of each unit's parameters; likewise."""
    unit_means: Tensor | None = None
    """Mean of each unit's gradient, shape ``(units,)``, where the rule ``needs_means``."""
    tensors: Tensors | None = None
    """Names and shapes, where the rule ``needs_tensors`` (or units)."""
    step: int = 0
    """Number of clips before this one."""
    loss: Tensor | None = None
    """What was passed to ``clip(loss=...)``, the mean over the ranks; NaN where nothing was. 0-d, where the rule
    ``needs_loss``."""
    norm_type: float = 2.0

    @property
    def finite(self) -> Tensor:
        """Whether all gradients are finite; 0-d bool."""
        return self.total.isfinite()

    def divided_by(self, scale: Tensor) -> Norms:
        """The norms of gradients that are ``scale`` (above 0) times smaller."""
        names = ("total", "per_tensor", "extremes", "per_tensor_extremes", "unit_norms", "unit_means")
        parts = {name: getattr(self, name) for name in names}
        return replace(self, **{name: part / scale for name, part in parts.items() if part is not None})

    def after(self, coefficient: Tensor | None) -> Norms:
        """The norms that these gradients have when they are multiplied by the coefficient of a ``Decision``."""
        if coefficient is None:
            return self
        if coefficient.ndim == 0:
            return self.divided_by(1.0 / coefficient)
        units = self.unit_norms
        per_tensor = self.per_tensor
        if per_tensor is None or (self.tensors is not None and coefficient.numel() != len(self.tensors.names)):
            assert units is not None
            assert self.tensors is not None
            units = units * coefficient
            squares = torch.zeros_like(self.tensors.numels).index_add_(0, self.tensors.owners, units.square())
            per_tensor = squares.sqrt()
        else:
            assert per_tensor is not None
            per_tensor = per_tensor * coefficient
            units = units if units is None or self.tensors is None else units * self.tensors.spread(coefficient)
        total = torch.linalg.vector_norm(per_tensor, self.norm_type)
        # What is not known any more is not asked for either: a rule that needs it is measured for anew (see ``Pass``).
        return replace(self, total=total, per_tensor=per_tensor, unit_norms=units, unit_means=None, extremes=None)

    def of(self, places: tuple[int, ...]) -> Norms:
        """The norms of some of the tensors alone."""
        assert self.tensors is not None
        assert self.per_tensor is not None
        part = self.tensors.part(places)
        per_tensor = self.per_tensor[part.index]
        ends = None if self.per_tensor_extremes is None else self.per_tensor_extremes[part.index]
        by_unit = {
            name: values[part.units]
            for name in ("unit_norms", "weight_norms", "unit_means")
            if (values := getattr(self, name)) is not None
        }
        return replace(
            self,
            total=torch.linalg.vector_norm(per_tensor, self.norm_type),
            per_tensor=per_tensor,
            extremes=None if ends is None else ends.amax(0),
            per_tensor_extremes=ends,
            tensors=part.tensors,
            **by_unit,
        )


@dataclass(frozen=True)
class Decision:
    """What a rule makes of the norms. Tensors stay on the device of the norms it was given."""

    coefficient: Tensor | None
    """Factor for every gradient (0-d), for each tensor (shape ``(tensors,)``) or each unit (shape ``(units,)``); None
    changes nothing."""
    threshold: Tensor
    """What the norms were held against, 0-d; for the report."""
    skip: Tensor | None = None
    """Whether to leave this step out on all ranks; 0-d bool."""
    outliers: tuple[Tensor, Tensor] | None = None
    """Elements of a modulus above the first are multiplied by the second; shape ``(tensors,)`` both."""
    shift: Tensor | None = None
    """What is subtracted from every element of each unit; shape ``(units,)``."""
    bite: Tensor | None = None
    """The smallest factor that an element met where elements are changed one by one, 0-d; for the report."""
    quantities: Mapping[str, Tensor] = field(default_factory=dict)
    """What else the rule went by, for the report; 0-d, by name."""


class Rule:
    """Base of all clipping rules. A subclass says which statistics it needs and maps them to coefficients.

    Example:
        >>> class Halve(Rule):
        ...     def decide(self, norms: Norms) -> Decision:
        ...         return Decision(coefficient=torch.full_like(norms.total, 0.5), threshold=norms.total / 2)
    """

    norm_type: float = 2.0
    """The p of every norm handed to ``decide``, and of the report's ``total_norm``."""
    needs_per_tensor: bool = False
    """Whether ``norms.per_tensor`` is wanted."""
    needs_tensors: bool = False
    """Whether ``norms.tensors`` is: names and shapes. Gathered once, when the plan is built."""
    needs_extremes: bool = False
    """Whether ``norms.per_tensor_extremes`` is."""
    needs_units: bool = False
    """Whether ``norms.unit_norms`` and ``weight_norms`` are: two float64 for each row in the all-reduce."""
    needs_means: bool = False
    """Whether ``norms.unit_means`` is: one float64 for each row."""
    needs_loss: bool = False
    """Whether ``norms.loss`` is."""
    reshapes: bool = False
    """Whether elements are changed otherwise than by a coefficient (``bounds``, ``Decision.outliers``, ``shift``): the
    next rule of a chain is then measured for anew."""
    may_skip: bool = False
    """Whether ``Decision.skip`` is ever set."""
    separable: bool = False
    """Whether each tensor's coefficient follows from its own norm alone, and ``decide`` remembers nothing: a tensor can
    be clipped before the others' gradients exist (``GradClipper.clip_in_backward``)."""
    bounds: Bounds | None = None
    """Where set, elements are limited to it."""

    @property
    def signature(self) -> str:
        """A text that is the same on all ranks whose rules are: what they compare in each clip."""
        # A rule of one's own need not be a dataclass.
        known: dict[str, Any] = getattr(self, "__dataclass_fields__", {})
        arguments = f"({', '.join(f'{name}={_told(getattr(self, name))}' for name in known)})"
        return type(self).__qualname__ + (arguments if is_dataclass(self) else "")

    @property
    def stages(self) -> tuple[Rule, ...]:
        """The rules that make up this one, in order; itself, unless it is put together of several."""
        return (self,)

    @property
    def limits_elements(self) -> bool:
        """Whether ``limits`` ever gives any."""
        return self.bounds is not None

    def limits(self, names: Sequence[str], step: int) -> Limits | None:
        """What elements are limited to in this step; ``names`` as in ``Tensors``, where the rule ``needs_tensors``."""
        return self.bounds

    def decide(self, norms: Norms) -> Decision:
        """Map one step's norms to what is done with its gradients.

        Called on every rank with the same values, and must return the same: no rank-dependent branches.
        """
        raise NotImplementedError(f"{type(self).__name__} must define decide(norms) -> Decision")

    def settle(self, skipped: Tensor) -> None:
        """Called when all rules have decided: keep what this step taught, or forget it where it is ``skipped``."""

    def state_dict(self) -> dict[str, Any]:
        """What the rule must carry from step to step to resume exactly; empty for a fixed threshold."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        # Not state != {}: an array has no truth value.
        if not isinstance(state, dict) or state:
            held = sorted(state, key=str) if isinstance(state, Mapping) else state
            raise ValueError(f"{type(self).__name__} keeps no state, but state_dict holds {shown(held)}")

    def __str__(self) -> str:
        from distclip.rules.text import text_of  # which knows all rules

        return text_of(self)


def _told(value: object) -> str:
    """A field's value, the same text on every rank."""
    if isinstance(value, Rule):
        return value.signature
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_told, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_told(item)}' for key, item in value.items())}}}"
    return f"<{schedule_name(value)}>" if callable(value) else repr(value)


def held_to(limit: Tensor | float, norm: Tensor) -> Tensor:
    """``min(1, limit / norm)``; 1 where the norm is 0 or NaN."""
    return torch.where(norm > limit, limit / norm, 1.0)


def full(norms: Norms, value: float | Tensor) -> Tensor:
    """``value`` as a threshold for the report."""
    if isinstance(value, Tensor):
        return value.to(norms.total.dtype).clone()
    return torch.full_like(norms.total, value)
