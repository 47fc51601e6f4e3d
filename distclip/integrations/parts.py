"""The part of a model that one optimizer steps: Lightning clips optimizer by optimizer."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from distclip.layout import learn
from distclip.optimizers import as_optimizers, parameters_of
from distclip.parameters import named_parameters


def part_of(model: nn.Module, optimizer: Optimizer | Iterable[Optimizer]) -> nn.Module:
    """What a GradClipper is to be made of: ``model`` itself where the optimizer steps all that is trained.

    Else a module that holds the optimizer's parameters only, under the names that the model gives them, and has no
    forward. Its layouts are those of ``model``, which is looked at once.
    """
    stepped = parameters_of(as_optimizers(optimizer))
    named = list(named_parameters(model))
    if all(id(param) in stepped for _, param in named if param.requires_grad):
        return model
    learn(model)
    part = nn.Module()
    for name, param in named:
        if id(param) in stepped:
            *path, leaf = name.split(".")
            _descend(part, path).register_parameter(leaf, param)
    return part


def _descend(module: nn.Module, path: list[str]) -> nn.Module:
    for name in path:
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    return module
