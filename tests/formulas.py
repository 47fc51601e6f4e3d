"""Every rule as a few lines of NumPy on whole gradients in one process, straight from its definition."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distclip import rules

Array = NDArray[np.float64]
Whole = dict[str, Array]


def norm_of(grads: Whole) -> float:
    return float(np.sqrt(sum(float((grad**2).sum()) for grad in grads.values())))


@dataclass
class Formula:
    """A rule's definition: from one step's gradients and weights to what they become; None where it is skipped."""

    rule: Callable[[], rules.Rule]
    step: Callable[["Formula", Whole, Whole], Whole | None]
    state: dict[str, Any] = field(default_factory=dict)

    def __call__(self, grads: Whole, weights: Whole) -> Whole | None:
        return self.step(self, copy.deepcopy(grads), weights)


def scaled(grads: Whole, factor: float) -> Whole:
    return {name: grad * factor for name, grad in grads.items()}


def each(change: Callable[[Array, float], Array]) -> Callable[[Formula, Whole, Whole], Whole]:
    """A formula of one tensor and its norm."""

    def step(self: Formula, grads: Whole, weights: Whole) -> Whole:
        return {name: change(grad, float(np.sqrt((grad**2).sum()))) for name, grad in grads.items()}

    return step


def rows(array: Array) -> Array:
    """L2 norm of each unit, in a shape that broadcasts."""
    axes = tuple(range(1, array.ndim)) if array.ndim > 1 else None
    return np.asarray(np.sqrt((array**2).sum(axis=axes, keepdims=True)))


def agc(self: Formula, grads: Whole, weights: Whole) -> Whole:
    result = {}
    for name, grad in grads.items():
        limit = 0.01 * np.maximum(rows(weights[name]), 1e-3)
        result[name] = grad if "up" in name else grad * np.minimum(1, limit / np.maximum(rows(grad), 1e-6))
    return result


def centralize(grad: Array, norm: float) -> Array:
    return grad - grad.mean(axis=tuple(range(1, grad.ndim)), keepdims=True) if grad.ndim > 1 else grad


def global_clip(grads: Whole, limit: float) -> Whole:
    return scaled(grads, min(1.0, limit / (norm_of(grads) + 1e-6)))


def autoclip(self: Formula, grads: Whole, weights: Whole) -> Whole:
    history = self.state.setdefault("norms", [])
    history.append(norm_of(grads))
    return global_clip(grads, float(np.percentile(history, 30)))


def median(self: Formula, grads: Whole, weights: Whole) -> Whole:
    history = self.state.setdefault("norms", [])
    history.append(norm_of(grads))
    return global_clip(grads, 0.9 * float(np.quantile(history[-3:], 0.5)))


def zclip(self: Formula, grads: Whole, weights: Whole) -> Whole:
    total, state = norm_of(grads), self.state
    buffer = state.setdefault("buffer", [])
    if len(buffer) < 3:
        buffer.append(total)
        state["mean"], state["var"] = float(np.mean(buffer)), float(np.var(buffer))
        return global_clip(grads, 50.0)
    z = (total - state["mean"]) / (np.sqrt(state["var"]) + 1e-6)
    limit = state["mean"] + 0.5 * np.sqrt(state["var"]) / (z / 0.5) if z > 0.5 else None
    x = total if limit is None else limit
    state["mean"] = 0.97 * state["mean"] + 0.03 * x
    state["var"] = 0.97 * state["var"] + 0.03 * (x - state["mean"]) ** 2
    effective = min(total if limit is None else limit, 50.0)
    return global_clip(grads, effective) if total > effective else grads


def adagc(self: Formula, grads: Whole, weights: Whole) -> Whole:
    gamma, step = self.state.setdefault("gamma", {}), self.state.setdefault("step", 0)
    self.state["step"] += 1
    total, result = norm_of(grads), {}
    for name, grad in grads.items():
        n = float(np.sqrt((grad**2).sum()))
        known = gamma.get(name)
        if n == 0:
            result[name] = grad
        elif step + 1 < 2:
            h = min(1.0, 1.0 / total)
            gamma[name] = h * n if known is None else min(known, h * n)
            result[name] = grad * h
        else:
            h = 1.0 if known is None else min(1.0, 1.05 * known / n)
            gamma[name] = h * n if known is None else 0.98 * known + 0.02 * h * n
            result[name] = grad * h
    return result


def ema_ratio(self: Formula, grads: Whole, weights: Whole) -> Whole:
    result = {}
    for name, grad in grads.items():
        n = float(np.sqrt((grad**2).sum()))
        ema = self.state.get(name)
        s = min(1.0, 0.9 * (n if ema is None else ema) / (n + 1e-6))
        if n > 0:
            self.state[name] = n if ema is None else 0.5 * ema + 0.5 * s * n
        result[name] = grad * s
    return result


def stable_spam(self: Formula, grads: Whole, weights: Whole) -> Whole:
    result = {}
    for name, grad in grads.items():
        largest = np.abs(grad).max(initial=0.0)
        if largest == 0:
            result[name] = grad
            continue
        m, a, b, t = self.state.get(name, (0.0, 0.0, 0.0, 0))
        t, m = t + 1, 0.999 * m + 0.001 * largest
        limit = m / (1 - 0.999**t)
        if largest > limit * (1 + 1e-12):
            grad = np.where(np.abs(grad) > limit, grad / largest * limit, grad)
        n = np.sqrt((grad**2).sum())
        a, b = 0.7 * a + 0.3 * n, 0.9 * b + 0.1 * n**2
        self.state[name] = (m, a, b, t)
        result[name] = grad / n * (a / (1 - 0.7**t)) / (np.sqrt(b / (1 - 0.9**t)) + 1e-8)
    return result


def skip_on_spike(self: Formula, grads: Whole, weights: Whole) -> Whole | None:
    history = self.state.setdefault("norms", [])
    total, window = norm_of(grads), history[-4:]
    history.append(total)
    return None if len(window) >= 2 and total - np.mean(window) > 0.5 * np.std(window, ddof=1) else grads


def rows_norm(grad: Array) -> float:
    return max(float(np.sqrt((grad**2).sum())), 1e-300)


def by_norm(grads: Whole, limit: float) -> Whole:
    return {name: grad * min(1.0, limit / rows_norm(grad)) for name, grad in grads.items()}


def chain(self: Formula, grads: Whole, weights: Whole) -> Whole:
    limited = {name: np.clip(grad, -0.5, 0.7) for name, grad in global_clip(by_norm(grads, 8.0), 6.0).items()}
    return global_clip(limited, 2.0)


def per_group(self: Formula, grads: Whole, weights: Whole) -> Whole:
    blocks = {name: grad for name, grad in grads.items() if "blocks.0" in name}
    norms = {name: grad for name, grad in grads.items() if "norm" in name and name not in blocks}
    rest = {name: grad for name, grad in grads.items() if name not in blocks and name not in norms}
    limited = {name: np.clip(grad, -0.2, 0.2) for name, grad in norms.items()}
    return {**rest, **global_clip(blocks, 1.5), **limited}


def per_group_rows(self: Formula, grads: Whole, weights: Whole) -> Whole:
    ones = {name: centralize(grad, 0.0) for name, grad in grads.items() if "blocks.1" in name}
    norms = {name: grad for name, grad in grads.items() if "norm" in name and name not in ones}
    rest = {name: grad for name, grad in grads.items() if name not in ones and name not in norms}
    return {**agc(self, rest, weights), **global_clip(ones, 1.5), **by_norm(norms, 0.3)}


def total(limit: Callable[[Whole], float]) -> Callable[[Formula, Whole, Whole], Whole]:
    return lambda self, grads, weights: global_clip(grads, limit(grads))


FORMULAS: dict[str, Callable[[], Formula]] = {
    name: (lambda rule=rule, step=step: Formula(rule, step))  # type: ignore[misc]
    for name, rule, step in [
        ("global_norm", lambda: rules.ClipByGlobalNorm(2.0), total(lambda grads: 2.0)),
        ("norm", lambda: rules.ClipByNorm(1.5), each(lambda g, n: g * (1.5 / max(n, 1.5)))),
        ("value", lambda: rules.ClipByValue((-0.2, 0.5)), each(lambda g, n: np.clip(g, -0.2, 0.5))),
        (
            "average_norm",
            lambda: rules.ClipByAverageNorm(0.1),
            each(lambda g, n: g * (0.1 / max(n / max(g.size, 1), 0.1))),
        ),
        (
            "block_rms",
            lambda: rules.ClipByBlockRMS(0.3),
            each(lambda g, n: g / max(1.0, n / max(g.size, 1) ** 0.5 / 0.3)),
        ),
        ("agc", lambda: rules.AdaptiveGradientClipping(exclude=("*up*",)), agc),
        (
            "normalize",
            lambda: rules.NormalizeGradient(3.0),
            lambda self, grads, weights: scaled(grads, 3.0 / (norm_of(grads) + 1e-6)),
        ),
        ("centralize", rules.CentralizeGradient, each(centralize)),
        ("autoclip", lambda: rules.AutoClip(30), autoclip),
        ("quantile", lambda: rules.QuantileClip(0.5, 3, 0.9), median),
        ("zclip", lambda: rules.ZClip(z_thresh=0.5, max_norm=50.0, warmup_steps=3), zclip),
        ("adagc", lambda: rules.AdaGC(warmup_steps=2), adagc),
        ("ema_ratio", lambda: rules.EMARatioClip(0.9, 0.5), ema_ratio),
        ("stable_spam", rules.StableSPAM, stable_spam),
        (
            "skip_above",
            lambda: rules.SkipAbove(20.0),
            lambda self, grads, weights: None if norm_of(grads) > 20.0 else grads,
        ),
        ("skip_on_spike", lambda: rules.SkipOnSpike(4, 0.5, 2), skip_on_spike),
        (
            "chain",
            lambda: rules.Chain([rules.ClipByNorm(8.0), 6.0, rules.ClipByValue((-0.5, 0.7)), 2.0]),
            chain,
        ),
        (
            "adagc, norm",
            lambda: rules.Chain([rules.AdaGC(warmup_steps=2), 0.5]),
            lambda self, grads, weights: global_clip(adagc(self, grads, weights), 0.5),
        ),
        (
            "agc, tensors, norm",
            lambda: rules.Chain([rules.AdaptiveGradientClipping(exclude="*up*"), rules.ClipByNorm(0.02), 0.04]),
            lambda self, grads, weights: global_clip(by_norm(agc(self, grads, weights), 0.02), 0.04),
        ),
        (
            "per_group, rows",
            lambda: rules.PerGroup(
                {
                    "*blocks.1*": [rules.CentralizeGradient(), 1.5],
                    "*norm*": rules.ClipByNorm(0.3),
                    "*": rules.AdaptiveGradientClipping(exclude="*up*"),
                }
            ),
            per_group_rows,
        ),
        (
            "per_group",
            lambda: rules.PerGroup({"*blocks.0*": 1.5, "*norm*": rules.ClipByValue(0.2)}),
            per_group,
        ),
    ]
}
