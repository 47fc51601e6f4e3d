"""What a process holds and how long its steps take, some hundred steps at a time, and whether that grows."""

import gc
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from torch import Tensor

#: Bytes that a process may have grown by after its warm-up.
MOST_MEMORY = 2**20
#: Python's memory blocks that may be left of each step; a single number that is kept is one.
MOST_BLOCKS = 0.1


@dataclass(frozen=True)
class Window:
    """Some steps of one rank, and what was left after them once the garbage was collected."""

    step: int
    """The last of them."""
    seconds: float
    """Of one step: the median."""
    cpu_seconds: float
    """Of one step, of all threads of this process: the mean."""
    resident: int
    """Bytes of memory that the system counts as this process's."""
    blocks: int
    """Of memory that Python holds for objects."""
    tensors: int
    ours: int
    """Objects of classes of distclip."""


class Watch:
    """Times steps and writes a Window after every so many; keeps none of them, so that nothing grows by the watching.

    Args:
        path: a file of JSON lines.
        every: steps of one window.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self._seconds: list[float] = []
        self._cpu_seconds = 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one step."""
        started, cpu_started = time.perf_counter(), time.process_time()
        yield
        self._seconds.append(time.perf_counter() - started)
        self._cpu_seconds += time.process_time() - cpu_started

    def end_window(self, step: int) -> None:
        """Write what this window was, and begin the next."""
        seconds, cpu_seconds = median(self._seconds), self._cpu_seconds / len(self._seconds)
        self._seconds.clear()
        self._cpu_seconds = 0.0
        gc.collect()
        tensors, ours = objects()
        window = Window(step, seconds, cpu_seconds, resident_bytes(), sys.getallocatedblocks(), tensors, ours)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(window)) + "\n")


def read_windows(path: Path) -> list[Window]:
    """What a Watch has written."""
    return [Window(**json.loads(line)) for line in path.read_text().splitlines()]


def resident_bytes() -> int:
    """Memory of this process, as Linux counts it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def objects() -> tuple[int, int]:
    """How many tensors there are, and how many objects of distclip's classes."""
    # type() and not isinstance(), which would ask lazy objects for their class.
    kinds = Counter(map(type, gc.get_objects()))
    tensors = sum(count for kind, count in kinds.items() if issubclass(kind, Tensor))
    ours = sum(count for kind, count in kinds.items() if str(kind.__module__).startswith("distclip."))
    return tensors, ours


@dataclass(frozen=True)
class Drift:
    """How one rank's last window differs from the first after its warm-up."""

    steps: int
    """From one to the other."""
    memory: int
    """Bytes."""
    blocks: int
    tensors: int
    ours: int
    seconds: tuple[float, float]
    """Of a step in the first and in the last quarter of the windows, their medians."""
    cpu_seconds: tuple[float, float]
    """The same, of this process's threads."""

    @classmethod
    def over(cls, windows: Sequence[Window], warm_up: int) -> "Drift":
        """Of all windows from step ``warm_up`` on."""
        after = [window for window in windows if window.step >= warm_up]
        first, last, quarter = after[0], after[-1], max(1, len(after) // 4)
        early, late = after[:quarter], after[-quarter:]
        return cls(
            steps=last.step - first.step,
            memory=last.resident - first.resident,
            blocks=last.blocks - first.blocks,
            tensors=last.tensors - first.tensors,
            ours=last.ours - first.ours,
            seconds=(median(each.seconds for each in early), median(each.seconds for each in late)),
            cpu_seconds=(median(each.cpu_seconds for each in early), median(each.cpu_seconds for each in late)),
        )

    def growth(self) -> list[str]:
        """What grew, in words; nothing where nothing did. Times are not judged: others may use the machine."""
        found = []
        if self.memory >= MOST_MEMORY:
            found.append(f"memory by {self.memory / 1024:.0f} KiB in {self.steps} steps")
        if self.blocks > MOST_BLOCKS * self.steps:
            found.append(f"Python's memory blocks by {self.blocks} in {self.steps} steps")
        if self.tensors > 0:
            found.append(f"tensors by {self.tensors}")
        if self.ours > 0:
            found.append(f"objects of distclip by {self.ours}")
        return found

    def __str__(self) -> str:
        early, late = (1000 * each for each in self.seconds)
        cpu_early, cpu_late = (1000 * each for each in self.cpu_seconds)
        return (
            f"memory {self.memory / 1024:+.0f} KiB, blocks {self.blocks:+d}, tensors {self.tensors:+d}, "
            f"objects of distclip {self.ours:+d}; a step {early:.2f} ms at first, {late:.2f} ms at last "
            f"(of this process {cpu_early:.2f} and {cpu_late:.2f} ms)"
        )
