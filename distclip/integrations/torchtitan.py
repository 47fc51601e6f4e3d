"""torchtitan's ``clip_grad_norm_``, with its signature (that of 0.3.0), so that one line replaces it:

    import torchtitan.distributed.utils
    import distclip.integrations.torchtitan

    torchtitan.distributed.utils.clip_grad_norm_ = distclip.integrations.torchtitan.clip_grad_norm_

Nothing of torchtitan is imported. A rule with a memory wants a ``GradClipper``, which ``launch/titan.py`` shows.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distclip import functional


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    pp_mesh: DeviceMesh | None = None,
    ep_enabled: bool = False,
) -> Tensor:
    """Scale the gradients of all model parts so that their norm over every rank and pipeline stage is at most a number.

    One all-reduce, whatever the meshes; each tensor of the model counts once. Two things no rank can see by itself, and
    the model's code says them once, where it parallelises: ``distclip.declare(embedding.weight, replicated=group)`` of
    a weight that is tied over pipeline stages, ``distclip.declare(experts, sharded=group)`` of experts that are plain
    tensors (torchtitan's function counts the first for each stage, and refuses or miscounts the second).

    Args:
        parameters: a tensor, or those of this rank's model parts.
        max_norm: the largest norm, 0 or more; inf measures only.
        norm_type: p of the norm, above 0, or inf.
        error_if_nonfinite: raise RuntimeError on every rank where the norm is not finite, and change nothing.
        foreach: as torch's; distclip chooses by itself where it is None or True.
        pp_mesh: the 1-D mesh of the pipeline's stages; None without a pipeline.
        ep_enabled: nothing needs it: the gradients' own meshes tell which of them lie along an expert axis. DTensors
            of several meshes, and plain tensors beside them, are right with it and without.

    Returns:
        The norm before clipping: a plain 0-d tensor, the same bits on every rank.

    Raises:
        ValueError, RuntimeError, TypeError: as ``distclip.clip_grad_norm_``.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([weight], max_norm=1.0, foreach=True).item()
        5.0
    """
    return functional.clip_grad_norm_(
        parameters, max_norm, norm_type, error_if_nonfinite, foreach, pipeline_group=pp_mesh
    )
