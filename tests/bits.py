"""What the ranks hold, bit by bit: which pieces of a model several of them have, and whether these are the same."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from tests.oracle import clean

Place = Callable[[str], Hashable]


def assert_same_bits(told: Mapping[str, Tensor | None]) -> None:
    """Every rank has the same of what all of them tell; collective."""
    own = {name: None if value is None else digest(value) for name, value in told.items()}
    everybody: list[dict[str, str | None]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everybody, own)
    for rank, other in enumerate(everybody):
        differ = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
        assert not differ, f"rank {dist.get_rank()} and rank {rank} differ in the bits of {', '.join(differ)}"


def assert_same_replicas(modules: Iterable[nn.Module], place: Place = lambda _: ()) -> int:
    """Ranks that hold the same piece of a parameter hold the same bits; collective.

    Args:
        modules: this rank's.
        place: what tells apart parameters of the same name that are different tensors (stages, experts), by name.

    Returns:
        How many pieces more than one rank holds.
    """
    own = {
        (number, name, place(name), where): digest(piece)
        for number, module in enumerate(modules)
        for name, where, piece in _pieces(module)
    }
    everybody: list[dict[Hashable, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everybody, own)
    holders: dict[Hashable, dict[int, str]] = defaultdict(dict)
    for rank, pieces in enumerate(everybody):
        for key, bits in pieces.items():
            holders[key][rank] = bits
    for key, held in holders.items():
        assert len(set(held.values())) == 1, f"ranks {', '.join(map(str, held))} differ in the bits of {key}"
    return sum(len(held) > 1 for held in holders.values())


def _pieces(module: nn.Module) -> Iterator[tuple[str, Hashable, Tensor]]:
    """This rank's part of each parameter, under its name, and which of all parts it is."""
    flattened: set[int] = set()
    for prefix, unit in module.named_modules():
        if isinstance(unit, FullyShardedDataParallel) and unit._handle is not None:
            handle = unit._handle
            flattened |= {id(param) for param in (handle.flat_param, *(handle.flat_param._params or ()))}
            where: Hashable = handle.process_group.rank() if handle.uses_sharded_strategy else None
            yield clean(f"{prefix}.flat_param"), where, handle.flat_param.detach()
    for name, param in module.named_parameters():
        if isinstance(param, DTensor):
            coordinate = param.device_mesh.get_coordinate()
            assert coordinate is not None
            placed = zip(coordinate, param.placements, strict=True)
            where = tuple(axis for axis, placement in placed if not placement.is_replicate())
            local = param.to_local().detach()
            if local.numel():
                yield clean(name), where, local
        elif id(param) not in flattened and param.numel():
            yield clean(name), None, param.detach()


def digest(tensor: Tensor) -> str:
    """A text that two tensors share if all their bits are equal."""
    # What two ranks hold may be equal and not the same: 0.0 and -0.0.
    numbers = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(numbers.view(torch.uint8).numpy().tobytes()).hexdigest()
