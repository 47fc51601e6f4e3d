"""A clipping rule: mathematics on norms, ignorant of ranks and shards."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Norms:
    """What a rule sees of one step's gradients. Float64, of the full (unsharded) tensors, equal on every rank."""

    total: Tensor
    """The rule's ``norm_type`` norm over all gradients, 0-d."""
    per_tensor: Tensor | None = None
    """The same norm of each tensor, shape ``(tensors,)``, where the rule asked for it."""
    extremes: Tensor | None = None
    """The largest of -g and of g over all elements, shape ``(2,)``, where the rule limits elements."""

    def divided_by(self, scale: Tensor) -> Norms:
        """The norms of gradients that are ``scale`` times smaller."""
        parts = (self.total, self.per_tensor, self.extremes)
        return Norms(*(part if part is None else part / scale for part in parts))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Decision:
    """What a rule makes of the norms. Tensors stay on the device of the norms it was given."""

    coefficient: Tensor | None
    """Factor for every gradient (0-d), or for each tensor (shape ``(tensors,)``); None changes nothing."""
    threshold: Tensor
    """What the norms were held against, 0-d; for the report."""


class Rule:
    """Base of all clipping rules. A subclass says which norms it needs and maps them to coefficients.

    Example:
        >>> class Halve(Rule):
        ...     def decide(self, norms: Norms) -> Decision:
        ...         return Decision(coefficient=torch.full_like(norms.total, 0.5), threshold=norms.total / 2)
    """

    norm_type: float = 2.0
    """The p of every norm handed to ``decide``, and of the report's ``total_norm``."""
    needs_per_tensor: bool = False
    separable: bool = False
    """Whether each tensor's coefficient follows from its own norm alone, and ``decide`` remembers nothing: a tensor can
    be clipped before the others' gradients exist (``GradClipper.clip_in_backward``)."""
    bounds: tuple[float, float] | None = None
    """Where set, elements are limited to it and nothing is multiplied: the coefficient only tells how hard it bit."""

    @property
    def signature(self) -> str:
        """A text that is the same on all ranks whose rules are: what they compare in each clip."""
        return repr(self) if is_dataclass(self) else type(self).__qualname__

    def decide(self, norms: Norms) -> Decision:
        """Map one step's norms to what is done with its gradients.

        Called on every rank with the same values, and must return the same: no rank-dependent branches.
        """
        raise NotImplementedError(f"{type(self).__name__} must define decide(norms) -> Decision")

    def state_dict(self) -> dict[str, Any]:
        """What the rule must carry from step to step to resume exactly; empty for a fixed threshold."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but state_dict holds {sorted(state)}")


def checked(name: str, value: float, *, above_zero: bool = False) -> float:
    """``value`` as a float that can serve as a threshold.

    Raises:
        ValueError: it is NaN or negative (or 0, where it must be above).
        TypeError: it is not a number.
    """
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, got {value!r}") from error
    if number > 0 or (number == 0 and not above_zero):
        return number
    raise ValueError(f"{name} must be {'above 0' if above_zero else 'at least 0'}, got {value!r}")
