"""Each rule against its published implementation, on the same gradients, and against its mathematics in NumPy.

A peer that is not installed is skipped; the NumPy lines always run, and are held against the peers too, so that what
they say is what was published. All is float64, where two ways of rounding differ by 1e-15 and an epsilon that one
side does not have by 1e-6. `EXACT` cases have the same mathematics to the last epsilon; the others say what differs.

What the peers do otherwise, on purpose or not, stands in the tests at the end.
"""

import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import distclip
from distclip import GradClipper, Rule

Array = NDArray[np.float64]
Arrays = list[Array]
Stepper = Callable[[Arrays], Arrays]
#: Made from the weights, then called with the gradients of each step; returns them clipped.
Peer = Callable[[Arrays], Stepper]

STEPS = 60
#: A matrix, biases, a convolution, a scalar in a vector; one starts at zero, as biases and last layers do.
SHAPES = [(6, 5), (6,), (4, 3, 2, 2), (1,), (7,)]
ZERO = 4
#: Where rounding in float64 is the only difference.
EXACT = 1e-11
#: Where one side has torch's 1e-6 beside the norm, and the other has nothing; the norms here are above 0.1.
NO_EPSILON = 1e-5
#: Where a peer has its norms or its threshold in float32, whatever the gradients are.
FLOAT32 = 1e-6


def some_weights(shapes: list[tuple[int, ...]] = SHAPES) -> Arrays:
    """The same at every call."""
    random = np.random.default_rng(1)
    return [np.zeros(shape) if place == ZERO else random.normal(size=shape) for place, shape in enumerate(shapes)]


def some_gradients(shapes: list[tuple[int, ...]] = SHAPES, steps: int = STEPS) -> list[Arrays]:
    """Norms that fall and scatter as in training, with a spike now and then."""
    random = np.random.default_rng(2)

    def scale(step: int) -> float:
        spike = 30.0 if step in (33, 34, 50) else 1.0
        return float(spike * np.exp(random.normal(scale=0.3) - step / STEPS))

    return [[factor * random.normal(size=shape) for shape in shapes] for factor in map(scale, range(steps))]


def make(name: str, *values: object, **options: object) -> Callable[[], Rule]:
    """A fresh rule of distclip's, by its class name."""
    return lambda: getattr(distclip, name)(*values, **options)


def by_rule(rule: Rule) -> Peer:
    """distclip itself, in the peers' form."""

    def start(weights: Arrays) -> Stepper:
        params = as_parameters(weights)
        clipper = GradClipper(nn.ParameterList(params), rule)
        return lambda grads: clipped_in_place(params, grads, clipper.clip)

    return start


# ---------------------------------------------------------------- the mathematics, in NumPy


def norm_of(grads: Arrays) -> float:
    return float(np.sqrt(sum(np.sum(grad * grad) for grad in grads)))


def axes_but_first(array: Array) -> tuple[int, ...] | None:
    """Of a tensor with rows; None, all axes, of a vector."""
    return tuple(range(1, array.ndim)) if array.ndim > 1 else None


def each(function: Callable[[Array], Array]) -> Peer:
    """A rule of single tensors without memory."""
    return lambda weights: lambda grads: [function(grad) for grad in grads]


def to_norm(threshold: float, grads: Arrays) -> Arrays:
    """Clipped to this global norm, with torch's epsilon."""
    return [grad * min(1.0, threshold / (norm_of(grads) + 1e-6)) for grad in grads]


def global_norm(max_norm: float, p: float) -> Peer:
    def clip(grads: Arrays) -> Arrays:
        total = float(np.linalg.norm(np.concatenate([grad.ravel() for grad in grads]), p))
        return [grad * min(1.0, max_norm / (total + 1e-6)) for grad in grads]

    return lambda weights: clip


def norm(c: float) -> Peer:
    return each(lambda grad: grad * c / max(norm_of([grad]), c))


def average_norm(c: float) -> Peer:
    return each(lambda grad: grad * c / max(norm_of([grad]) / grad.size, c))


def block_rms(d: float) -> Peer:
    return each(lambda grad: grad / max(1.0, np.sqrt(np.mean(grad * grad)) / d))


def normalized(c: float) -> Peer:
    return lambda weights: lambda grads: [grad * c / (norm_of(grads) + 1e-6) for grad in grads]


def centralized(grad: Array) -> Array:
    return grad - grad.mean(axis=axes_but_first(grad), keepdims=True) if grad.ndim > 1 else grad


def agc(factor: float, eps: float = 1e-3) -> Peer:
    def unit_norms(array: Array) -> Array:
        return np.asarray(np.sqrt(np.sum(array * array, axis=axes_but_first(array), keepdims=True)))

    def clip(weight: Array, grad: Array) -> Array:
        largest = factor * np.maximum(unit_norms(weight), eps)
        return grad * np.minimum(1.0, largest / np.maximum(unit_norms(grad), 1e-6))

    return lambda weights: lambda grads: list(map(clip, weights, grads))


def from_history(threshold: Callable[[list[float]], float]) -> Peer:
    """Clipped to a threshold that follows from all norms so far, this step's included."""

    def start(weights: Arrays) -> Stepper:
        norms: list[float] = []

        def step(grads: Arrays) -> Arrays:
            norms.append(norm_of(grads))
            return to_norm(threshold(norms), grads)

        return step

    return start


def autoclip(percentile: float, history: int | None = None) -> Peer:
    return from_history(lambda norms: float(np.percentile(norms[-(history or len(norms)) :], percentile)))


def quantile(q: float, window: int, factor: float = 1.0) -> Peer:
    return from_history(lambda norms: factor * float(np.quantile(norms[-window:], q)))


class ZClip:
    """arXiv 2504.02507, as the package `zclip` has it."""

    alpha, z_thresh, max_norm, eps, warmup_steps = 0.97, 2.5, 1.0, 1e-6, 25
    mode, clip_option, clip_factor, skip_update_on_spike = "zscore", "adaptive_scaling", 1.0, False

    def __init__(self, weights: Arrays, **options: Any) -> None:
        vars(self).update(options)
        self.warmup: list[float] = []
        self.mean = self.variance = 0.0

    def __call__(self, grads: Arrays) -> Arrays:
        total = norm_of(grads)
        if len(self.warmup) < self.warmup_steps:
            self.warmup.append(total)
            self.mean, self.variance = float(np.mean(self.warmup)), float(np.var(self.warmup))
            return to_norm(self.max_norm, grads)
        threshold = self.threshold(total)
        effective = min(total if threshold is None else threshold, self.max_norm)
        if threshold is None or not self.skip_update_on_spike:
            # The threshold before max_norm's, and the variance about the mean after the update.
            counted = total if threshold is None else threshold
            self.mean = self.alpha * self.mean + (1 - self.alpha) * counted
            self.variance = self.alpha * self.variance + (1 - self.alpha) * (counted - self.mean) ** 2
        return to_norm(effective, grads) if total > effective else grads

    def threshold(self, total: float) -> float | None:
        """What this norm is clipped to for being a spike; None where it is none."""
        std = self.variance**0.5
        if self.mode == "percentile":
            above = self.mean + self.z_thresh * std
            return above if total > above else None
        z = (total - self.mean) / (std + self.eps)
        if z <= self.z_thresh:
            return None
        return self.mean if self.clip_option == "mean" else self.adaptive(z, std)

    def adaptive(self, z: float, std: float) -> float:
        """The larger the spike, the closer to the mean."""
        return (self.mean + self.z_thresh * std / (z / self.z_thresh)) * self.clip_factor


class AdaGC:
    """arXiv 2502.11034."""

    lambda_abs, lambda_rel, beta, warmup_steps = 1.0, 1.05, 0.98, 100

    def __init__(self, weights: Arrays, **options: Any) -> None:
        vars(self).update(options)
        self.gamma = [np.inf] * len(weights)
        self.step = 0

    def __call__(self, grads: Arrays) -> Arrays:
        self.step += 1
        if self.step < self.warmup_steps:
            clipped = [grad * min(1.0, self.lambda_abs / norm_of(grads)) for grad in grads]
            self.gamma = [min(gamma, norm_of([grad])) for gamma, grad in zip(self.gamma, clipped, strict=True)]
            return clipped
        pairs = list(zip(self.gamma, grads, strict=True))
        clipped = [grad * min(1.0, self.lambda_rel * gamma / norm_of([grad])) for gamma, grad in pairs]
        pairs = list(zip(self.gamma, clipped, strict=True))
        self.gamma = [self.beta * gamma + (1 - self.beta) * norm_of([grad]) for gamma, grad in pairs]
        return clipped


class EMARatio:
    """Each tensor against the average of its own clipped norms."""

    def __init__(self, weights: Arrays, *, ratio: float, beta: float) -> None:
        self.ratio, self.beta = ratio, beta
        self.average: list[float] = []

    def __call__(self, grads: Arrays) -> Arrays:
        self.average = self.average or [norm_of([grad]) for grad in grads]
        pairs = list(zip(self.average, grads, strict=True))
        clipped = [grad * min(1.0, self.ratio * average / (norm_of([grad]) + 1e-6)) for average, grad in pairs]
        pairs = list(zip(self.average, clipped, strict=True))
        self.average = [self.beta * average + (1 - self.beta) * norm_of([grad]) for average, grad in pairs]
        return clipped


class StableSPAM:
    """arXiv 2502.17055, without its resets of the optimizer's moments."""

    gamma1, gamma2, gamma3, eps = 0.7, 0.9, 0.999, 1e-8

    def __init__(self, weights: Arrays, **options: Any) -> None:
        vars(self).update(options)
        self.largest, self.first, self.second = (np.zeros(len(weights)) for _ in range(3))
        self.step = 0

    def __call__(self, grads: Arrays) -> Arrays:
        self.step += 1
        return [self.clip(place, grad) for place, grad in enumerate(grads)]

    def clip(self, place: int, grad: Array) -> Array:
        """One tensor: first its elements, then its norm."""
        top = np.abs(grad).max()
        self.largest[place] = self.gamma3 * self.largest[place] + (1 - self.gamma3) * top
        bound = self.largest[place] / (1 - self.gamma3**self.step)
        grad = np.where(np.abs(grad) > bound, grad / top * bound, grad)
        size = norm_of([grad])
        self.first[place] = self.gamma1 * self.first[place] + (1 - self.gamma1) * size
        self.second[place] = self.gamma2 * self.second[place] + (1 - self.gamma2) * size**2
        first = self.first[place] / (1 - self.gamma1**self.step)
        second = self.second[place] / (1 - self.gamma2**self.step)
        return np.asarray(grad / size * first / (np.sqrt(second) + self.eps))


# ---------------------------------------------------------------- the peers


def imported(name: str) -> Any:
    """The package, or a skip. What importing it does to the environment (and to the home directory) is undone."""
    with tempfile.TemporaryDirectory() as home, mock.patch.dict(os.environ, KERAS_BACKEND="torch", KERAS_HOME=home):
        return pytest.importorskip(name)


def as_parameters(weights: Arrays) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor(weight)) for weight in weights]


def clipped_in_place(params: list[nn.Parameter], grads: Arrays, clip: Callable[[], object]) -> Arrays:
    for param, grad in zip(params, grads, strict=True):
        param.grad = torch.tensor(grad)
    clip()
    # A skipped step leaves no gradients.
    return [np.zeros(param.shape) if param.grad is None else param.grad.numpy().copy() for param in params]


def on_parameters(prepare: Callable[[list[nn.Parameter]], Callable[[], object]]) -> Peer:
    """A peer that changes `.grad`: `prepare` takes the parameters and returns what is to be called at every step."""

    def start(weights: Arrays) -> Stepper:
        params = as_parameters(weights)
        clip = prepare(params)
        return lambda grads: clipped_in_place(params, grads, clip)

    return start


def torch_norm(max_norm: float, p: float) -> Peer:
    return on_parameters(lambda params: partial(nn.utils.clip_grad_norm_, params, max_norm, p))


def torch_value(bound: float) -> Peer:
    return on_parameters(lambda params: partial(nn.utils.clip_grad_value_, params, bound))


def keras(**options: float) -> Peer:
    def start(weights: Arrays) -> Stepper:
        optimizer = imported("keras").optimizers.SGD(0.1, **options)

        def step(grads: Arrays) -> Arrays:
            return [np.asarray(grad) for grad in optimizer._clip_gradients([torch.tensor(grad) for grad in grads])]

        return step

    return start


def outputs_last(array: Array) -> Array:
    """torch's layout of weights (outputs first) as JAX libraries have it: IO for matrices, HWIO for convolutions."""
    return np.moveaxis(array, (0, 1), (-1, -2)) if array.ndim > 1 else array


def outputs_first(array: Array) -> Array:
    return np.moveaxis(array, (-1, -2), (0, 1)) if array.ndim > 1 else array


def optax(name: str, *values: float, outputs: str = "first") -> Peer:
    def start(weights: Arrays) -> Stepper:
        transform = getattr(imported("optax"), name)(*values)
        jax = imported("jax")
        there, back = (outputs_last, outputs_first) if outputs == "last" else (np.asarray, np.asarray)

        def step(grads: Arrays) -> Arrays:
            with jax.enable_x64(True):
                updates = [jax.numpy.asarray(there(grad)) for grad in grads]
                params = [jax.numpy.asarray(there(weight)) for weight in weights]
                clipped, _ = transform.update(updates, transform.init(params), params)
                return [back(np.asarray(update)) for update in clipped]

        return step

    return start


def timm_agc(factor: float) -> Peer:
    """Read from its file: importing timm itself would need torchvision."""

    def prepare(params: list[nn.Parameter]) -> Callable[[], object]:
        package = importlib.util.find_spec("timm")
        if package is None or not package.submodule_search_locations:
            pytest.skip("could not import 'timm'")
        path = os.path.join(package.submodule_search_locations[0], "utils", "agc.py")
        spec = importlib.util.spec_from_file_location("timm_agc", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return partial(module.adaptive_clip_grad, params, factor)

    return on_parameters(prepare)


def pytorch_optimizer_agc(factor: float) -> Peer:
    def start(weights: Arrays) -> Stepper:
        clip = imported("pytorch_optimizer.optimizer.agc").agc

        def step(grads: Arrays) -> Arrays:
            pairs = zip(map(torch.tensor, weights), map(torch.tensor, grads), strict=True)
            return [clip(weight, grad, agc_clip_val=factor).numpy() for weight, grad in pairs]

        return step

    return start


def pytorch_optimizer_centralize(params: list[nn.Parameter]) -> Callable[[], object]:
    centralize = imported("pytorch_optimizer.optimizer.gradient_centralization").centralize_gradient
    return lambda: centralize([param.grad for param in params])


def pytorch_optimizer_adagc(options: dict[str, Any], params: list[nn.Parameter]) -> Callable[[], object]:
    # With beta1 = 0 the first moment is the clipped gradient itself. lr=0 keeps the weights as they are.
    optimizer = imported("pytorch_optimizer").AdaGC(params, lr=0.0, betas=(0.0, 0.9), weight_decay=0.0, **options)

    def clip() -> None:
        optimizer.step()
        for param in params:
            param.grad = optimizer.state[param]["exp_avg"].clone()

    return clip


def pytorch_optimizer_stablespam(params: list[nn.Parameter]) -> Callable[[], object]:
    # It rewrites .grad on its way; the moments that it would reset do not matter here.
    step: Callable[[], object] = imported("pytorch_optimizer").StableSPAM(params, lr=0.0, update_proj_gap=10**9).step
    return step


def zclip(options: dict[str, Any], params: list[nn.Parameter]) -> Callable[[], object]:
    renamed = {"max_grad_norm" if name == "max_norm" else name: value for name, value in options.items()}
    return partial(imported("zclip").ZClip(**renamed).step, Holder(params))


class Holder(nn.Module):
    """A model of just these parameters."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__()
        self.params = nn.ParameterList(params)


# ---------------------------------------------------------------- who is held against whom


@dataclass(frozen=True)
class Case:
    """A rule, its mathematics, and who else published it: the peer and the relative difference it may have."""

    rule: Callable[[], Rule]
    mathematics: Peer
    peers: dict[str, tuple[Peer, float]]


def zclip_case(**options: Any) -> Case:
    """Here `max_norm` of 1 would clip every step, and nothing else would show."""
    options = {"max_norm": 50.0, "warmup_steps": 20, "z_thresh": 0.5} | options
    peer = on_parameters(partial(zclip, options))
    return Case(make("ZClip", **options), partial(ZClip, **options), {"zclip": (peer, EXACT)})


def adagc_case(**options: Any) -> Case:
    # The peer adds 1e-8 to the global norm of the warm-up, which it computes in float32.
    peer = on_parameters(partial(pytorch_optimizer_adagc, options))
    return Case(make("AdaGC", **options), partial(AdaGC, **options), {"pytorch_optimizer": (peer, FLOAT32)})


CASES = {
    "value": Case(
        make("ClipByValue", 0.3),
        each(lambda grad: np.clip(grad, -0.3, 0.3)),
        {
            "torch": (torch_value(0.3), EXACT),
            "keras": (keras(clipvalue=0.3), FLOAT32),
            "optax": (optax("clip", 0.3), EXACT),
        },
    ),
    "value, a pair": Case(make("ClipByValue", (-0.1, 0.5)), each(lambda grad: np.clip(grad, -0.1, 0.5)), {}),
    "global_norm": Case(
        make("ClipByGlobalNorm", 4.0),
        global_norm(4.0, 2.0),
        {
            "torch": (torch_norm(4.0, 2.0), EXACT),
            # Neither has an epsilon: a threshold of c gives a norm of c, not of c - 1e-6.
            "keras": (keras(global_clipnorm=4.0), NO_EPSILON),
            "optax": (optax("clip_by_global_norm", 4.0), NO_EPSILON),
        },
    ),
    "global_norm, p=1": Case(
        make("ClipByGlobalNorm", 4.0, norm_type=1.0), global_norm(4.0, 1.0), {"torch": (torch_norm(4.0, 1.0), EXACT)}
    ),
    "global_norm, p=3": Case(
        make("ClipByGlobalNorm", 1.0, norm_type=3.0), global_norm(1.0, 3.0), {"torch": (torch_norm(1.0, 3.0), EXACT)}
    ),
    "global_norm, p=inf": Case(
        make("ClipByGlobalNorm", 1.0, norm_type=np.inf),
        global_norm(1.0, np.inf),
        {"torch": (torch_norm(1.0, np.inf), EXACT)},
    ),
    "norm": Case(make("ClipByNorm", 1.5), norm(1.5), {"keras": (keras(clipnorm=1.5), FLOAT32)}),
    "average_norm": Case(make("ClipByAverageNorm", 0.1), average_norm(0.1), {}),
    "block_rms": Case(make("ClipByBlockRMS", 0.5), block_rms(0.5), {"optax": (optax("clip_by_block_rms", 0.5), EXACT)}),
    "agc": Case(
        make("AdaptiveGradientClipping", 0.2),
        agc(0.2),
        {
            "timm": (timm_agc(0.2), EXACT),
            "pytorch_optimizer": (pytorch_optimizer_agc(0.2), EXACT),
            "optax": (optax("adaptive_grad_clip", 0.2, outputs="last"), EXACT),
        },
    ),
    "normalize": Case(
        make("NormalizeGradient", 0.5), normalized(0.5), {"optax": (optax("normalize_by_update_norm", 0.5), EXACT)}
    ),
    "centralize": Case(
        make("CentralizeGradient"),
        each(centralized),
        {
            "optax": (optax("centralize"), EXACT),
            "pytorch_optimizer": (on_parameters(pytorch_optimizer_centralize), EXACT),
        },
    ),
    "autoclip": Case(make("AutoClip", 10), autoclip(10), {}),
    "autoclip, 20 norms": Case(make("AutoClip", 40, history=20), autoclip(40, 20), {}),
    "quantile": Case(make("QuantileClip", 0.5, 20), quantile(0.5, 20), {}),
    "zclip": zclip_case(),
    "zclip, mean": zclip_case(clip_option="mean"),
    "zclip, percentile": zclip_case(mode="percentile"),
    "zclip, factor": zclip_case(clip_factor=0.7),
    "zclip, spikes not counted": zclip_case(skip_update_on_spike=True),
    "zclip, max_norm": zclip_case(max_norm=4.0),
    "adagc": adagc_case(warmup_steps=20),
    "adagc, other numbers": adagc_case(warmup_steps=10, lambda_abs=5.0, lambda_rel=1.5, beta=0.9),
    "ema_ratio": Case(make("EMARatioClip", ratio=1.2, beta=0.9), partial(EMARatio, ratio=1.2, beta=0.9), {}),
    "stable_spam": Case(
        make("StableSPAM", eps=1e-8),
        StableSPAM,
        {"pytorch_optimizer": (on_parameters(pytorch_optimizer_stablespam), EXACT)},
    ),
}
#: Those that remember earlier steps.
HISTORY = [name for name in CASES if name.startswith(("autoclip", "quantile", "zclip", "adagc", "ema", "stable"))]
PAIRS = [
    pytest.param(case, *pair, id=f"{name}-{peer}") for name, case in CASES.items() for peer, pair in case.peers.items()
]


def run(peer: Peer, steps: list[Arrays] | None = None, shapes: list[tuple[int, ...]] = SHAPES) -> list[Arrays]:
    """What a peer makes of the gradients of all steps."""
    step = peer(some_weights(shapes))
    return [step(grads) for grads in steps or some_gradients(shapes)]


def assert_same(ours: list[Arrays], theirs: list[Arrays], rtol: float) -> None:
    for step, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        for place, (one, other) in enumerate(zip(our, their, strict=True)):
            np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-14, err_msg=f"step {step}, tensor {place}")


@pytest.mark.parametrize("name", CASES)
def test_a_rule_is_its_mathematics(name: str) -> None:
    case = CASES[name]
    assert_same(run(by_rule(case.rule())), run(case.mathematics), EXACT)


@pytest.mark.parametrize(("case", "peer", "rtol"), PAIRS)
def test_a_rule_is_what_was_published(case: Case, peer: Peer, rtol: float) -> None:
    theirs = run(peer)
    assert_same(run(by_rule(case.rule())), theirs, rtol)
    # Or else the NumPy lines, all that is compared where the peer is not installed, would be of another rule.
    assert_same(run(case.mathematics), theirs, rtol)


@pytest.mark.parametrize("name", CASES)
def test_the_gradients_make_the_rule_act(name: str) -> None:
    before, after = some_gradients(), run(CASES[name].mathematics)
    acted = [
        any(not np.array_equal(*pair) for pair in zip(*step, strict=True)) for step in zip(before, after, strict=True)
    ]
    assert sum(acted) >= 3, "a comparison of gradients that nobody clips shows nothing"


# ---------------------------------------------------------------- deliberate differences


#: Where steps are put in between that are not finite: into every warm-up, and after it.
BROKEN = {0: np.nan, 5: np.inf, 40: np.nan}


def with_broken_steps() -> list[Arrays]:
    steps = some_gradients()
    for place, bad in BROKEN.items():
        steps.insert(place, [np.full_like(grad, bad) for grad in steps[0]])
    return steps


def without_broken_steps(clipped: list[Arrays]) -> list[Arrays]:
    return [step for place, step in enumerate(clipped) if place not in BROKEN]


@pytest.mark.parametrize("name", HISTORY)
def test_a_step_that_is_not_finite_is_forgotten(name: str) -> None:
    """As if it had never been: it is no step of a warm-up or a bias correction either."""
    ours = without_broken_steps(run(by_rule(CASES[name].rule()), with_broken_steps()))
    assert_same(ours, run(CASES[name].mathematics), EXACT)


@pytest.mark.parametrize("name", ["zclip", "adagc", "stable_spam"])
def test_the_peers_never_forget_it(name: str) -> None:
    """ZClip's mean is NaN for good, which no norm is above: spikes pass. The other two return NaN for good."""
    ((peer, _),) = CASES[name].peers.values()
    theirs, unbroken = without_broken_steps(run(peer, with_broken_steps())), run(CASES[name].mathematics)
    if name == "zclip":
        spike = max(range(STEPS), key=lambda step: norm_of(some_gradients()[step]))
        assert norm_of(theirs[spike]) > 5 * norm_of(unbroken[spike])
    else:
        assert all(np.isnan(grad).all() for step in theirs for grad in step)


def test_a_unit_of_agc_is_one_output() -> None:
    """All axes but the first, of 1-D convolutions and of columns too."""
    shapes = [(3, 4, 5), (5, 1)]
    ours = run(by_rule(make("AdaptiveGradientClipping", 0.2)()), shapes=shapes)
    assert_same(ours, run(agc(0.2), shapes=shapes), EXACT)


@pytest.mark.parametrize(
    ("peer", "same"),
    [
        (timm_agc(0.2), [True, True]),
        # Axis 1 alone of a 1-D convolution.
        (pytorch_optimizer_agc(0.2), [False, True]),
        # The first axis alone of a 1-D convolution (taken for attention heads); and a column is one unit.
        (optax("adaptive_grad_clip", 0.2, outputs="last"), [False, False]),
    ],
    ids=["timm", "pytorch_optimizer", "optax"],
)
def test_other_units_of_agc(peer: Peer, same: list[bool]) -> None:
    shapes = [(3, 4, 5), (5, 1)]
    ours, theirs = run(agc(0.2), shapes=shapes)[0], run(peer, shapes=shapes)[0]
    assert [np.allclose(*pair) for pair in zip(ours, theirs, strict=True)] == same


def test_zero_weights_are_not_frozen_by_agc() -> None:
    for step in run(by_rule(make("AdaptiveGradientClipping", 0.2)())):
        assert np.linalg.norm(step[ZERO]) == pytest.approx(0.2 * 1e-3)


def asleep(steps: int) -> list[Arrays]:
    """A tensor whose gradients are all zero for so many steps."""
    quiet = some_gradients()
    for grads in quiet[:steps]:
        grads[2] = np.zeros_like(grads[2])
    return quiet


def test_adagc_lets_a_tensor_wake_up() -> None:
    """The published threshold stays at zero (pytorch_optimizer: near its 1e-8), and the tensor is frozen for good."""
    options = {"warmup_steps": 10, "lambda_abs": 1.0}
    theirs = run(on_parameters(partial(pytorch_optimizer_adagc, options)), asleep(20))
    assert all(np.linalg.norm(step[2]) < 1e-6 for step in theirs)
    ours = run(by_rule(make("AdaGC", **options)()), asleep(20))
    assert np.linalg.norm(ours[-1][2]) > 1e-2


def test_stable_spam_passes_over_zero_gradients() -> None:
    """Such a step is none for that tensor. pytorch_optimizer keeps the averages too, but goes on counting steps: its
    correction for the bias of averages that start at 0 is then too small, and so is the gradient.
    """
    ours = [[step[2]] for step in run(by_rule(CASES["stable_spam"].rule()), asleep(5))]
    assert all(np.array_equal(grad, np.zeros_like(grad)) for (grad,) in ours[:5])
    awake = [[step[2]] for step in run(StableSPAM, some_gradients()[5:])]
    assert_same(ours[5:], awake, EXACT)
    theirs = run(on_parameters(pytorch_optimizer_stablespam), asleep(5))
    assert norm_of([theirs[5][2]]) < 0.9 * norm_of(awake[0])


# ---------------------------------------------------------------- skipping


def skipped(rule: Rule, norms: list[float]) -> list[int]:
    """At which norms the rule skips the step."""
    param = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    clipper = GradClipper(nn.ParameterList([param]), rule)
    steps = []
    for step, norm in enumerate(norms):
        param.grad = torch.tensor([norm], dtype=torch.float64)
        if clipper.clip().skipped:
            steps.append(step)
    return steps


def some_norms(steps: int = 190) -> list[float]:
    """Spikes up and down, and at the end a level that stays."""
    random = np.random.default_rng(3)
    norms = np.exp(random.normal(scale=0.1, size=steps))
    norms[[3, 80, 81, 118]] *= 20
    norms[[40, 100]] *= 0.01
    norms[155:] *= 3
    return list(map(float, norms))


def test_skip_above() -> None:
    norms = some_norms()
    assert skipped(make("SkipAbove", 2.0)(), norms) == [step for step, norm in enumerate(norms) if norm > 2.0]


def test_skip_on_spike() -> None:
    """As OLMo-core's SkipStepOptimizer, which counts skipped steps too: else a new level would be skipped for good.

    But: only spikes upwards skip; `min_history` earlier norms are needed, where OLMo-core counts the current one among
    its `window // 2`; and a NaN is not counted, where in OLMo-core it skips every step until it leaves the window.
    """
    norms, window, sigma, least = some_norms(), 32, 4.0, 16
    expected = []
    for step, norm in enumerate(norms):
        earlier = norms[max(0, step - window) : step]
        if len(earlier) >= least and norm - np.mean(earlier) > sigma * np.std(earlier, ddof=1):
            expected.append(step)
    assert expected[:3] == [80, 81, 118]
    assert 155 <= expected[-1] < 165, "the new level is skipped at first, and then the usual one"
    assert skipped(make("SkipOnSpike", window=window, sigma=sigma, min_history=least)(), norms) == expected
