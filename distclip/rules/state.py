"""State that a rule carries from step to step: tensors on the device of the norms, and never a look at them.

A step teaches a rule something only if it counts: non-finite norms never enter (the rule leaves them out by itself),
and what a step taught is forgotten when it turns out to be skipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from distclip.hints import shown
from distclip.rules.base import Norms, Rule

State = dict[str, Tensor]

_NAMES = "names"


class StatefulRule(Rule):
    """A rule with memory: ``decide`` reads ``recall(norms)`` and hands what it learned to ``learn``.

    In ``state_dict`` everything is a number or a list of numbers, which checkpoints keep whole: its keys are those of
    the first call, however long the lists grow and however many ranks there are. What is kept for each tensor stands
    beside the names of these, so that it finds its place under another sharding.
    """

    counts_skipped: ClassVar[bool] = False
    """Whether a step that was skipped teaches as well."""

    _state: State | None = None
    _learned: State | None = None
    # The names that the per-tensor part of _state is for.
    _names: tuple[str, ...] = ()
    # What load_state_dict brought, until it is known for which device and tensors.
    _loaded: dict[str, Any] | None = None

    def initial(self) -> dict[str, float | list[float]]:
        """What is remembered before the first step."""
        return {}

    def initial_per_tensor(self) -> dict[str, float]:
        """Likewise, of each tensor."""
        return {}

    def recall(self, norms: Norms) -> State:
        """What was learned so far, on the device of the norms, in their order of tensors."""
        device = norms.total.device
        if self._state is None:
            state = {**self.initial(), **(self._loaded or {})}
            state.pop(_NAMES, None)
            self._state = {key: _tensor(value, device) for key, value in state.items()}
            self._names = tuple((self._loaded or {}).get(_NAMES, ()))
            self._loaded = None
        names = norms.tensors.names if norms.tensors is not None and self.initial_per_tensor() else ()
        if names and names != self._names:
            self._rearrange(names, device)
        if any(value.device != device for value in self._state.values()):
            self._state = {key: value.to(device) for key, value in self._state.items()}
        return self._state

    def learn(self, **new: Tensor) -> None:
        """What will be remembered if this step counts."""
        assert self._state is not None
        self._learned = {**self._state, **new}

    def settle(self, skipped: Tensor) -> None:
        if self._learned is None or self._state is None:
            return
        if not self.counts_skipped:
            old = self._state
            self._learned = {key: torch.where(skipped.to(v.device), old[key], v) for key, v in self._learned.items()}
        self._state, self._learned = self._learned, None

    def state_dict(self) -> dict[str, Any]:
        """Everything remembered, as numbers. Waits for the device."""
        per_tensor = self.initial_per_tensor()
        if self._state is None:
            empty: dict[str, Any] = {key: [] for key in (*per_tensor, *([_NAMES] if per_tensor else []))}
            initial = {key: _as_kept(value).tolist() for key, value in self.initial().items()}
            return {**initial, **empty, **(self._loaded or {})}
        state = {key: value.tolist() for key, value in self._state.items()}
        return state | ({_NAMES: list(self._names)} if per_tensor else {})

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError where numbers cannot have come from this rule. Keys and types are right already."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; where that raises, the rule stays as it was.

        Raises:
            ValueError: it is not of such a rule; names the key.
            TypeError: it is no dict.
        """
        check_is_dict(f"state of {type(self).__name__}", state)
        # Checkpoints of other formats bring back tuples, arrays and tensors.
        plain = {key: _plain(value) for key, value in state.items()}
        self._check_form(plain)
        self.check_state(plain)
        self._loaded, self._state, self._learned = plain, None, None

    def _check_form(self, state: Mapping[str, Any]) -> None:
        """Raise where keys or types of a state are not those of this rule's."""
        rule, per_tensor, initial = type(self).__name__, self.initial_per_tensor(), self.initial()
        wanted = self.state_dict().keys()
        if state.keys() != wanted:
            raise ValueError(f"state of {rule} must hold {sorted(wanted)}, got {shown(sorted(state, key=str))}")
        names = state.get(_NAMES, []) if per_tensor else []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"state of {rule}: names must be a list of the tensors' names, got {shown(names)}")
        if len(set(names)) < len(names):
            raise ValueError(f"state of {rule}: names must be distinct, got {shown(names)}")
        for key, value in state.items():
            if key == _NAMES and per_tensor:
                continue
            start = _as_kept([per_tensor[key]] if key in per_tensor else initial[key])
            numbers = _flattened(value, start.ndim)
            if not all(map(_is_number, numbers)):
                form = "a list of numbers" if start.ndim else "a number"
                raise ValueError(f"state of {rule}: {key} must be {form}, got {shown(value)}")
            if start.ndim > 1:
                _as_kept(value)  # a ValueError where its rows differ in length
            if key in per_tensor and len(numbers) != len(names):
                raise ValueError(f"state of {rule}: {key} holds {len(numbers)} numbers for {len(names)} names")
            # A rule whose memory begins with NaN means something by it.
            if any(map(math.isnan, numbers)) and not start.isnan().any():
                raise ValueError(f"state of {rule}: {key} holds a NaN, which would never leave it")

    def _rearrange(self, names: tuple[str, ...], device: torch.device) -> None:
        """Bring what is kept for each tensor into the order of ``names``; those not seen before start anew."""
        assert self._state is not None
        places = {name: place for place, name in enumerate(self._names)}
        source = torch.tensor([places.get(name, -1) for name in names], dtype=torch.int64, device=device)
        for key, start in self.initial_per_tensor().items():
            before = self._state.get(key, torch.empty(0, dtype=torch.float64, device=device)).to(device)
            # One more at the end, where -1 points.
            self._state[key] = torch.cat((before, before.new_full((1,), start)))[source]
        self._names = names


def _tensor(value: object, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float64, copy=True)
    return torch.tensor(value, dtype=torch.float64, device=device)


def _as_kept(value: object) -> Tensor:
    """As ``recall`` has it; ``initial()`` may return whatever a tensor can be made of."""
    return _tensor(value, torch.device("cpu"))


def _plain(value: Any) -> Any:
    """Lists and numbers for a tensor, an array or a tuple; all else as it is."""
    if isinstance(value, tuple):
        return list(value)
    try:
        return value.tolist() if hasattr(value, "tolist") else value
    except Exception:  # a tensor without data, or of a layout without lists: no state, which is told by its key
        return value


def _flattened(value: object, levels: int) -> list[Any]:
    """The numbers in so many levels of lists; [None], which is none, where there are others."""
    found: list[Any] = [value]
    for _ in range(levels):
        if not all(isinstance(each, list) for each in found):
            return [None]
        found = [number for each in found for number in each]
    return found


def _is_number(value: object) -> bool:
    """Whether a float64 can hold it."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= 2**1000
    return isinstance(value, float)


def check_is_dict(what: str, state: object) -> None:
    """Raise TypeError where somebody passes something else."""
    if not isinstance(state, Mapping):
        raise TypeError(f"{what} must be a dict as state_dict() returned it, got {shown(state)}")


def check_at_least_zero(rule: str, state: Mapping[str, Any], finite: bool = False) -> None:
    """Raise ValueError where a number is negative, or (``finite``) infinite; of keys that hold numbers."""
    for key, value in state.items():
        numbers = [] if key == _NAMES else value if isinstance(value, list) else [value]
        if any(number < 0 for number in numbers) or (finite and any(map(math.isinf, numbers))):
            raise ValueError(
                f"state of {rule}: {key} must be at least 0{' and finite' if finite else ''}, got {shown(value)}"
            )


def check_window(rule: str, state: Mapping[str, Any], key: str, seen: str, length: int) -> None:
    """Raise ValueError where a window is not as long as the rule's (0: any length), or not as full as it was seen to
    be."""
    window, count = state[key], state[seen]
    if length and len(window) != length:
        raise ValueError(f"state of {rule}: {key} holds {len(window)} values, this rule looks back on {length}")
    full = sum(value != EMPTY for value in window)
    if full != (min(count, length) if length else count):
        raise ValueError(f"state of {rule}: {key} holds {full} values, but {seen} says that {shown(count)} came")


def combined_state(rules: Mapping[str, Rule]) -> dict[str, Any]:
    """The states of several rules, each under its key."""
    return {key: rule.state_dict() for key, rule in rules.items()}


def load_combined(owner: Rule, rules: Mapping[str, Rule], state: dict[str, Any]) -> None:
    """Restore what ``combined_state`` returned.

    Where that raises, all of them stay as they were.

    Raises:
        ValueError: it is of other rules.
        TypeError: it is no dict.
    """
    check_is_dict(f"state of {type(owner).__name__}", state)
    # An empty state leaves no trace in some checkpoints.
    wanted = {key for key, rule in rules.items() if rule.state_dict()}
    if not wanted <= state.keys() <= rules.keys():
        raise ValueError(
            f"state of {type(owner).__name__} must hold {sorted(rules)}, got {shown(sorted(state, key=str))}"
        )
    with whole_or_not([rules[key] for key in state]):
        for key, part in state.items():
            rules[key].load_state_dict(part)


@contextmanager
def whole_or_not(rules: Sequence[Rule]) -> Iterator[None]:
    """Around what loads the states of these: where it raises, all have those of before."""
    before = [rule.state_dict() for rule in rules]
    try:
        yield
    except Exception:
        for rule, state in zip(rules, before, strict=True):
            rule.load_state_dict(state)
        raise


# Stands where nothing is yet. No norm that counts is infinite; and unlike NaN it is equal to itself.
EMPTY = math.inf


def window_state(window: int) -> list[float]:
    """A window into which nothing has come yet."""
    return [EMPTY] * window


def pushed(window: Tensor, seen: Tensor, value: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The window and the number of values that came into it, after ``value`` has where it ``counts`` (0-d bool)."""
    here = torch.arange(window.numel(), device=window.device) == seen % max(window.numel(), 1)
    return torch.where(here & counts, value, window), seen + counts.to(seen.dtype)


def quantile(values: Tensor, q: float) -> Tensor:
    """The q-quantile of what is not EMPTY, interpolated linearly as NumPy does; NaN where all is."""
    ordered = values.sort().values
    count = (values != EMPTY).sum()
    place = q * (count - 1).clamp(min=0).to(torch.float64)
    below = place.floor()
    last = (count - 1).clamp(min=0)
    # Gathered: an index that is a 0-d tensor would be looked at by the host.
    low, high = ordered.gather(0, torch.stack((below.long(), torch.minimum(below.long() + 1, last)))).unbind()
    return low + (high - low) * (place - below)


def rank_in(values: Tensor, value: Tensor) -> Tensor:
    """The percentage of what is not EMPTY that is no larger than ``value``; 0 where all is EMPTY."""
    known = values != EMPTY
    return 100.0 * (known & (values <= value)).sum() / known.sum().clamp(min=1).to(torch.float64)
