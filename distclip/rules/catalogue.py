"""All rules in one table."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields

from distclip.rules.base import Rule
from distclip.rules.text import NAMES


@dataclass(frozen=True)
class Entry:
    """One rule."""

    name: str
    """As ``parse`` takes it."""
    rule: type[Rule]
    mathematics: str
    defaults: str
    state: str
    paper: str


class Catalogue(list[Entry]):
    """The entries; printed, a table."""

    def __str__(self) -> str:
        head = ("name", "class", "mathematics", "defaults", "state", "paper or implementation")
        rows = [head, *((e.name, e.rule.__name__, e.mathematics, e.defaults, e.state, e.paper) for e in self)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines)


_TOLD = {
    "global_norm": ("g * min(1, c / (N + 1e-6))", "-", "arXiv 1211.5063; torch"),
    "norm": ("g * c / max(n, c), each tensor", "-", "tf.clip_by_norm; Keras clipnorm"),
    "value": ("max(min(g, hi), lo), each element", "-", "torch clip_grad_value_; optax clip"),
    "average_norm": ("g * c / max(n / numel, c), each tensor", "-", "tf.clip_by_average_norm"),
    "block_rms": ("g / max(1, rms(g) / d), each tensor", "-", "arXiv 1804.04235; optax clip_by_block_rms"),
    "agc": ("g * min(1, f * max(|W|, eps) / max(|G|, 1e-6)), each row", "-", "arXiv 2102.06171; timm"),
    "normalize": ("g * c / (N + 1e-6)", "-", "optax normalize_by_update_norm"),
    "centralize": ("g - mean(g), each row", "-", "arXiv 2004.01461; optax centralize"),
    "autoclip": ("c = percentile of the norms so far", "norms", "arXiv 2007.14469"),
    "quantile": ("c = factor * quantile of the last norms", "norms", "-"),
    "zclip": ("c from mean and variance of N where it spikes", "3 numbers", "arXiv 2504.02507; zclip"),
    "adagc": ("g * min(1, lambda_rel * gamma / n), gamma an EMA of n", "1 a tensor", "arXiv 2502.11034"),
    "ema_ratio": ("g * min(1, ratio * ema / (n + 1e-6))", "1 a tensor", "-"),
    "stable_spam": ("spikes damped, then g / n * EMA(n) / sqrt(EMA(n^2))", "5 a tensor", "arXiv 2502.17055"),
    "skip_above": ("no step where N > c", "-", "-"),
    "skip_on_spike": ("no step where N - mean > sigma * std", "norms, losses", "OLMo-core SkipStepOptimizer"),
}


def catalogue() -> Catalogue:
    """Every rule: its name, mathematics in one line, defaults, state and paper. ``print`` it for a table.

    g is a gradient, n its norm, N the norm of all, c the threshold.

    Example:
        >>> catalogue()[0].mathematics
        'g * min(1, c / (N + 1e-6))'
    """
    return Catalogue(Entry(name, NAMES[name], *_entry(name)) for name in NAMES)


def _entry(name: str) -> tuple[str, str, str, str]:
    mathematics, state, paper = _TOLD[name]
    given = [
        field.name if field.default is MISSING else f"{field.name}={field.default!r}"
        for field in fields(NAMES[name])  # type: ignore[arg-type]  # all of NAMES are dataclasses
    ]
    return mathematics, ", ".join(given) or "-", state, paper
