"""What users pass as ``parameters`` or ``model``, as a list of named parameters, each once."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from distclip.hints import several, shown
from distclip.layout.fsdp2 import sharded_parameters
from distclip.layout.zero import is_engine
from distclip.warning import warn

Parameters = Tensor | nn.Module | Iterable[Tensor] | Iterable[nn.Module]

# Wrappers hide behind these child names; what a user calls "layer.weight" keeps that name under any of them.
_WRAPPED_CHILDREN = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"})


def split(parameters: Parameters, may_be_empty: bool = False) -> tuple[list[nn.Module], list[Tensor]]:
    """The modules and the tensors that a user passed, each tensor once, those of the modules included.

    Warns where there is nothing, unless that ``may_be`` (a pipeline can have stages without parameters).

    Raises:
        TypeError: ``parameters`` holds something that is neither a tensor nor a module.
    """
    given: list[Any] = [parameters] if isinstance(parameters, Tensor | nn.Module) else _listed(parameters)
    modules: list[nn.Module] = []
    tensors: list[Tensor] = []
    for item in given:
        if isinstance(item, nn.Module):
            modules.append(item)
            sharded = sharded_parameters(item)
            tensors.extend(sharded.get(id(param), param) for param in item.parameters())
        elif isinstance(item, Tensor):
            tensors.append(item)
        else:
            raise TypeError(
                f"parameters must hold tensors or modules, got {type(item).__name__}: {shown(item, 80)}. Pass a "
                "model, a tensor, or an iterable of them (for optimizer param groups: group['params'])."
            )
    if not tensors and not may_be_empty:
        _warn_empty(parameters)
    return modules, list({id(tensor): tensor for tensor in tensors}.values())


def _listed(parameters: Any) -> list[Any]:
    if not several(parameters) or isinstance(parameters, str | bytes):
        raise TypeError(
            f"parameters must be a module, a tensor or an iterable of them, got {type(parameters).__name__}: "
            f"{shown(parameters, 80)}"
        )
    return list(parameters)


def _warn_empty(parameters: object) -> None:
    exhausted = isinstance(parameters, types.GeneratorType)
    warn(
        "parameters is an empty generator, perhaps used up by an earlier call: pass a list or the model. "
        if exhausted
        else "parameters is empty: nothing to clip, the norm is 0.",
    )


def names(modules: list[nn.Module], tensors: list[Tensor]) -> list[str]:
    """A name for each tensor: as its module calls it, without wrappers, else its place in the list."""
    known: dict[int, str] = {}
    for place, module in enumerate(modules):
        prefix = f"{place}." if len(modules) > 1 else ""
        sharded = sharded_parameters(module)
        for name, param in named_parameters(module):
            known.setdefault(id(sharded.get(id(param), param)), prefix + name)
    return [known.get(id(tensor), f"parameters[{place}]") for place, tensor in enumerate(tensors)]


def named_parameters(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """``root.named_parameters()`` under the names that the user's model gives, whatever wraps it.

    Yields a tied parameter under each of its names.
    """
    for name, param in root._parameters.items():
        if param is not None:
            yield prefix + name, param
    for name, child in root._modules.items():
        if child is not None:
            hidden = name in _WRAPPED_CHILDREN or isinstance(root, DistributedDataParallel | DataParallel)
            hidden |= name == "module" and is_engine(root)
            yield from named_parameters(child, prefix if hidden else f"{prefix}{name}.")


def as_modules(model: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    """A user's ``model`` as a list.

    Raises:
        TypeError: something in it is no module.
    """
    if not isinstance(model, nn.Module) and not several(model):
        raise TypeError(f"model must be a torch.nn.Module or an iterable of them, got {shown(model)}")
    modules = [model] if isinstance(model, nn.Module) else list(model)
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module or an iterable of them, got {type(module).__name__}")
    return modules


class ModuleParameters:
    """The parameters of some modules, which can tell cheaply whether they were replaced since.

    Walking a model's modules costs more than clipping it; comparing what their dictionaries hold does not.
    """

    def __init__(self, modules: list[nn.Module], may_be_empty: bool = False) -> None:
        self.modules = modules
        _, self.tensors = split(modules, may_be_empty)
        every = {id(module): module for root in modules for module in root.modules()}.values()
        self._dicts: list[dict[str, Any]] = [module._modules for module in every]
        self._dicts += [module._parameters for module in every]
        self._held = self._holding()
        self.named = dict(zip(names(modules, self.tensors), self.tensors, strict=True))

    def _holding(self) -> list[Any]:
        return [value for held in self._dicts for value in held.values()]

    @property
    def changed(self) -> bool:
        """Whether a module or parameter was added, removed or replaced."""
        now = self._holding()
        return len(now) != len(self._held) or not all(map(is_, now, self._held))
