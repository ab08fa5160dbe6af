"""Processes started by ``torchrun`` that share one capture: each runs some batches, and their sums add up."""

import os

import torch
import torch.distributed as dist

from hcsmoe_core._util import require


def started(device: str) -> str:
    """Join the other ranks if ``torchrun`` started this process, over NCCL on GPUs and over gloo on CPUs.

    Parameters
    ----------
    device : str
        The same for every rank; ``"auto"`` is a GPU where there is one.

    Returns
    -------
    str
        Device of this rank: its own GPU where ``device`` names no number.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    from accelerate import PartialState

    gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    own = PartialState(cpu=not gpu, backend="nccl" if gpu else "gloo").device
    return str(own) if gpu and ":" not in device else device


def left() -> int:
    """Leave the other ranks, as what follows is the work of one process alone; the rank that this one was."""
    number = rank()
    if dist.is_initialized():
        dist.destroy_process_group()
    return number


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every rank is here."""
    total(torch.zeros(1, dtype=torch.int64))


def first(value: int) -> int:
    """The whole number that rank 0 passes."""
    return int(total(torch.tensor([int(value) if rank() == 0 else 0])))


def total(tensor: torch.Tensor, *, largest: bool = False) -> torch.Tensor:
    """Sum of a tensor over all ranks, or its largest values.

    Parameters
    ----------
    tensor : tensor
        float64, int64 or uint8, of one shape on every rank.
    largest : bool
        Take the largest values instead of the sums.

    Returns
    -------
    tensor
        On the device of ``tensor``.
    """
    if size() == 1:
        return tensor
    reduced = tensor.to("cuda" if dist.get_backend() == "nccl" else "cpu").contiguous().clone()
    dist.all_reduce(reduced, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return reduced.to(tensor.device)


def share(items: list) -> list:
    """This rank's run of a list, as even as possible.

    Raises
    ------
    InputError
        If there are fewer items than ranks.
    """
    require(
        len(items) >= size(),
        f"{len(items)} batches of calibration sequences cannot be shared by {size()} ranks; start fewer "
        "ranks, or make the batches smaller (--batch-size).",
    )
    bounds = [len(items) * r // size() for r in range(size() + 1)]
    return items[bounds[rank()] : bounds[rank() + 1]]
