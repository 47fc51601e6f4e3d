"""Rules put together: one after the other, or each for some of the parameters."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distclip.hints import several, shown
from distclip.rules.adaptive import as_patterns
from distclip.rules.base import Bounds, Decision, Limits, Norms, Rule
from distclip.rules.norm import ClipByGlobalNorm
from distclip.rules.state import combined_state, load_combined
from distclip.rules.tensors import Patterns, matches
from distclip.rules.thresholds import checked


class _Composed(Rule):
    """What rules made of others share."""

    def _parts(self) -> dict[str, Rule]:
        raise NotImplementedError

    @property
    def norm_type(self) -> float:  # type: ignore[override]  # that of the first: what the report's total_norm is
        return next((rule.norm_type for rule in self._parts().values()), 2.0)

    def state_dict(self) -> dict[str, Any]:
        """The states of its rules, by their place."""
        return combined_state(self._parts())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_combined(self, self._parts(), state)


@dataclass
class Chain(_Composed):
    """Rules one after the other: each sees the gradients that those before it leave.

    As long as they only scale or skip, the norms that a rule leaves are known without another look, and one all-reduce
    serves all. After a rule that changes elements otherwise (``ClipByValue``, ``CentralizeGradient``, ``StableSPAM``),
    and before one with another ``norm_type``, gradients are written and measured anew: one more all-reduce each. If any
    rule skips the step, the memory of all (but that of ``SkipOnSpike``) stays as it was.

    Args:
        rules: rules, or what ``GradClipper(rule=)`` takes for one (a number is the largest global L2 norm).

    Raises:
        ValueError: there is none, or one object stands twice.
        TypeError: something in it is no rule.

    Example:
        >>> str(Chain([ClipByGlobalNorm(2.0), 1.0]))
        'global_norm=2.0 | global_norm=1.0'
    """

    rules: Sequence[Any]

    def __post_init__(self) -> None:
        if isinstance(self.rules, str) or not several(self.rules):
            raise TypeError(f"rules must be a list of rules, got {shown(self.rules)}")
        self.rules = tuple(as_rule(rule) for rule in self.rules)
        _check_distinct(self, self.rules)

    def _parts(self) -> dict[str, Rule]:
        return {str(place): rule for place, rule in enumerate(self.rules)}

    @property
    def stages(self) -> tuple[Rule, ...]:
        return tuple(stage for rule in self.rules for stage in rule.stages)


@dataclass
class PerGroup(_Composed):
    """A rule for each group of parameters, each with its own norm.

    ``report.total_norm`` is still that of all gradients, ``report.threshold`` the smallest of the groups'. Costs what
    the most expensive of its rules does.

    Args:
        rules: by pattern (``fnmatch``) of parameter names, or by a tuple of patterns, a rule or what ``GradClipper``
            takes for one. The first match wins; parameters that nothing matches are left alone.

    Raises:
        ValueError: there is none, one object stands twice, or rules have different ``norm_type``s.
        TypeError: something in it is no rule, or no pattern.

    Example:
        >>> PerGroup({"head.*": ClipByGlobalNorm(0.5), "*": 1.0})
        PerGroup('head.* -> global_norm=0.5 ; * -> global_norm=1.0')
    """

    rules: Mapping[Any, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.rules, Mapping):
            raise TypeError(f"rules must be a dict of rules by patterns of names, got {shown(self.rules)}")
        self.rules = {as_patterns("rules", key): as_rule(rule) for key, rule in self.rules.items()}
        chosen = list(self.rules.values())
        _check_distinct(self, chosen)
        stages = [rule.stages for rule in chosen]
        types = {stage.norm_type for each in stages for stage in each}
        if len(types) > 1:
            raise ValueError(f"the rules of PerGroup must have one norm_type, got {sorted(types)}")
        longest = max(map(len, stages))
        self._stages = tuple(
            _GroupStage(tuple(self.rules), tuple(each[place] if place < len(each) else None for each in stages))
            for place in range(longest)
        )

    @classmethod
    def by_optimizer(cls, model: nn.Module, optimizer: Optimizer, key: str = "max_norm") -> PerGroup:
        """The largest global norm of each param group from its entry ``key``; groups without it are left alone.

        Raises:
            ValueError: no group has the entry, or a parameter of one that has is not in the model.
        """
        from distclip.parameters import named_parameters  # the names by which clippers know parameters

        names = {id(param): name for name, param in reversed(list(named_parameters(model)))}
        rules: dict[Patterns, float] = {}
        for group in optimizer.param_groups:
            if key in group:
                unknown = [param for param in group["params"] if id(param) not in names]
                if unknown:
                    raise ValueError(
                        f"a param group with {key!r} has a parameter of shape {tuple(unknown[0].shape)} that is not in "
                        "the model: make the optimizer after the model is wrapped"
                    )
                rules[tuple(glob.escape(names[id(param)]) for param in group["params"])] = group[key]
        if not rules:
            raise ValueError(f"no param group of the optimizer has an entry {key!r}")
        return cls(rules)

    def __repr__(self) -> str:
        return f"PerGroup({str(self)!r})"

    def _parts(self) -> dict[str, Rule]:
        return {str(place): rule for place, rule in enumerate(self.rules.values())}

    @property
    def stages(self) -> tuple[Rule, ...]:
        return self._stages


class _GroupStage(Rule):
    """The same stage of the rules of all groups."""

    needs_per_tensor = True
    needs_tensors = True

    def __init__(self, patterns: tuple[Patterns, ...], rules: tuple[Rule | None, ...]) -> None:
        self._patterns, self._rules = patterns, rules
        present = [rule for rule in rules if rule is not None]
        self.norm_type = present[0].norm_type
        for need in ("needs_units", "needs_means", "needs_loss", "reshapes", "may_skip"):
            setattr(self, need, any(getattr(rule, need) for rule in present))
        # Matching patterns takes longer than a clip: once for all steps with the same tensors.
        self._known_names: tuple[str, ...] = ()
        self._known: list[tuple[int, Rule]] = []
        self._limits = any(rule.limits_elements for rule in present)
        self.needs_extremes = self._limits or any(rule.needs_extremes for rule in present)

    @property
    def limits_elements(self) -> bool:
        return self._limits

    def limits(self, names: Sequence[str], step: int) -> Limits | None:
        if not self._limits:
            return None
        found: dict[int, Bounds] = {}
        for place, rule in self._limiting(tuple(names)):
            bounds = rule.limits(names[place : place + 1], step)
            if isinstance(bounds, tuple):
                found[place] = bounds
        return found

    def _limiting(self, names: tuple[str, ...]) -> list[tuple[int, Rule]]:
        """The tensors whose elements are limited, and by which rule."""
        if self._known_names != names:
            firsts = [
                next((rule for key, rule in zip(self._patterns, self._rules, strict=True) if matches(name, key)), None)
                for name in names
            ]
            self._known = [(place, rule) for place, rule in enumerate(firsts) if rule is not None]
            self._known_names = names
        return [(place, rule) for place, rule in self._known if rule.limits_elements]

    def decide(self, norms: Norms) -> Decision:
        assert norms.tensors is not None
        joined = _Joined(norms)
        for rule, places in zip(self._rules, norms.tensors.matched(self._patterns), strict=True):
            if rule is not None and places:
                joined.add(places, rule.decide(norms.of(places)))
        return joined.decision()

    def settle(self, skipped: Tensor) -> None:
        for rule in self._rules:
            if rule is not None:
                rule.settle(skipped)


class _Joined:
    """The decisions on parts of the tensors as one on all."""

    def __init__(self, norms: Norms) -> None:
        assert norms.tensors is not None
        self._norms, self._tensors = norms, norms.tensors
        self._coefficient: Tensor | None = None
        self._outliers: tuple[Tensor, Tensor] | None = None
        self._shift: Tensor | None = None
        self._thresholds: list[Tensor] = []
        self._skips: list[Tensor] = []
        self._bites: list[Tensor] = []

    def add(self, places: tuple[int, ...], decision: Decision) -> None:
        part = self._tensors.part(places)
        if decision.coefficient is not None:
            self._put(part.index, part.units, part.tensors.spread, decision.coefficient)
        if decision.outliers is not None:
            if self._outliers is None:
                ones = torch.ones_like(self._tensors.numels)
                self._outliers = ones * torch.inf, ones
            self._outliers[0][part.index], self._outliers[1][part.index] = decision.outliers
        if decision.shift is not None:
            if self._shift is None:
                self._shift = self._tensors.numels.new_zeros(self._tensors.unit_count)
            self._shift[part.units] = decision.shift
        self._thresholds.append(decision.threshold)
        self._skips += [] if decision.skip is None else [decision.skip]
        self._bites += [] if decision.bite is None else [decision.bite]

    def _put(self, index: Tensor, units: Tensor, spread: Callable[[Tensor], Tensor], values: Tensor) -> None:
        """Coefficients of one group: for each tensor as long as that is enough, else for each unit."""
        if self._coefficient is None:
            self._coefficient = torch.ones_like(self._tensors.numels)
        by_unit = values.ndim > 0 and values.numel() != index.numel()
        if by_unit or self._coefficient.numel() != len(self._tensors.names):
            self._coefficient = self._tensors.spread(self._coefficient).clone()
            self._coefficient[units] = spread(values)
        else:
            self._coefficient[index] = values

    def decision(self) -> Decision:
        return Decision(
            self._coefficient,
            torch.stack(self._thresholds).amin() if self._thresholds else torch.full_like(self._norms.total, torch.inf),
            torch.stack(self._skips).any() if self._skips else None,
            self._outliers,
            self._shift,
            torch.stack(self._bites).amin() if self._bites else None,
        )


@contextmanager
def refused_if_endless(rule: object) -> Iterator[None]:
    """Around what builds a rule of lists and dicts.

    Raises:
        ValueError: one of them holds itself, or they lie too deep for Python's stack.
    """
    try:
        yield
    except RecursionError:
        raise ValueError(f"rule holds itself, or is nested too deeply: {shown(rule)}") from None


def as_rule(rule: object) -> Rule:
    """What a user passed as ``rule=``: a Rule, a number, a list (``Chain``) or a dict (``PerGroup``).

    Raises:
        TypeError: it is something else.
        ValueError: a list that holds itself.
    """
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, Mapping | list | tuple):
        with refused_if_endless(rule):
            return PerGroup(rule) if isinstance(rule, Mapping) else Chain(rule)
    hint = ": build it by distclip.rules.parse(text)" if isinstance(rule, str) else ""
    if isinstance(rule, bool) or not isinstance(rule, Real):
        raise TypeError(f"rule must be a number (the largest global L2 norm) or a Rule, got {shown(rule)}{hint}")
    return ClipByGlobalNorm(checked("max_norm", rule))


def _check_distinct(owner: Rule, rules: Iterable[Rule]) -> None:
    several = list(rules)
    if not several:
        raise ValueError(f"{type(owner).__name__} needs at least one rule")
    if len({id(rule) for rule in several}) < len(several):
        raise ValueError(
            f"{type(owner).__name__} holds one rule object twice, which would mix their memories: make two"
        )
