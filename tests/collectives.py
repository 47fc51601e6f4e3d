"""Counting what goes over the wire."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_HELPERS = ("wait_tensor", "_wrap_tensor_autograd")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Both ways lead here: torch.distributed's own calls, and the functional ones that DTensor makes.
        if func.namespace in ("c10d", "_c10d_functional") and not set(_HELPERS) & set(
            func._schema.name.split("::")[1:]
        ):
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded_collectives() -> Iterator[list[str]]:
    """The names of all collectives that this rank starts in the block."""
    with _Recorder() as recorder:
        yield recorder.names
