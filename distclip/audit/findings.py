"""What an audit found, in words that say what to do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from distclip.audit.compare import Suspect
from distclip.audit.holdings import Holding, bits_of, is_patterned
from distclip.handshake import Wire, digest
from distclip.layout.dtensor import is_dtensor
from distclip.plan import Held, looks_of

# Names that one message lists.
_LISTED = 3
# Replicas whose norms differ by less may differ by rounding alone.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    kind: str
    """A short word for it: ``replicas``, ``not-averaged``, ``left-out`` ..."""
    parameter: str
    """The parameter concerned, the first where there are several; empty where it is none in particular."""
    ranks: tuple[int, ...]
    message: str
    """What differs, on which ranks, the likely cause and what to do."""


class Fact(NamedTuple):
    """What one rank tells of a tensor that is suspect."""

    name: str
    place: int
    """Among the rank's tensors."""
    system: str
    looks: str
    patterned: bool
    """Whether its gradient repeats itself, so that equal ones prove nothing."""
    value: int
    """Stands for the bits of the parameter itself, as far as they lie here."""


class Facts:
    """What all ranks told of the suspects."""

    def __init__(self, by_rank: dict[int, dict[int, Fact]]) -> None:
        self._by_rank = by_rank

    def of(self, identity: int, rank: int | None = None) -> Fact:
        """The fact of a rank, by default of the lowest that has the tensor."""
        return next(
            facts[identity] for other, facts in self._by_rank.items() if identity in facts and rank in (None, other)
        )

    def name(self, suspect: Suspect) -> str:
        return self.of(suspect.identities[0]).name

    def holders(self, identity: int) -> list[int]:
        return [rank for rank, facts in self._by_rank.items() if identity in facts]

    def values_differ(self, suspect: Suspect) -> bool:
        """Whether the parameters themselves do, be their gradients equal or not."""
        told = (self._by_rank[rank].get(identity) for rank in suspect.ranks for identity in suspect.identities)
        return len({fact.value for fact in told if fact is not None}) > 1


def ask(wire: Wire, holdings: Sequence[Holding], suspects: Sequence[Suspect]) -> Facts:
    """Learn what is behind the numbers. Collective; all ranks have the same suspects."""
    wanted = {identity for suspect in suspects for identity in suspect.identities}
    mine: dict[int, Fact] = {}
    for place, holding in enumerate(holdings):
        identity = digest(holding.identity)
        if identity in wanted:
            name, layout = holding.held.name, holding.held.layout
            facts = layout.system, looks_of(holding.held), is_patterned(holding), bits_of(_value(holding.held))
            mine[identity] = Fact(name, place, *facts)
    texts = wire.texts(json.dumps(list(mine.items())))
    return Facts(
        {rank: {i: Fact(*fact) for i, fact in json.loads(text)} for rank, text in zip(wire.ranks, texts, strict=True)}
    )


def _value(held: Held) -> Tensor:
    """What lies here of a parameter, or of the tensor that is packed into it."""
    local = held.param._local_tensor if is_dtensor(held.param) else held.param.detach()
    span = held.piece.span
    return local if span is None or local.numel() < sum(span) else local.reshape(-1).narrow(0, *span)


def findings_of(suspects: Sequence[Suspect], facts: Facts, compared: set[int], staged: bool) -> list[Finding]:
    """The findings, in the order of the parameters.

    Args:
        suspects: what looks wrong; what proves nothing is left out here.
        facts: of all of them.
        compared: the tensors of which there are replicas to compare.
        staged: whether a pipeline was named.
    """
    by_kind: dict[str, list[Suspect]] = {}
    for suspect in sorted(suspects, key=lambda s: facts.of(s.identities[0]).place):
        by_kind.setdefault(suspect.kind, []).append(suspect)
    found = _shapes(by_kind.get("shapes", []), facts, staged)
    found += _left_out(by_kind.get("left-out", []), facts, staged)
    found += _replicas(by_kind.get("replicas", []), facts, compared, staged)
    found += [_missing(suspect, facts) for suspect in by_kind.get("missing", [])]
    for kind, told in (("equal-pieces", _equal_pieces), ("equal-places", _equal_places), ("counted-twice", _twice)):
        for suspect in by_kind.get(kind, []):
            # What is one tensor has one value; a bias may have equal gradients without being one.
            if not facts.of(suspect.identities[0]).patterned and not facts.values_differ(suspect):
                found.append(told(suspect, facts))
    return found


def _shapes(suspects: Sequence[Suspect], facts: Facts, staged: bool) -> list[Finding]:
    """One finding for all tensors that differ between the same ranks."""
    together: dict[tuple[tuple[int, ...], ...], list[Suspect]] = {}
    for suspect in suspects:
        together.setdefault(suspect.clusters, []).append(suspect)
    found = []
    for clusters, alike in together.items():
        names = [facts.name(suspect) for suspect in alike]
        looks = [facts.of(alike[0].identities[0], ranks[0]).looks for ranks in clusters]
        told = ", ".join(f"{text} on {rank_names(ranks)}" for text, ranks in zip(looks, clusters, strict=True))
        others = f" ({listed(names[1:])} likewise)" if len(names) > 1 else ""
        message = (
            f"{names[0]} has {told}{others}: under one name these ranks hold different tensors. "
            f"{_own(alike[0].ranks, staged)}"
        )
        found.append(Finding("shapes", names[0], alike[0].ranks, message))
    return found


def _own(ranks: Sequence[int], staged: bool) -> str:
    """What to do about tensors that each rank has of its own."""
    stages = f"If they are stages of a pipeline, pass pipeline_group=<the group of {rank_names(ranks)}>. "
    return ("" if staged else stages) + (
        "If they are experts or hand-made shards, call distclip.declare(<the parameters>, sharded="
        f"<the group of {rank_names(ranks)}>)."
    )


def _left_out(suspects: Sequence[Suspect], facts: Facts, staged: bool) -> list[Finding]:
    """One finding for all tensors that the same ranks hold."""
    together: dict[tuple[tuple[int, ...], ...], list[str]] = {}
    for suspect in suspects:
        together.setdefault(suspect.clusters, []).append(facts.name(suspect))
    found = []
    for (holding, outside), names in together.items():
        ranks = tuple(sorted(holding + outside))
        message = (
            f"{listed(names)} {'is' if len(names) == 1 else 'are'} on {rank_names(holding)} only, and the norm on "
            f"{rank_names(outside)} leaves {'it' if len(names) == 1 else 'them'} out. {_own(ranks, staged)}"
        )
        found.append(Finding("left-out", names[0], ranks, message))
    return found


def _replicas(suspects: Sequence[Suspect], facts: Facts, compared: set[int], staged: bool) -> list[Finding]:
    """Each by itself; or, where no gradient at all agrees, one finding for all that are not called experts."""
    experts = [suspect for suspect in suspects if "expert" in facts.name(suspect).lower()]
    others = [suspect for suspect in suspects if suspect not in experts]
    if others and {suspect.identities[0] for suspect in suspects} >= compared:
        return [_nothing_agrees(others, facts, staged), *(_replica(suspect, facts) for suspect in experts)]
    return [_replica(suspect, facts) for suspect in suspects]


def _replica(suspect: Suspect, facts: Facts) -> Finding:
    name, system = facts.name(suspect), facts.of(suspect.identities[0]).system
    where = between(suspect.clusters)
    if system == "plain":
        own = (
            f"If each rank holds one of its own, as experts do: distclip.declare(<{name}>, sharded=<the group of "
            f"{rank_names(suspect.ranks)}>)."
        )
        one = "If it is one parameter, its gradient was not summed: all-reduce it over these ranks after backward()."
        likely = facts.values_differ(suspect) or "expert" in name.lower()
        what = f"but nothing declares it sharded. {f'{own} {one}' if likely else f'{one} {own}'}"
    else:
        what = (
            f"but {system} says that they hold the same piece. Reduce it over these ranks as the others are, and "
            "change no gradient on one rank alone between backward() and clip()."
        )
    return Finding("replicas", name, suspect.ranks, f"{name} differs between {where}, {what}{_rounding(suspect)}")


def _rounding(suspect: Suspect) -> str:
    if suspect.closeness > _ROUNDING:
        return ""
    return (
        f" (Norms agree to {max(suspect.closeness, 1e-16):.0e}: if it is rounding, audit(..., tolerance=) accepts it.)"
    )


def _nothing_agrees(suspects: Sequence[Suspect], facts: Facts, staged: bool) -> Finding:
    # Several pieces of one tensor may be suspect.
    first, names = suspects[0], list(dict.fromkeys(facts.name(suspect) for suspect in suspects))
    systems = {facts.of(suspect.identities[0]).system for suspect in suspects}
    head = f"no gradient agrees between {between(first.clusters)} ({listed(names)}): "
    if "DDP" in systems:
        cause = (
            "DDP has not averaged them. Run forward and backward of the last micro-batch outside no_sync(), and change "
            "no gradient on one rank alone between backward() and clip()."
        )
    else:
        averaged = (
            "they were not averaged over the ranks. Wrap the model in DistributedDataParallel, or all-reduce every "
            "gradient after backward() and divide it by the number of ranks."
        )
        own = "the ranks hold different tensors. " + _own(first.ranks, staged)
        differ = all(facts.values_differ(suspect) for suspect in suspects)
        cause = (
            f"the parameters differ too, so perhaps {own} If they are one model, {averaged}"
            if differ
            else f"{averaged} Or {own}"
        )
    return Finding("not-averaged", names[0], first.ranks, head + cause)


def _missing(suspect: Suspect, facts: Facts) -> Finding:
    name, (having, lacking) = facts.name(suspect), suspect.clusters
    message = (
        f"{name} has a gradient on {rank_names(having)} but none on {rank_names(lacking)}, which hold the same tensor: "
        "what the first step by, the others do not. All-reduce it on every rank (zeros where it is None), or, if each "
        f"rank holds one of its own, distclip.declare(<{name}>, sharded=<the group of {rank_names(suspect.ranks)}>)."
    )
    return Finding("missing", name, suspect.ranks, message)


def _equal_pieces(suspect: Suspect, facts: Facts) -> Finding:
    name, system = facts.name(suspect), facts.of(suspect.identities[0]).system
    message = (
        f"{name} is cut over {rank_names(suspect.ranks)}, says {'declare' if system == 'plain' else system}, but all "
        "pieces are equal: if they are one tensor that each rank holds whole, it counts once for every rank. Say "
        "that it is replicated (undeclare() it, or place the DTensor as Replicate())."
    )
    return Finding("equal-pieces", name, suspect.ranks, message)


def _equal_places(suspect: Suspect, facts: Facts) -> Finding:
    name = facts.name(suspect)
    message = (
        f"{name} is declared sharded, but its gradient is the same on {rank_names(suspect.ranks)}: it counts "
        f"{len(suspect.clusters)} times. If it is one tensor, distclip.undeclare(<{name}>)."
    )
    return Finding("equal-places", name, suspect.ranks, message)


def _twice(suspect: Suspect, facts: Facts) -> Finding:
    names = [facts.of(identity).name for identity in suspect.identities]
    where = " and ".join(
        f"{name} on {rank_names(facts.holders(identity))}"
        for name, identity in zip(names, suspect.identities, strict=True)
    )
    message = (
        f"{where} have the same gradient: if they are one tied tensor, it counts {len(names)} times. Say so on each of "
        f"them: distclip.declare(<the tied parameter>, replicated=<the group of {rank_names(suspect.ranks)}>)."
    )
    return Finding("counted-twice", names[0], suspect.ranks, message)


def told_together(findings: Sequence[Finding], most: int = 100) -> list[str]:
    """The messages; those that differ in the parameter's name alone become one, which lists ``most`` others."""
    alike: dict[str, list[Finding]] = {}
    for finding in findings:
        pattern = finding.message.replace(finding.parameter, "*") if finding.parameter else finding.message
        alike.setdefault(f"{finding.kind}: {pattern}", []).append(finding)
    told = []
    for same in alike.values():
        others = listed([finding.parameter for finding in same[1:]], most)
        told.append(f"{same[0].kind}: {same[0].message}" + (f" (So it is with {others}.)" if others else ""))
    return told


def listed(names: Sequence[str], most: int = _LISTED) -> str:
    """``a, b, c and 4 more``; nothing of none."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def between(clusters: Sequence[Sequence[int]]) -> str:
    """Who differs: ``ranks 0 and 1``, ``ranks 0-1 and 2-3``, ``ranks 0-3``."""
    if len(clusters) == 2:
        return f"ranks {ranges(clusters[0])} and {ranges(clusters[1])}"
    return rank_names(sorted(rank for cluster in clusters for rank in cluster))


def rank_names(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranges(ranks)}"


def ranges(ranks: Iterable[int]) -> str:
    """``0-2,5``; nothing of no rank."""
    ordered = sorted(ranks)
    starts = [rank for before, rank in pairwise([-2, *ordered]) if rank != before + 1]
    ends = [rank for rank, after in pairwise([*ordered, ordered[-1] + 2]) if after != rank + 1] if ordered else []
    spans = zip(starts, ends, strict=True)
    return ",".join(str(a) if a == b else f"{a}-{b}" if b > a + 1 else f"{a},{b}" for a, b in spans)
