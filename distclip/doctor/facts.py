"""What is installed, and what hardware there is."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch
import torch.distributed as dist

# Package, and the extra of distclip that brings it.
_PACKAGES = {
    "yaml": ("pyyaml", "config"),
    "typer": ("typer", "cli"),
    "rich": ("rich", "cli"),
    "matplotlib": ("matplotlib", "plot"),
    "accelerate": ("accelerate", "accelerate"),
    "deepspeed": ("deepspeed", "deepspeed"),
    "transformers": ("transformers", "transformers"),
    "lightning": ("lightning", "lightning"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow-skinny", "mlflow"),  # which the whole package is built on
    "triton": ("triton", ""),
}


def facts() -> dict[str, Any]:
    """Versions, backends, GPUs and optional packages, as plain values."""
    from distclip import __version__

    return {
        "distclip": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "backends": _backends(),
        "gpus": _gpus(),
        "packages": {name: _version(name, package) for name, (package, _) in _PACKAGES.items()},
    }


def missing(found: dict[str, Any]) -> dict[str, str]:
    """Of the packages that are not installed, the extras that bring them."""
    return {name: extra for name, (_, extra) in _PACKAGES.items() if extra and found["packages"][name] is None}


def _backends() -> list[str]:
    if not dist.is_available():
        return []
    known = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    return [name for name, there in known.items() if there]


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    every = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [f"{each.name}, {each.total_memory / 2**30:.0f} GiB" for each in every]


def installed(module: str) -> bool:
    """Whether there is a package of this name; imports nothing."""
    spec = importlib.util.find_spec(module)
    # Without an origin: a folder of that name, such as W&B leaves where it logs.
    return spec is not None and spec.origin is not None


def _version(module: str, package: str) -> str | None:
    """None where it is not installed. Imports nothing: some of these take long."""
    if not installed(module):
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
