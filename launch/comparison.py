"""Did training on many ranks give what one process gives?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from step import Step

#: What a run trained: its steps and its final parameters.
Run = tuple[Sequence[Step], Mapping[str, Tensor]]

#: What rounding may do to the norms (relative) and to the parameters (absolute). The two runs add the same numbers in
#: another order. In fp32 that costs 1e-7 a step and grows as training goes on, to 1e-4 in 80 steps with the default
#: settings; a norm that misses a shard, or counts one twice, is off by 1e-1 from the first step on. In bf16 the
#: rounding errors are as large as that: the differences are shown and not judged.
TOLERANCE = {"fp32": 1e-3, "bf16": math.inf}


@dataclass(frozen=True)
class Comparison:
    """The largest differences between a run on many ranks ("here") and the same on one process ("alone")."""

    norm: float
    norm_at: tuple[Step, Step]
    parameter: float
    parameter_at: str
    tolerance: float

    @classmethod
    def between(cls, here: Run, alone: Run, *, precision: str) -> Self:
        """Compare the norm before clipping of every step, and every element of the final parameters.

        A run that was resumed has only the steps since then; alone, all steps are trained.
        """
        pairs = list(zip(here[0], alone[0][-len(here[0]) :], strict=True))
        norms = [_relative_difference(one.total_norm, other.total_norm) for one, other in pairs]
        elements = {name: _largest_difference(tensor, alone[1][name]) for name, tensor in here[1].items()}
        worst_step = norms.index(max(norms))
        worst_name = max(elements, key=elements.__getitem__)
        return cls(norms[worst_step], pairs[worst_step], elements[worst_name], worst_name, TOLERANCE[precision])

    @property
    def agrees(self) -> bool:
        """Whether rounding explains the differences."""
        return self.norm <= self.tolerance and self.parameter <= self.tolerance

    def __str__(self) -> str:
        here, alone = self.norm_at
        if math.isinf(self.tolerance):
            verdict = "not judged: rounding in this precision can explain differences of any size"
        elif self.agrees:
            verdict = f"the same training: rounding explains differences up to {self.tolerance:g}"
        else:
            verdict = f"NOT the same training: rounding explains differences up to {self.tolerance:g} only"
        norms = f"step {here.step}: {here.total_norm:.7g} here, {alone.total_norm:.7g} alone"
        return (
            f"largest difference between the gradient norms:    {self.norm:.1e} of the norm ({norms})\n"
            f"largest difference between the final parameters:  {self.parameter:.1e} (in {self.parameter_at})\n"
            f"{verdict}"
        )


def _relative_difference(here: float, alone: float) -> float:
    if here == alone or (math.isnan(here) and math.isnan(alone)):
        return 0.0
    difference = abs(here - alone) / alone if alone else math.inf
    return math.inf if math.isnan(difference) else difference


def _largest_difference(here: Tensor, alone: Tensor) -> float:
    equal = (here == alone) | (here.isnan() & alone.isnan())
    return (here - alone).abs().nan_to_num(nan=math.inf).masked_fill(equal, 0).max().item()
