"""What a clip costs as ranks, tensors and bytes grow: measured here and fitted, and modelled for 16 to 16,384 GPUs.

    python launch/scale.py              # some minutes: a table, a picture, the constants
    python launch/scale.py --quick      # a fraction of it
    python launch/scale.py --model      # the modelled table; measures nothing
    python launch/scale.py --docs       # measures, and puts tables, constants and picture into docs/scale.md

It starts its own ranks on this machine's CPU, over gloo. Where there are fewer cores than ranks, these take turns.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from scale_fit import COLOURS, Fit, fitted, save_picture
from scale_ranks import Case, Timing, as_text, read

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "scale.md"
PICTURE = DOCUMENT.parent / "pictures" / "scale.png"
SMALL = 64
#: Seconds that one number of ranks may take.
PATIENCE = 1200


def sweeps(quick: bool) -> list[list[Case]]:
    """More ranks, more tensors, more bytes."""
    most_tensors, most_bytes = (3_000, 2**26) if quick else (100_000, 2**30)
    tensors = [count for count in (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000) if count <= most_tensors]
    sizes = [2**power for power in range(20, 31, 2) if 2**power <= most_bytes]
    return [
        [Case(ranks, 100, SMALL) for ranks in (1, 2, 4, 8)],
        [Case(2, count, SMALL) for count in tensors],
        [Case(2, 16, size // 64) for size in sizes],
    ]


def measure(cases: Sequence[Case]) -> list[Timing]:
    """Start ranks for each number of them, and collect what they measured."""
    timings: list[Timing] = []
    ordered = sorted(set(cases), key=lambda case: (case.ranks, case.nbytes))
    for ranks, group in groupby(ordered, key=lambda case: case.ranks):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "timings.jsonl"
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command = [*launcher, str(HERE / "scale_ranks.py"), str(out), as_text(list(group))]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)
            if done.returncode != 0:
                raise RuntimeError(f"{ranks} ranks ended with status {done.returncode}:\n{done.stderr}")
            timings += read(out)
    return timings


@dataclass(frozen=True)
class Machine:
    """Constants of a GPU cluster. None was measured here: docs/scale.md says where each is from."""

    node: int = 8
    """GPUs of one node, joined by NVLink."""
    memory: float = 3.35e12
    """Bytes a second that a GPU's memory delivers on paper (H100 SXM) ..."""
    reached: float = 0.8
    """... and the share of it that a reduction reaches."""
    launch: float = 5e-6
    """Seconds to launch one kernel."""
    base: float = 4.4e-6
    """Seconds of any all-reduce (NCCL's tree, protocol LL) ..."""
    hop: float = 0.52e-6
    """... of one hop inside a node, 1.8 times as much where there are several nodes ..."""
    net: float = 5e-6
    """... and of one between nodes."""
    wire: float = 1e10
    """Bytes a second of such an all-reduce."""


class Cost(NamedTuple):
    """Modelled seconds until every rank knows the norm."""

    read: float
    """Of the rank's shard, once; or the launching of kernels, where that takes longer."""
    reduce: float
    """All collectives, one after the other."""

    @property
    def total(self) -> float:
        return self.read + self.reduce


class Collective(NamedTuple):
    """One all-reduce."""

    nodes: int
    """Over so many nodes ..."""
    ranks: int
    """... with so many of its ranks on each."""
    nbytes: int


H100 = Machine()


def all_reduce_seconds(collective: Collective, machine: Machine = H100) -> float:
    """NCCL's own estimate for a tree: up and down, over the GPUs of a node one by one, over nodes by halves."""
    nodes, ranks, nbytes = collective
    if nodes * ranks == 1:
        return 0.0
    hop = machine.hop * (1.8 if nodes > 1 else 1.0)
    hops = 2 * ((ranks - 1) * hop + math.floor(math.log2(nodes)) * machine.net)
    return machine.base + machine.launch + hops + nbytes / machine.wire


def model(
    gpus: int,
    collectives: Sequence[Collective],
    parameters: float,
    tensors: int,
    machine: Machine = H100,
    nbytes: int = 4,
) -> Cost:
    """What one norm costs.

    Args:
        gpus: over which the gradients are cut evenly.
        collectives: what is reduced.
        parameters: elements of all gradients.
        tensors: of the model.
        machine: its constants.
        nbytes: of one element.
    """
    reading = parameters * nbytes / gpus / (machine.memory * machine.reached)
    # Kernels for many tensors take about a hundred at a time; then come the sums of their sums.
    launching = (math.ceil(tensors / 100) + 5) * machine.launch
    return Cost(max(reading, launching), sum(all_reduce_seconds(each, machine) for each in collectives))


#: The model of the table: 70 billion parameters in 723 tensors (Llama's 70B), gradients in float32.
PARAMETERS, TENSORS = 70e9, 723
#: Header, flags and sum of squares: the buffer of distclip's one all-reduce, in float64.
BUFFER = 56


def collectives_of(way: str, gpus: int) -> list[Collective]:
    """What is reduced for the norm: by distclip whatever the layout, by others as docs/scale.md tells."""
    nodes, node, norms = max(1, gpus // H100.node), min(gpus, H100.node), 4 * TENSORS
    data = Collective(nodes, 1, norms)
    ways = {
        "distclip": [Collective(nodes, node, BUFFER)],
        "torch, FSDP2": [Collective(nodes, node, norms)],
        "torch, FSDP2 x TP": [data, Collective(1, node, norms)],
        "torchtitan, FSDP2 x TP x PP": [
            Collective(max(1, nodes // 2), 1, norms // 2),
            Collective(1, node, norms // 2),
            Collective(2, 1, 4),
        ],
        "torchtitan, x EP too": [
            *[Collective(max(1, nodes // 2), 1, norms // 4), Collective(1, node, norms // 4)] * 2,
            Collective(2, 1, 4),
        ],
    }
    return ways[way]


GPUS = tuple(4**power for power in range(2, 8))
WAYS = ("distclip", "torch, FSDP2", "torch, FSDP2 x TP", "torchtitan, FSDP2 x TP x PP", "torchtitan, x EP too")


def table() -> str:
    """The model as docs/scale.md shows it."""
    lines = [
        "| GPUs | read, us | " + " | ".join(WAYS) + " |",
        "|---|---|" + "---|" * len(WAYS),
    ]
    for gpus in GPUS:
        read_us = 1e6 * model(gpus, [], PARAMETERS, TENSORS).read
        cells = []
        for way in WAYS:
            reduced = collectives_of(way, gpus)
            micros = 1e6 * model(gpus, reduced, PARAMETERS, TENSORS).reduce
            cells.append(f"{len(reduced)}: {sum(each.nbytes for each in reduced)} B, {micros:.0f} us")
        lines.append(f"| {gpus:,} | {read_us:,.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(timings: Sequence[Timing], fits: Sequence[Fit]) -> str:
    """The timings as a table, the constants as another."""
    ways = [fit.way for fit in fits]
    taken = {(timing.case, timing.way): timing.seconds for timing in timings}
    lines = [f"| ranks | tensors | MiB a rank | {', ms | '.join(ways)}, ms |", "|---" * (3 + len(ways)) + "|"]
    for case in dict.fromkeys(timing.case for timing in timings):
        cells = " | ".join(f"{1e3 * taken[case, way]:.3g}" if (case, way) in taken else "-" for way in ways)
        lines.append(f"| {case.ranks} | {case.tensors:,} | {case.nbytes / 2**20:.3g} | {cells} |")
    head = "| | us a clip | us a tensor | ms a GiB | us a doubling of ranks | off by, median |"
    lines += ["", head, "|---" * 6 + "|"]
    scales = (1e6, 1e6, 1e3 * 2**30, 1e6)
    for fit in fits:
        parts = zip(fit.constants, fit.errors, scales, strict=True)
        cells = " | ".join(f"{value * scale:.3g} ± {error * scale:.2g}" for value, error, scale in parts)
        lines.append(f"| {fit.way} | {cells} | {fit.off:.0%} |")
    cores = len(os.sched_getaffinity(0))
    return "\n".join([*lines, "", f"({cores} cores, {date.today()}; ± is the standard error of the fit.)"])


def put_into_document(name: str, text: str) -> None:
    """Replace what stands between the document's two marks of this name."""
    begin, end = f"<!-- {name}: from launch/scale.py -->", f"<!-- end of {name} -->"
    before, rest = DOCUMENT.read_text().split(begin)
    _, after = rest.split(end)
    DOCUMENT.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="small sizes only")
    arguments.add_argument("--json", action="store_true", help="print timings and constants as JSON")
    arguments.add_argument("--model", action="store_true", help="print the modelled table and measure nothing")
    arguments.add_argument("--docs", action="store_true", help="put what is printed into docs/scale.md too")
    arguments.add_argument("--out", type=Path, default=PICTURE, help="the picture, a .png (default: %(default)s)")
    chosen = arguments.parse_args()
    if chosen.out.suffix != ".png":
        arguments.error(f"argument --out: must end in .png, got {str(chosen.out)!r}")
    if chosen.docs:
        put_into_document("model", table())
    if chosen.model:
        print(table())
        return

    cases = sweeps(chosen.quick)
    timings = measure([case for sweep in cases for case in sweep])
    fits = [fitted(timings, way) for way in COLOURS]
    save_picture(timings, fits, cases, chosen.out)
    if chosen.docs:
        put_into_document("measured", report(timings, fits))
    if chosen.json:
        print(json.dumps({"timings": [asdict(timing) for timing in timings], "fits": [asdict(fit) for fit in fits]}))
    else:
        print(f"{report(timings, fits)}\n{chosen.out}")


if __name__ == "__main__":
    main()
