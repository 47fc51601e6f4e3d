"""Names that wrappers do not change, and modules that notice replaced parameters."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from distclip.layout import layout_of
from distclip.parameters import ModuleParameters, named_parameters
from distclip.plan import make_plan
from tests.layouts import LAYOUTS, Layout
from tests.nets import make_net
from tests.ranks import ranks

NAMES = [name for name, _ in make_net().named_parameters()]


def tensor_names(model: nn.Module) -> list[str]:
    named = {id(param): (name, param) for name, param in reversed(list(named_parameters(model)))}
    params = [named[id(param)] for param in model.parameters()]
    return list(make_plan([name for name, _ in params], [param for _, param in params]).tensors)


@ranks(2)
@pytest.mark.parametrize(
    "layout",
    [
        LAYOUTS[name]
        for name in ("ddp", "replicate", "fsdp1-full_shard-orig", "fsdp1-full_shard-flat", "fsdp2", "fsdp1-ignored")
    ],
    ids=lambda layout: layout.name,
)
def test_names_do_not_depend_on_the_layout(layout: Layout) -> None:
    from distclip.layout import learn

    model = layout.wrap(make_net())
    learn(model)
    assert sorted(tensor_names(model)) == sorted(NAMES)


@ranks(1)  # in a process of its own: torch.compile sets environment variables
def test_other_wrappers() -> None:
    net = make_net()
    net.blocks[0] = checkpoint_wrapper(net.blocks[0])
    compiled = torch.compile(net)
    assert isinstance(compiled, nn.Module)
    assert tensor_names(compiled) == NAMES
    parallel = nn.DataParallel(make_net())
    assert tensor_names(parallel) == NAMES


def test_a_child_called_module_keeps_its_name() -> None:
    outer = nn.Module()
    outer.module = nn.Linear(1, 1)
    assert tensor_names(outer) == ["module.weight", "module.bias"]


@ranks(2)
def test_systems() -> None:
    from distclip.layout import learn

    ddp = DistributedDataParallel(make_net())
    learn(ddp)
    layout = layout_of(ddp.module.scale)
    assert (layout.system, layout.sharded, layout.groups) == ("DDP", (), ())
    assert [group.ranks for group in layout.replicated] == [(0, 1)]
    fsdp = FullyShardedDataParallel(make_net().first, device_id=torch.device("cpu"))
    learn(fsdp)
    layout = layout_of(next(fsdp.parameters()))
    assert (layout.system, layout.distinct) == ("FSDP1", 2)
    assert len(layout.pieces) == 5
    assert layout_of(nn.Parameter(torch.ones(1))).system == "plain"


def test_changes_are_noticed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    params = ModuleParameters([model])
    model[0].register_parameter("bias", None)
    seen = [params.changed]
    params = ModuleParameters([model])
    model.append(nn.ReLU())
    seen.append(params.changed)
    params = ModuleParameters([model])
    seen.append(params.changed)
    model.to(torch.float64)
    seen.append(params.changed)  # the parameters stay the same objects
    assert seen == [True, True, False, False]
