"""Code that nobody wants to edit: torch's clipping functions become distclip's, wherever they were imported from.

``from torch.nn.utils import clip_grad_norm_`` keeps the function object itself, so replacing the name in
``torch.nn.utils`` would not reach it. Each of these functions is a small wrapper (``torch.no_grad``) around another
that it holds in its closure: that one is exchanged, and every reference ever taken calls the new one.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

from distclip import functional
from distclip.compiled import eager
from distclip.layout import learn
from distclip.layout.dtensor import is_dtensor
from distclip.layout.fsdp1 import NeverSeen
from distclip.warning import warn


class Patch:
    """What ``patch()`` did; ``undo()``, or the end of a ``with`` block, takes it back."""

    def __init__(self) -> None:
        self._before = {name: _cell(name).cell_contents for name in _REPLACEMENTS}
        for name, replacement in _REPLACEMENTS.items():
            _cell(name).cell_contents = replacement

    def undo(self) -> None:
        """Put back what was there before. A second call does nothing."""
        for name, function in self._before.items():
            _cell(name).cell_contents = function
        self._before = {}

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch() -> Patch:
    """From now on ``torch.nn.utils.clip_grad_norm_``, ``clip_grad_value_``, ``clip_grads_with_norm_`` and
    ``get_total_norm`` are distclip's, in this process, also where they were imported before.

    Arguments and results stay torch's, but that norms are float32 or float64 (torch's: float16 of float16 gradients),
    a tensor given twice counts once, and norms of DTensors are plain tensors, already reduced, that answer
    ``full_tensor()``. What torch computes without sense is refused, as by distclip's own functions: a negative or NaN
    limit and a ``norm_type`` not above 0 (``ValueError``), powers of finite gradients that leave float64
    (``OverflowError``).

    ``get_total_norm`` is given gradients, not parameters: DTensors are reduced over their meshes, plain tensors count
    as they are (so it cannot see FSDP1 or a pipeline), and all ranks of these meshes must pass the same list.
    Parameters of FSDP1 models are known even if distclip never saw the model: it is looked for among all living
    objects, once.

    As with torch, ranks must pass the same parameters: a list without those that have no gradient here makes ranks wait
    for each other. ``torch.compile`` over a clip breaks its graph (``fullgraph=True`` fails).

    Returns:
        A handle with ``undo()``; also a context manager. Undo the later of two first.

    Raises:
        RuntimeError: torch has other internals than distclip knows.

    Example:
        >>> from torch.nn.utils import clip_grad_norm_
        >>> weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
        >>> weight.grad = torch.full((2,), 60000.0, dtype=torch.float16)
        >>> with patch():
        ...     clip_grad_norm_([weight], max_norm=1.0)
        tensor(84852.8125)
    """
    return Patch()


def _cell(name: str) -> types.CellType:
    function: Any = getattr(clip_grad, name, None)
    names = function.__code__.co_freevars if function else ()
    if "func" not in names:
        raise RuntimeError(
            f"distclip.patch() does not know torch {torch.__version__}: torch.nn.utils.clip_grad.{name} is built in "
            "another way. Call distclip.clip_grad_norm_ itself, and report this version to distclip."
        )
    cell: types.CellType = function.__closure__[names.index("func")]
    return cell


def _seeking(function: Callable[..., Any]) -> Callable[..., Any]:
    """Where distclip has not seen an FSDP1 model, it is found. An empty list is no reason to warn, as in torch."""

    @eager
    @wraps(function)
    def call(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        given: Any
        # A generator would be used up by the first of two tries.
        given = parameters if isinstance(parameters, Tensor | torch.nn.Module) else list(parameters)
        if isinstance(given, list) and not given:
            if isinstance(parameters, types.GeneratorType):
                # Word for word as torch says it: scripts filter warnings, and tests look for them, by their text.
                warn("`parameters` is an empty generator, no gradient clipping will occur.")
            return torch.tensor(0.0) if function is functional.clip_grad_norm_ else None
        try:
            result = function(given, *args, **kwargs)
        except NeverSeen:
            _learn_living()
            result = function(given, *args, **kwargs)
        return result if result is None else _answering(result, given)

    return call


def _answering(norm: Tensor, given: Any) -> Tensor:
    """torch's norm of DTensors is a DTensor, and many scripts call its ``full_tensor()`` without asking."""
    first = given[0] if isinstance(given, list) else given
    if is_dtensor(first):
        # Of another tensor: one that holds itself could be neither copied nor pickled.
        vars(norm)["full_tensor"] = norm.detach().detach
        # In a file it is a plain tensor: torch.load(weights_only=True), the default, knows no methods.
        vars(norm)["__getstate__"] = _nothing
    return norm


def _nothing() -> None:
    """What a norm's pickle holds besides the number."""


def _learn_living() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    for living in gc.get_objects():
        # type() and not isinstance(), which would ask lazy objects for their class.
        if issubclass(type(living), FullyShardedDataParallel):
            learn(living)


@eager
def _total_norm(
    tensors: Any,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    gradients = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if not gradients:
        return torch.tensor(0.0)
    holders = [_holder(gradient) for gradient in gradients]
    return _answering(functional.grad_norm(holders, norm_type, error_if_nonfinite, foreach), gradients)


def _holder(gradient: Tensor) -> Tensor:
    """A tensor that has this gradient, and no memory of its own."""
    gradient = gradient.detach()
    dense = is_dtensor(gradient) or gradient.layout == torch.strided
    holder = gradient.view_as(gradient) if dense else _unfilled(gradient)
    holder.grad = gradient
    return holder


def _unfilled(like: Tensor) -> Tensor:
    return torch.empty((), dtype=like.dtype, device=like.device).expand(like.shape)


_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "clip_grad_norm_": _seeking(functional.clip_grad_norm_),
    "clip_grad_value_": _seeking(functional.clip_grad_value_),
    "_clip_grads_with_norm_": _seeking(functional.clip_grads_with_norm_),
    "_get_total_norm": _total_norm,
}
