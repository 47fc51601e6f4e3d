"""The shared plan: what follows from the parameters alone, whichever gradients happen to exist."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.groups import comm_device
from distclip.handshake import Agreement, Entry, Facts, Wire, agree, alone
from distclip.kernels.common import WIDE, index, to_device
from distclip.layout import GradLayout, Piece, RankGroup, layout_of, traits
from distclip.layout.declared import Declaration, declared_of, version
from distclip.layout.dtensor import decoded, encoded, is_dtensor, kinds
from distclip.participants import Participants, connect
from distclip.rules.base import Bounds, Limits
from distclip.rules.tensors import Tensors

if TYPE_CHECKING:
    from distclip.overlap import Overlap

# Partial gradients of up to so many elements are summed in the norm's own all-reduce.
_RIDES = 1 << 17


@dataclass(eq=False)
class Plan:
    """Agreed on by all participants. Holds no reference to the parameters."""

    names: tuple[str, ...]
    """The parameters of this rank."""
    layouts: tuple[GradLayout, ...]
    """How their gradients lie, which may be otherwise than they themselves do."""
    settled: dict[int, str]
    """Places of parameters whose Partial gradients are reduced before each clip, and how they are placed until then."""
    tensors: tuple[str, ...]
    """This rank's tensors: more than parameters where one of these packs several (FSDP1)."""
    numels: tuple[int, ...]
    """Their sizes, whole."""
    slots: Tensor
    """For each tensor, its place among all tensors of the job; int64."""
    slot_count: int
    shares: Tensor
    """For each tensor, one over the number of participants that hold the same piece of it as this rank; float64."""
    pieces: tuple[Piece, ...]
    """What of each this rank has."""
    weight_shares: Tensor
    """As ``shares``, of the parameters themselves, where their gradients are placed otherwise."""
    described: Tensors | None
    """Names and shapes of all tensors of the job, in the order of their slots; None where no rule asks for them."""
    by_rows: bool
    """Whether a rule looks at rows."""
    riding: dict[int, float]
    """Tensors whose Partial gradients are summed in the norm's all-reduce, and the factor of this rank's part."""
    participants: Participants
    guards: frozenset[Callable[[], None]]
    """Each raises, or warns, where a wrapper has not reduced its gradients over the ranks yet."""
    device: torch.device
    """Where norms are returned if this rank has no gradient."""
    wire: torch.device | None
    """Where the all-reduce runs, agreed by all; None without one."""
    float64: bool
    """Whether every parameter of every participant is float64, and so are the norms."""
    wide: bool
    """Whether any is, so that the powers of its gradients may leave float64."""
    placements: list[object]
    """How the parameters that are DTensors are placed; None for others."""
    traits: list[object]
    """What the parameters were like (see ``layout.traits``)."""
    declarations: list[Declaration | None]
    """What was declared of them."""
    version: int
    """Of all declarations, when these were looked at last."""
    rows: dict[tuple[int, object], Tensor | None] = field(default_factory=dict)
    """By place and placements of a DTensor parameter or gradient, which rows this rank has; filled as they are seen."""
    overlap: Overlap | None = None
    """Who measures gradients while backward() runs."""

    _copies: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def straight(self) -> bool:
        """Whether every gradient is, or its DTensor holds, one dense tensor that stands for the whole parameter; and
        either all or none are DTensors."""
        alike = self.all_dtensors or not any(self.placements)
        return (
            alike
            and not (self.by_rows or self.riding)
            and all(
                layout.local is None
                and layout.as_parameter
                and len(layout.pieces) == 1
                and layout.pieces[0].span is None
                for layout in self.layouts
            )
        )

    @cached_property
    def all_dtensors(self) -> bool:
        """Whether all parameters are DTensors."""
        return all(self.placements)

    @cached_property
    def share_of(self) -> tuple[float, ...]:
        """``shares`` as numbers."""
        return tuple(self.shares.tolist())

    @cached_property
    def share_of_all(self) -> float | None:
        """What all of ``shares`` are; None where they differ."""
        return self.share_of[0] if len(set(self.share_of)) == 1 else None

    def slots_on(self, device: torch.device) -> Tensor:
        """``slots``, copied to a device once."""
        return self._copy("slots", device)

    def shares_on(self, device: torch.device) -> Tensor:
        """``shares``, copied to a device once."""
        return self._copy("shares", device)

    def _copy(self, name: str, device: torch.device) -> Tensor:
        if (name, device) not in self._copies:
            self._copies[name, device] = to_device(getattr(self, name), device)
        return self._copies[name, device]

    def index(self, places: Sequence[int], device: torch.device) -> Tensor | slice:
        """An index of the tensors at ascending ``places``."""
        return slice(None) if len(places) == len(self.tensors) else index(places, device)

    def limit_of(self, place: int, limits: Limits) -> Bounds | None:
        """What the elements of a tensor of this rank are limited to; None for nothing."""
        return limits if isinstance(limits, tuple) else limits.get(int(self.slots[place]))

    def holds_for(self, params: Sequence[Tensor]) -> bool:
        """Whether nothing has changed since, given that ``params`` are the same objects."""
        if not self.participants.is_current or self.traits != traits(params):
            return False
        if self.version != version():
            if self.declarations != [declared_of(param) for param in params]:
                return False
            self.version = version()
        return True


def make_plan(
    names: Sequence[str],
    params: Sequence[Tensor],
    *,
    settings: str = "",
    pipeline: RankGroup | None = None,
    linear: bool = True,
    describe: bool = False,
    by_rows: bool = False,
) -> Plan:
    """Build the plan. Collective over the groups that layouts and ``pipeline`` name.

    Args:
        names: of the parameters; the same on all ranks that hold pieces of the same tensor.
        params: the parameters, each once.
        settings: what must be the same on all participants besides.
        pipeline: the ranks that hold the stages of a pipeline.
        linear: whether gradients are only scaled, so that Partial ones can stay so.
        describe: whether every rank is to know the names and shapes of all tensors of the job.
        by_rows: whether rows of tensors are looked at.

    Raises:
        RuntimeError: the ranks disagree (on all of them); a parameter's layout cannot be known.
    """
    layouts = [layout_of(param) for param in params]
    device = params[0].device if params else torch.device("cpu")
    groups = [group for layout in layouts for group in layout.groups] + ([pipeline] if pipeline else [])
    stages = f", pipeline of {len(pipeline.ranks)} ranks" if pipeline else ", no pipeline_group"
    participants = connect(groups, settings + stages)
    agreement = _agreed(names, params, layouts, participants, pipeline)
    facts = agreement.facts
    weight_cuts = [piece_of.layout.distinct for piece_of in tensors_of(names, params, layouts)]
    layouts, settled = _as_placed(params, layouts, agreement, linear)
    tensors = list(tensors_of(names, params, layouts))
    held = list(zip(tensors, agreement.holders, strict=True))
    shares = [tensor.layout.distinct / holders if facts.reduces else 1.0 for tensor, holders in held]
    weight_shares = [cut / holders for cut, holders in zip(weight_cuts, agreement.holders, strict=True)]
    return Plan(
        names=tuple(names),
        layouts=tuple(layouts),
        settled=settled,
        tensors=tuple(tensor.name for tensor in tensors),
        numels=tuple(tensor.piece.shape.numel() for tensor in tensors),
        slots=torch.tensor(agreement.slots, dtype=torch.int64, device="cpu"),
        slot_count=agreement.slot_count,
        shares=torch.tensor(shares, dtype=torch.float64, device="cpu"),
        pieces=tuple(tensor.piece for tensor in tensors),
        weight_shares=torch.tensor(
            weight_shares if facts.reduces else [1.0] * len(tensors), dtype=torch.float64, device="cpu"
        ),
        described=_described(tensors, agreement, participants, pipeline) if describe else None,
        by_rows=by_rows,
        riding={place: _part(t.layout, holders) for place, (t, holders) in enumerate(held) if t.layout.partial},
        participants=participants if facts.reduces else Participants(),
        guards=frozenset(layout.guard for layout in layouts if layout.guard is not None),
        device=device,
        wire=_wire(participants, facts),
        float64=facts.wide and not facts.narrow,
        wide=facts.wide,
        placements=[param.placements if is_dtensor(param) else None for param in params],
        traits=traits(params),
        declarations=[declared_of(param) for param in params],
        version=version(),
    )


def _described(
    tensors: Sequence[Held], agreement: Agreement, participants: Participants, pipeline: RankGroup | None
) -> Tensors:
    """Names and shapes of all tensors of the job. Collective, unless all ranks have the same."""
    rows = []
    for tensor, slot, holders in zip(tensors, agreement.slots, agreement.holders, strict=True):
        # Of a tensor whose pieces are declared joined nobody knows the shape: their sizes tell its own.
        part = tensor.piece.shape.numel() * tensor.layout.distinct / holders if tensor.layout.joined else None
        rows.append([slot, tensor.name, identity_of(tensor, pipeline), list(tensor.piece.shape), part])
    plain = not any(tensor.layout.joined or tensor.layout.tie is not None for tensor in tensors)
    told = {json.dumps(rows): 1}
    if participants.group is not None and not (agreement.alike and plain):
        # Ranks of one stage tell the same.
        told = Counter(Wire(participants.ranks, participants.group).texts(json.dumps(rows)))
    names = dict.fromkeys(range(agreement.slot_count), "")
    identities, shapes, sizes = dict(names), dict.fromkeys(names, torch.Size()), dict.fromkeys(names, 0.0)
    for text, ranks in reversed(told.items()):
        for slot, name, identity, shape, part in reversed(json.loads(text)):
            names[slot], identities[slot] = name, identity
            sizes[slot] += ranks * (part or 0.0)
            shapes[slot] = torch.Size(shape if part is None else [round(sizes[slot])])
    often = Counter(names.values())
    unique = [name if often[name] == 1 else identities[slot] for slot, name in names.items()]
    return Tensors(unique, list(shapes.values()), torch.device("cpu"))


def _wire(participants: Participants, facts: Facts) -> torch.device | None:
    if participants.group is None or not facts.reduces:
        return None
    return comm_device(participants.group, accelerated=facts.accelerated)


def _part(layout: GradLayout, holders: int) -> float:
    """What a Partial part counts: each set of parts is there once for every replica."""
    return layout.partial_scale * math.prod(len(group.ranks) for group in layout.partial) / holders


class Held(NamedTuple):
    name: str
    param: Tensor
    layout: GradLayout
    piece: Piece


def tensors_of(names: Sequence[str], params: Sequence[Tensor], layouts: Sequence[GradLayout]) -> Iterator[Held]:
    for name, param, layout in zip(names, params, layouts, strict=True):
        for piece in layout.pieces:
            yield Held(name if piece.name is None else _sibling(name, piece.name), param, layout, piece)


def _sibling(name: str, other: str) -> str:
    """``other`` in place of the last component of ``name``."""
    parent, _, _ = name.rpartition(".")
    return f"{parent}.{other}" if parent else other


def _agreed(
    names: Sequence[str],
    params: Sequence[Tensor],
    layouts: Sequence[GradLayout],
    participants: Participants,
    pipeline: RankGroup | None,
) -> Agreement:
    entries = [
        Entry(identity_of(tensor, pipeline), looks_of(tensor), tensor.layout.distinct, _placed(tensor.param))
        for tensor in tensors_of(names, params, layouts)
    ]
    placed = {letter for entry in entries for letter in decoded(entry.placed) or ""}
    wide = {param.dtype in WIDE for param in params}
    facts = Facts(
        reduces=pipeline is not None or bool(placed - {"R"}) or any(layout.needs_reduction for layout in layouts),
        wide=True in wide,
        narrow=False in wide,
        accelerated=any(param.device.type != "cpu" for param in params),
    )
    if participants.group is None:
        return alone(entries, facts)
    return agree(Wire(participants.ranks, participants.group), entries, facts)


def identity_of(tensor: Held, pipeline: RankGroup | None) -> str:
    """A text that is the same on two ranks where they have pieces of the same tensor."""
    layout = tensor.layout
    if layout.tie is not None:
        # A tied tensor may have another name on each stage: its place among the declared ones stands for it.
        tied = layout.replicated[-1]
        stages = [pipeline.order(rank) for rank in tied.ranks if rank in pipeline.ranks] if pipeline else []
        if pipeline is None or len(stages) > 1:
            return f"tensor {layout.tie} of those declared replicated on stages {stages or len(tied.ranks)}"
    places = [("stage", pipeline)] if pipeline else []
    places += [("place", group) for group in layout.apart]
    told = [f"{what} {group.order(dist.get_rank())} of {len(group.ranks)}" for what, group in places]
    return ", ".join([tensor.name, *told])


def looks_of(tensor: Held) -> str:
    shape = "pieces declared joined" if tensor.layout.joined else f"shape {tuple(tensor.piece.shape)}"
    return f"{shape}, {tensor.param.dtype}"


def _placed(param: Tensor) -> int:
    """How the gradient is placed now, as a number; 0 where there is none, or it is no DTensor."""
    if is_dtensor(param) and param.grad is not None and param.device_mesh.get_coordinate() is not None:
        return encoded(kinds(param.grad)) if is_dtensor(param.grad) else 0
    return 0


def _as_placed(
    params: Sequence[Tensor], layouts: Sequence[GradLayout], agreement: Agreement, linear: bool
) -> tuple[list[GradLayout], dict[int, str]]:
    """The layouts of gradients as the ranks agreed that they are placed, and which must be reduced before each clip."""
    placed = iter(agreement.placed)
    result: list[GradLayout] = []
    settled: dict[int, str] = {}
    for place, (param, layout) in enumerate(zip(params, layouts, strict=True)):
        letters = [decoded(next(placed)) for _ in layout.pieces]
        if is_dtensor(param) and letters and letters[0] is not None and letters[0] != kinds(param):
            actual = layout_of(param, letters[0])
            if actual.partial and not (linear and not actual.sharded and param.numel() <= _RIDES):
                settled[place] = letters[0]
            else:
                layout = actual
        result.append(layout)
    return result, settled
