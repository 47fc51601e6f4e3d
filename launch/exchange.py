"""Named tensors from every rank to every rank, as JSON and bytes: nothing that a peer sends is unpickled."""

import json

import torch
import torch.distributed as dist
from torch import Tensor


def exchanged(tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> list[dict[str, Tensor]]:
    """Every rank's tensors, in the order of the ranks, on the CPU. All ranks of ``group`` (the job) must call.

    Args:
        tensors: of this rank, by name; any shapes and dtypes.
        group: the ranks that exchange.
    """
    return [_broadcast(tensors, group, source) for source in range(dist.get_world_size(group))]


def _broadcast(tensors: dict[str, Tensor], group: dist.ProcessGroup | None, source: int) -> dict[str, Tensor]:
    head, content = b"", torch.empty(0, dtype=torch.uint8)
    if dist.get_rank(group) == source:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        rows = [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in plain.items()]
        head = json.dumps(rows).encode()
        content = torch.cat([content, *(tensor.reshape(-1).view(torch.uint8) for tensor in plain.values())])
    sizes = _sent(torch.tensor([len(head), content.numel()]), 2, group, source).tolist()
    heading = _sent(torch.frombuffer(bytearray(head), dtype=torch.uint8) if head else content, sizes[0], group, source)
    return _read(bytes(heading.tolist()), _sent(content, sizes[1], group, source))


def _sent(values: Tensor, size: int, group: dist.ProcessGroup | None, source: int) -> Tensor:
    """What ``source`` has in ``values``, ``size`` elements of its dtype, which all ranks know."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    there = dist.get_rank(group) == source
    buffer = values.to(device) if there else torch.empty(size, dtype=values.dtype, device=device)
    dist.broadcast(buffer, group=group, group_src=source)
    return buffer.cpu()


def _read(head: bytes, content: Tensor) -> dict[str, Tensor]:
    found = {}
    for name, dtype, shape in json.loads(head):
        empty = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
        mine, content = content.split([empty.nbytes, content.numel() - empty.nbytes])
        # A copy, because bytes in the middle of others may not lie where this dtype must begin.
        found[name] = mine.clone().view(empty.dtype).view(shape)
    return found
