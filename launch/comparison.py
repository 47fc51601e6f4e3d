"""Did training on many ranks give what one process gives?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from step import Step

Run = tuple[Sequence[Step], Mapping[str, Tensor]]

#: What fp32 may differ by, in the norms (relative) and the parameters. The two runs add the same numbers in another
#: order, which costs 1e-7 a step and grows as training goes on: to 1e-4 in 80 steps with the default settings.
#: A norm that misses a shard, or counts one twice, is off by 1e-1 and more from the first step on.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Comparison:
    """The largest differences between the run of all ranks (`here`) and the same run on one process (`alone`)."""

    norm: float
    norm_at: tuple[Step, Step]
    parameter: float
    parameter_at: str

    @classmethod
    def of(cls, here: Run, alone: Run) -> Self:
        """Compare the norms before clipping of every step, and every element of the final parameters."""
        pairs = list(zip(here[0], alone[0], strict=True))
        norms = [_relative_difference(one.total_norm, other.total_norm) for one, other in pairs]
        parameters = {name: _largest(tensor - alone[1][name]) for name, tensor in here[1].items()}
        worst_parameter = max(parameters, key=parameters.__getitem__)
        return cls(max(norms), pairs[norms.index(max(norms))], parameters[worst_parameter], worst_parameter)

    @property
    def agrees(self) -> bool:
        """Whether two runs in fp32 are the same training."""
        return max(self.norm, self.parameter) <= TOLERANCE

    def __str__(self) -> str:
        here, alone = self.norm_at
        return (
            "Largest differences to one process that trains on the whole batch\n"
            f"  gradient norm:     {self.norm:.1e} of the norm (step {here.step}: {here.total_norm:.7g} here, "
            f"{alone.total_norm:.7g} alone)\n"
            f"  final parameters:  {self.parameter:.1e} (in {self.parameter_at})"
        )


def _relative_difference(here: float, alone: float) -> float:
    if here == alone or (math.isnan(here) and math.isnan(alone)):
        return 0.0
    difference = abs(here - alone) / alone if alone else math.inf
    return difference if math.isfinite(difference) else math.inf


def _largest(differences: Tensor) -> float:
    return differences.abs().nan_to_num(nan=math.inf).max().item()
