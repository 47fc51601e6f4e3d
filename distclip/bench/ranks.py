"""Cases that need several ranks: started from one process, or run by the ranks that torchrun has started.

``python -m distclip.bench.ranks FILE CASES ROUNDS THREADS`` is what each rank that ``measure_on_ranks`` starts runs:
rank 0 writes what came out for each case, and a rank that fails writes why.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distclip.bench.cases import Case, Target
from distclip.bench.measure import Row, measure
from distclip.local_ranks import run_ranks

# Seconds that a rank waits for another one, and that each case may take, the start included.
_TIMEOUT, _PATIENCE = 180, 600


def measure_on_ranks(cases: Sequence[Case], rounds: int, threads: int | None) -> tuple[list[Row], str]:
    """Start the ranks that these cases need, all the same number, on this machine; wait for them.

    Returns:
        Rows of the cases that came to an end, and why the next one did not; "" where all did.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, wanted = Path(folder) / "rows.jsonl", Path(folder) / "cases.json"
        out.touch()
        wanted.write_text(json.dumps([asdict(case) for case in cases]))
        reason = run_ranks(
            cases[0].ranks,
            "distclip.bench.ranks",
            [str(out), str(wanted), str(rounds), str(threads or 1)],
            patience=_PATIENCE * len(cases),
        )
        rows, failure = _read(out)
    if len(rows) == len(cases):
        return rows, ""
    case = cases[len(rows)]
    return rows, f"{case.layout}, {case.kind}, on {case.ranks} ranks: {failure or reason}"


def _read(out: Path) -> tuple[list[Row], str]:
    found = [json.loads(line) for line in out.read_text().splitlines()]
    rows = [Row(**{**each["row"], "case": _case(each["row"]["case"])}) for each in found if "row" in each]
    return rows, next((each["failure"] for each in found if "failure" in each), "")


def _case(told: dict[str, Any]) -> Case:
    """Of what ``asdict`` makes of one."""
    return Case(**{**told, "target": told["target"] and Target(**told["target"])})


@contextmanager
def joined() -> Iterator[int]:
    """Within it, this process is one of the ranks that a launcher such as torchrun has started, if one has.

    gloo carries what lies in main memory. Where each rank of a node has a GPU of its own, NCCL carries what lies there.

    Yields:
        How many ranks there are.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield dist.get_world_size() if dist.is_initialized() else 1
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if has_gpu_each(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))):
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    else:
        backend = "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=_TIMEOUT))
    try:
        yield dist.get_world_size()
        # Groups that models hold outlive destroy_process_group(), and gloo's threads then outlive Python.
        gc.collect()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def has_gpu_each(ranks: int) -> bool:
    """Whether so many ranks on this machine have a GPU each."""
    return torch.cuda.is_available() and torch.cuda.device_count() >= ranks


def main(out: str, cases: str, rounds: str, threads: str) -> None:
    """What each rank runs."""
    torch.set_num_threads(int(threads))
    with joined():
        for case in map(_case, json.loads(Path(cases).read_text())):
            try:
                row = measure(case, int(rounds))
            except Exception as failure:  # whatever it is, the user wants to read it
                traceback.print_exc()
                _write(out, failure=f"{type(failure).__name__}: {failure}")
                # The others may wait for this rank: torchrun ends them.
                os._exit(1)
            if dist.get_rank() == 0:
                _write(out, row=asdict(row))


def _write(out: str, **what: object) -> None:
    with Path(out).open("a") as file:
        file.write(json.dumps(what) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
