"""What a rank can find wrong by itself, and telling the others."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor
from torch.optim import Optimizer

from distclip.audit.findings import Finding, listed, rank_names
from distclip.handshake import Wire
from distclip.layout.dtensor import is_dtensor

Note = tuple[str, str, str]
"""Kind, parameter and message of a finding."""


def shared(wire: Wire, notes: Sequence[Note]) -> list[Finding]:
    """The findings of all ranks' notes, each once, with the ranks that made it. Collective."""
    said: dict[Note, list[int]] = {}
    for rank, text in zip(wire.ranks, wire.texts(json.dumps(list(notes))), strict=True):
        for kind, parameter, message in json.loads(text):
            said.setdefault((kind, parameter, message), []).append(rank)
    alone = len(wire.ranks) == 1
    return [
        Finding(kind, parameter, tuple(ranks), message if alone else f"on {rank_names(ranks)}, {message}")
        for (kind, parameter, message), ranks in said.items()
    ]


def unreduced(guards: Iterable[Callable[[], None]]) -> tuple[list[Note], bool]:
    """What the wrappers say of gradients that they have not reduced, and whether that is an error."""
    told: dict[str, None] = {}
    error = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for guard in guards:
            try:
                guard()
            except RuntimeError as raised:
                told[str(raised)] = None
                error = True
    told |= {str(warning.message): None for warning in caught}
    return [("unreduced", "", message) for message in told], error


def aliased(named: dict[str, Tensor]) -> list[Note]:
    """Parameters that share their memory: tied by value, not as one parameter, so that each counts by itself."""
    owners: dict[tuple[object, int, int], str] = {}
    notes = []
    for name, param in named.items():
        local = param._local_tensor if is_dtensor(param) else param
        if local.device.type == "meta" or not local.numel() or not local.data_ptr():
            continue
        owner = owners.setdefault((local.device, local.data_ptr(), local.numel()), name)
        if owner != name:
            message = (
                f"{owner} and {name} are two parameters in one memory: each has a part of the gradient, and the norm "
                "counts the parts apart. Make them one parameter, as in model.head.weight = model.embed.weight, after "
                "the model was converted and before it is wrapped."
            )
            notes.append(("shared-memory", owner, message))
    return notes


def forgotten(named: dict[str, Tensor], optimizers: Sequence[Optimizer]) -> list[Note]:
    """Where model and optimizers do not have the same parameters."""
    if not optimizers:
        return []
    stepped = {id(p): p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    own = {id(param) for param in named.values()}
    notes = []
    strange = [param for key, param in stepped.items() if key not in own]
    if strange:
        shapes = listed([str(tuple(param.shape)) for param in strange])
        message = (
            f"the optimizer steps what is no parameter of this model ({len(strange)}, of shape {shapes}): parameters "
            "were replaced after the optimizer was made (by wrapping, load_state_dict(assign=True), .to()), and are "
            "not trained. Make the optimizer from model.parameters() after the last of these."
        )
        notes.append(("optimizer-stale", "", message))
    missing = [name for name, param in named.items() if param.requires_grad and id(param) not in stepped]
    if missing:
        message = (
            f"{listed(missing)} {'is' if len(missing) == 1 else 'are'} in no optimizer: clipped, counted in the norm, "
            "and never stepped. Add to its param groups, or requires_grad_(False)."
        )
        notes.append(("optimizer-misses", missing[0], message))
    return notes


def as_optimizers(optimizer: object) -> list[Optimizer]:
    """A user's ``optimizer`` as a list.

    Raises:
        TypeError: something in it is no optimizer.
    """
    if optimizer is None:
        return []
    found: list[Optimizer] = []
    for one in optimizer if isinstance(optimizer, Iterable) else [optimizer]:
        if not isinstance(one, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or an iterable of them, got {one!r:.80}")
        found.append(one)
    return found
