"""From gradients to norms: the local sums and the one collective.

A clip reads the local gradients once and, where something is sharded, runs one all-reduce (SUM) of one packed float64
buffer over all participants; where nothing is, it does not communicate. Every statistic rides in that buffer. Maxima
do too: each rank writes its own into a slot of its own, so that the sum of the slots holds those of all ranks, NaN
included (which MAX loses on some backends).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distclip import rows
from distclip.gradients import LocalGrads
from distclip.handshake import Wire, digest
from distclip.kernels import kernels_for
from distclip.kernels.common import WIDE, together
from distclip.participants import Participants
from distclip.plan import Plan
from distclip.rules.base import Norms
from distclip.rules.stages import Pass
from distclip.statistics import extremes_of, rows_of_weights, rows_sums

# Between these p, |g|**p of every finite bf16, fp16 and fp32 value (1e-45 to 3e38) stays inside float64, and so does
# the p-th root of the sum.
_SAFE_P = (0.2, 6.0)
# A sum below this has lost digits to float64's subnormal numbers.
_SMALLEST_SUM = 1e-290


class StalePlan(Exception):
    """Some rank's parameters changed since the plan was made: all must make it anew."""


class Failure(RuntimeError):
    """Another rank cannot clip: its own error says why."""


def measure(
    plan: Plan,
    grads: dict[torch.device, LocalGrads],
    wanted: Pass,
    how: str = "",
    trouble: type[Exception] | None = None,
    seen: Seen | None = None,
) -> Norms:
    """The norms that are ``wanted``, the same bits on every participant. Collective: one all-reduce at most.

    Args:
        how: what else must be the same on all ranks in this clip.
        trouble: StalePlan or Failure, where this rank takes part only to tell the others of it.
        seen: what else of this step is asked for.

    Returns:
        Norms on the device of the first gradient (of the first parameter where this rank has none).

    Raises:
        OverflowError: ``|g|**p`` of finite gradients leaves float64; on every participant.
        RuntimeError: the ranks' rules differ; on every participant (on the CPU: elsewhere looking would wait).
        StalePlan, Failure: the ``trouble`` of some rank; on every participant (likewise).
    """
    device = next(iter(grads), plan.device)
    wire = device if plan.wire is None else plan.wire
    return combined(plan, local_sums(plan, grads, wanted, wire, seen), wanted, device, how, trouble)


class Seen(NamedTuple):
    """What a rule may ask for besides gradients."""

    params: Sequence[Tensor] = ()
    loss: Tensor | None = None
    """Of this rank; 0-d."""


class LocalSums(NamedTuple):
    """What one rank has to say in the all-reduce; float64."""

    powers: Tensor
    """Its share of each tensor's ``sum(|g|**p)`` (for the inf-norm: ``max(|g|)``), shape ``(tensors,)``; of all
    together, shape ``(1,)``, where single tensors are not asked for."""
    range_flags: Tensor
    """How many of these sums left float64, see ``_range_flags``; shape ``(3,)``."""
    extremes: Tensor | None = None
    """The largest of -g and of g, shape ``(2,)``, where the rule limits elements."""
    others: dict[str, Tensor] = {}  # noqa: RUF012  # never written to
    """Its share of what else is added up, by name."""
    per_tensor_extremes: Tensor | None = None
    """As ``extremes``, of each tensor of the job; shape ``(tensors, 2)``."""
    riding: Tensor | None = None
    """Its parts of the Partial gradients that ride, end to end."""


def local_sums(
    plan: Plan, grads: dict[torch.device, LocalGrads], wanted: Pass, wire: torch.device, seen: Seen | None = None
) -> LocalSums:
    """Read this rank's gradients, once for each kind of statistic; the sums lie on ``wire``. Never communicates."""
    return LocalSums(
        *_powers(plan, grads, wanted, wire),
        extremes=_extremes(grads, wire) if wanted.limits_elements and not wanted.needs_extremes else None,
        others=_others(plan, grads, wanted, wire, seen or Seen()),
        per_tensor_extremes=extremes_of(plan, grads, wire) if wanted.needs_extremes else None,
        riding=_parts(plan, grads, wire) if plan.riding else None,
    )


def _others(
    plan: Plan, grads: dict[torch.device, LocalGrads], wanted: Pass, wire: torch.device, seen: Seen
) -> dict[str, Tensor]:
    """What is added up besides the powers."""
    found = {}
    if wanted.needs_units:
        found["unit_norms"] = rows_sums(plan, grads, wire, rows.squares, plan.shares)
        found["weight_norms"] = rows_of_weights(plan, seen.params, wire)
    if wanted.needs_means:
        found["unit_means"] = rows_sums(plan, grads, wire, rows.sums, plan.shares)
    if wanted.needs_loss:
        loss = torch.zeros(2, dtype=torch.float64, device=wire)
        if seen.loss is not None:
            loss[0], loss[1] = seen.loss.detach().to(wire, torch.float64), 1.0
        found["loss"] = loss
    return found


def combined(
    plan: Plan,
    local: LocalSums,
    wanted: Pass,
    device: torch.device,
    how: str = "",
    trouble: type[Exception] | None = None,
) -> Norms:
    """The norms, on ``device``, of what all participants summed. Collective; arguments and errors: see ``measure``."""
    p, group, powers = wanted.norm_type, plan.participants.group, local.powers
    wire = powers.device
    header = _header(wanted.signature + how, trouble is StalePlan, trouble is Failure, wire)
    sums = {"header": header, "range_flags": local.range_flags, **local.others}
    maxima: dict[str, Tensor] = {}
    chosen = maxima if math.isinf(p) else sums
    chosen["total"] = _total(powers, p)
    if wanted.needs_per_tensor:
        chosen["per_tensor"] = powers.new_zeros(plan.slot_count).index_add_(0, plan.slots_on(wire), powers)
    if local.extremes is not None:
        maxima["extremes"] = local.extremes
    if local.per_tensor_extremes is not None:
        maxima["per_tensor_extremes"] = local.per_tensor_extremes.view(-1)
    if local.riding is not None:
        sums["partial"] = local.riding
    reduced = _all_reduce(plan.participants, sums, maxima)
    if group is not None and wire.type == "cpu":
        _check_header(plan, group, wanted.signature + how, reduced["header"])
    if plan.riding:
        _add_riding(plan, reduced, p)
    if _out_of_range(plan, p, reduced):
        raise OverflowError(
            f"norm_type={p}: |g|**{p} of these finite gradients leaves float64 (or their norm does), so that the norm "
            "cannot be computed. Use a norm_type nearer to 2, or inf."
        )
    norms = {name: values.to(device) for name, values in reduced.items()}
    if not math.isinf(p):
        for name in norms.keys() & {"total", "per_tensor"}:
            norms[name] = norms[name].sqrt() if p == 2 else norms[name].pow(1.0 / p)
    return _as_norms(plan, norms, wanted, device)


def _as_norms(plan: Plan, found: dict[str, Tensor], wanted: Pass, device: torch.device) -> Norms:
    """What rules see of the sums."""
    tensors = plan.described.to(device) if plan.described is not None and wanted.needs_tensors else None
    extremes, by_tensor = found.get("extremes"), found.get("per_tensor_extremes")
    if by_tensor is not None:
        by_tensor = by_tensor.view(-1, 2)
        extremes = by_tensor.amax(0) if len(by_tensor) else by_tensor.new_full((2,), -math.inf)
    means, loss = found.get("unit_means"), found.get("loss")
    if means is not None:
        assert tensors is not None
        means = means / tensors.unit_numels.clamp(min=1)
    return Norms(
        total=found["total"][0],
        per_tensor=found.get("per_tensor"),
        extremes=extremes,
        per_tensor_extremes=by_tensor,
        unit_norms=found["unit_norms"].sqrt() if wanted.needs_units else None,
        weight_norms=found["weight_norms"].sqrt() if wanted.needs_units else None,
        unit_means=means,
        tensors=tensors,
        loss=None if loss is None else loss[0] / loss[1],
        norm_type=wanted.norm_type,
    )


def forewarn(plan: Plan, wanted: Pass, how: str = "", trouble: type[Exception] | None = None) -> None:
    """Exchange the header alone, before collectives that a rank in trouble will not come to. Raises as ``measure``."""
    group = plan.participants.group
    if group is not None and plan.wire is not None and plan.wire.type == "cpu":
        header = _header(wanted.signature + how, trouble is StalePlan, trouble is Failure, plan.wire)
        _add_up(plan.participants, header)
        _check_header(plan, group, wanted.signature + how, header)


def _header(text: str, stale: bool, failed: bool, wire: torch.device) -> Tensor:
    """Number of ranks with a stale plan, of ranks that failed, and a number for the text by which ranks clip."""
    # A copy to an accelerator waits for it.
    return (_new_header if wire.type == "cpu" else _known_header)(text, stale, failed, wire)


def _new_header(text: str, stale: bool, failed: bool, wire: torch.device) -> Tensor:
    return torch.tensor([stale, failed, _signature(text)], dtype=torch.float64, device=wire)


_known_header = lru_cache(maxsize=64)(_new_header)


def _signature(text: str) -> int:
    """Small enough that float64 adds up those of all ranks exactly."""
    return digest(text) % (1 << 24)


def _check_header(plan: Plan, group: dist.ProcessGroup, text: str, header: Tensor) -> None:
    stale, failed, signatures = header.tolist()
    if failed:
        raise Failure(
            "another rank that takes part in this clip raised an error, which says why. No gradient was changed here."
        )
    if stale:
        raise StalePlan
    if signatures != len(plan.participants) * _signature(text):
        told = Wire(plan.participants.ranks, group).told(text)
        raise RuntimeError(
            f"the ranks that clip together disagree on the rule:{told}\nNo gradient was changed. Clip by the same rule "
            "on every rank. If the clips' numbers differ, one of them raised, or was interrupted, on some ranks alone, "
            "or some did not load the clipper's state: resume all from a checkpoint."
        )


def _powers(
    plan: Plan, grads: dict[torch.device, LocalGrads], wanted: Pass, wire: torch.device
) -> tuple[Tensor, Tensor]:
    """See ``LocalSums``: the powers, and flags on their range."""
    p = wanted.norm_type
    ranged = any(may_leave_float64(p, local.pieces) for local in grads.values())
    one_by_one = wanted.needs_per_tensor or ranged or plan.overlap is not None
    powers = torch.zeros(len(plan.tensors) if one_by_one else 1, dtype=torch.float64, device=wire)
    flags = torch.zeros(3, dtype=torch.float64, device=wire)
    for device, local in grads.items():
        pieces, places = local.whole()
        if not pieces:
            continue
        if not one_by_one:
            for share, group in _by_share(plan, pieces, places):
                power = kernels_for(device).total_power(group, p).to(wire)
                powers = torch.maximum(powers, power) if math.isinf(p) else powers.add_(power, alpha=share)
            continue
        if plan.overlap is None:
            local_powers = kernels_for(device).power_sums(pieces, p)
        else:
            local_powers = plan.overlap.power_sums(plan, device, pieces, places, p)
        powers[plan.index(places, wire)] = local_powers.to(wire)
        if may_leave_float64(p, pieces):
            largest = kernels_for(device).power_sums(pieces, math.inf)
            flags += _range_flags(local_powers, largest, p).to(wire)
    if one_by_one and not math.isinf(p):
        powers.mul_(plan.shares_on(wire))
    return powers, flags


def _by_share(plan: Plan, pieces: list[Tensor], places: list[int]) -> Iterable[tuple[float, list[Tensor]]]:
    """Pieces that count alike."""
    if plan.share_of_all is not None:
        return [(plan.share_of_all, pieces)]
    shares = plan.share_of
    groups: dict[float, list[Tensor]] = defaultdict(list)
    for piece, place in zip(pieces, places, strict=True):
        groups[shares[place]].append(piece)
    return groups.items()


def _parts(plan: Plan, grads: dict[torch.device, LocalGrads], wire: torch.device) -> Tensor:
    """This rank's parts of all Partial gradients that ride, end to end; zeros where it has none."""
    mine = {place: part for local in grads.values() for place, part in local.riding.items()}
    parts = []
    for place, factor in plan.riding.items():
        size = plan.numels[place]
        part = mine[place].reshape(-1).to(wire, torch.float64) * factor if place in mine else None
        parts.append(torch.zeros(size, dtype=torch.float64, device=wire) if part is None else part)
    return torch.cat(parts)


def _add_riding(plan: Plan, reduced: dict[str, Tensor], p: float) -> None:
    """Count the Partial gradients, which are whole now on every rank."""
    whole = reduced.pop("partial").split([plan.numels[place] for place in plan.riding])
    powers = kernels_for(whole[0].device).power_sums(list(whole), p)
    if not math.isinf(p) and (plan.wide or not _SAFE_P[0] <= p <= _SAFE_P[1]):
        largest = kernels_for(whole[0].device).power_sums(list(whole), math.inf)
        reduced["range_flags"] = reduced["range_flags"] + _range_flags(powers, largest, p)
    total = torch.cat((reduced["total"], powers))
    reduced["total"] = _total(total, p)
    if "per_tensor" in reduced:
        slots = plan.slots_on(powers.device)
        reduced["per_tensor"][slots[plan.index(list(plan.riding), powers.device)]] = powers


def _total(powers: Tensor, p: float) -> Tensor:
    return (together(powers, p) if powers.numel() else powers.sum()).view(1)


def _extremes(grads: dict[torch.device, LocalGrads], wire: torch.device) -> Tensor:
    """The largest of -g and of g, shape ``(2,)``."""
    ends = torch.full((2,), -math.inf, dtype=torch.float64, device=wire)
    for device, local in grads.items():
        each = kernels_for(device).extremes(local.pieces)
        ends = torch.maximum(ends, each.amax(0).to(wire))
    return ends


def _all_reduce(participants: Participants, sums: dict[str, Tensor], maxima: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each of ``sums`` added up, of ``maxima`` the largest, over all participants; in one collective."""
    if participants.group is None:
        return sums | maxima
    added = torch.cat(list(sums.values()))
    own = torch.cat(list(maxima.values())) if maxima else added.new_empty(0)
    slots = added.new_zeros(len(participants), own.numel())
    slots[participants.index] = own
    buffer = torch.cat((added, slots.view(-1)))
    _add_up(participants, buffer)
    largest = buffer[added.numel() :].view_as(slots).amax(0)
    parts = torch.cat((buffer[: added.numel()], largest)).split([v.numel() for v in (*sums.values(), *maxima.values())])
    return dict(zip((*sums, *maxima), parts, strict=True))


def _add_up(participants: Participants, buffer: Tensor) -> None:
    """The one collective, in place. The backend's error says which connection broke, not in what."""
    try:
        dist.all_reduce(buffer, group=participants.group)
    except RuntimeError as error:
        ranks = participants.ranks
        # Not an error of our own: launchers and frameworks know the backends' by their types.
        error.add_note(
            f"distclip: the all-reduce of this clip over {len(ranks)} ranks ({ranks[0]} to {ranks[-1]}) failed: one of "
            "them ended, or did not clip within the process group's timeout. The gradients of this rank are as they "
            "were before it. Other ranks may have clipped theirs: start all anew, from a checkpoint."
        )
        raise


def may_leave_float64(p: float, pieces: list[Tensor]) -> bool:
    """Whether the range of the power sums of these has to be looked at."""
    if math.isinf(p):
        return False
    return not _SAFE_P[0] <= p <= _SAFE_P[1] or not WIDE.isdisjoint(map(attrgetter("dtype"), pieces))


def _range_flags(powers: Tensor, largest: Tensor, p: float) -> Tensor:
    """Number of tensors whose power sum overflowed, underflowed, or holds a non-finite element; shape ``(3,)``."""
    finite = largest.isfinite()
    overflowed = finite & ~powers.isfinite()
    underflowed = finite & (largest > 0) & (largest.pow(p) < _SMALLEST_SUM)
    return torch.stack((overflowed, underflowed, ~finite)).sum(1).double()


def _out_of_range(plan: Plan, p: float, reduced: dict[str, Tensor]) -> bool:
    # Looking at the flags waits for the device: only where float64's range can matter at all.
    if math.isinf(p) or (_SAFE_P[0] <= p <= _SAFE_P[1] and not plan.wide):
        return False
    overflowed, underflowed, nonfinite = reduced["range_flags"].tolist()
    total = reduced["total"].item()
    norm_overflows = math.isfinite(total) and total > 0 and math.log(total) / p > math.log(1e308)
    too_small = underflowed > 0 and total < _SMALLEST_SUM
    return nonfinite == 0 and (overflowed > 0 or norm_overflows or too_small)
