"""What torch before 2.13 does not do on the CPU, so that the tests can be run with it."""

import functools
import importlib
import inspect
from typing import Any

import torch


def average_over_gloo() -> None:
    """Where FSDP2 asks gloo's reduce-scatter for an average, older ones give the sum (pytorch issue 162338).

    FSDP2 adds up and divides by itself where that is asked for.
    """
    if torch.__version__ >= "2.13":
        return
    collectives: Any = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_collectives")
    factors = collectives._get_gradient_divide_factors
    if hasattr(factors, "__wrapped__"):
        return
    signature = inspect.signature(factors)

    @functools.wraps(factors)
    def by_sums(*args: object, **kwargs: object) -> object:
        given = signature.bind(*args, **kwargs)
        given.arguments["force_sum_reduction_for_comms"] = True
        return factors(*given.args, **given.kwargs)

    collectives._get_gradient_divide_factors = by_sums
