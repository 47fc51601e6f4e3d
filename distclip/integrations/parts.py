"""The part of a model that one optimizer steps: Lightning and Fabric clip optimizer by optimizer."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from torch.optim import Optimizer

from distclip.clipper import GradClipper
from distclip.config import ClipConfig
from distclip.layout import learn
from distclip.layout.fsdp2 import sharded_parameters
from distclip.optimizers import as_optimizers, parameters_of
from distclip.parameters import named_parameters


class Part(nn.Module):
    """The parameters that an optimizer steps, under the names that their model gives them; has no forward.

    Their layouts are those of the model. ``follow`` keeps up with ``add_param_group``.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        super().__init__()
        # In a tuple: as a submodule its parameters would be the part's.
        self._whole = (model,)
        self._optimizer = optimizer
        self._held: frozenset[int] = frozenset()
        self.follow()

    def follow(self) -> None:
        """Hold what the optimizer steps now."""
        stepped = parameters_of([self._optimizer])
        if stepped.keys() == self._held:
            return
        (model,) = self._whole
        learn(model)
        self._held = frozenset(stepped)
        self._modules.clear()
        self._parameters.clear()
        sharded = sharded_parameters(model)
        for name, param in named_parameters(model):
            # Where FSDP2 has unsharded them for a while, the optimizer knows the shards.
            own = sharded.get(id(param), param)
            if id(own) in stepped:
                *path, leaf = name.split(".")
                _descend(self, path).register_parameter(leaf, own)  # type: ignore[arg-type]  # a DTensor is one


def part_of(model: nn.Module, optimizer: Optimizer) -> nn.Module:
    """What a GradClipper is to be made of: ``model`` where the optimizer steps all of it, else a ``Part``.

    Parameters that are frozen now count: others may be trained when they are.
    """
    (inner,) = as_optimizers(optimizer)
    stepped, sharded = parameters_of([inner]), sharded_parameters(model)
    every = (sharded.get(id(param), param) for param in model.parameters())
    return model if all(id(param) in stepped for param in every) else Part(model, inner)


def config_of_part(config: ClipConfig, place: int) -> ClipConfig:
    """The settings for the optimizer at ``place``: each has a log of its own, ``run.jsonl``, ``run.1.jsonl`` ..."""
    if place == 0 or config.log is None:
        return config
    return replace(config, log=f"{config.log.removesuffix('.jsonl')}.{place}.jsonl")


def follow_optimizers(clipper: GradClipper) -> None:
    """Before a clip: let parts hold what their optimizers step now."""
    for module in clipper._params.modules:
        if isinstance(module, Part):
            module.follow()


def _descend(module: nn.Module, path: list[str]) -> nn.Module:
    for name in path:
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    return module
