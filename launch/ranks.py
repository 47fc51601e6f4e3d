"""The ranks that torchrun started: joining them, leaving them, and this process's place among them."""

import gc
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Job:
    """This process's place among the ranks, and its device."""

    rank: int
    world: int
    device: torch.device


def start(parallel: str) -> Job:
    """Join the ranks that torchrun started (or be the only one): NCCL where each rank has a GPU, else gloo."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", world))
    # Two ranks cannot share a GPU under NCCL, so too few GPUs means that all ranks run on the CPU.
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= local_world
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # let fp32 mean fp32: an LSTM in TF32 is right to 1e-3 only
    if parallel != "single":
        backend = "nccl" if on_gpu else "gloo"
        # Without torchrun there is no rendezvous in the environment; a job of one rank needs none.
        store = None if "RANK" in os.environ else dist.HashStore()  # type: ignore[attr-defined]  # not in __all__
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, device_id=device if on_gpu else None)
    return Job(rank, world, device)


def stop() -> None:
    """Leave the ranks, all together; what follows runs on this process alone."""
    if dist.is_initialized():
        # A gloo thread (torch 2.13) lets go of a collective's tensors a moment after it is done, and aborts the process
        # if Python exits in that moment. Destroying the group waits for its threads, but only if no model holds the
        # group any more; wrapped models sit in reference cycles. Else the barrier, which has no tensors, gives it time.
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def global_mean(value: Tensor, job: Job) -> float:
    """The mean over the ranks of a 0-d tensor, the same on each."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value.item() / job.world
