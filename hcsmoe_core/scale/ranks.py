"""Several processes that share one capture: started by ``torchrun``, each has some of the batches, and sums add up."""

import os

import torch
import torch.distributed as dist

from hcsmoe_core._util import InputError


def started(device):
    """Join the other ranks if ``torchrun`` started this process, over NCCL on GPUs and over gloo on CPUs.

    Parameters
    ----------
    device : str
        That every rank was given.

    Returns
    -------
    str
        Device of this rank: its own GPU where ``device`` says no number.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo")
    if not gpu:
        return device
    own = device if ":" in device else f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(own)
    return own


def left():
    """Leave the other ranks, as what follows is done by one process alone; the number that this one had."""
    number = rank()
    if dist.is_initialized():
        dist.destroy_process_group()
    return number


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Wait until every rank is here."""
    total(torch.zeros(1, dtype=torch.int64))


def first(value):
    """What rank 0 gives, a whole number."""
    return int(total(torch.tensor([int(value) if rank() == 0 else 0])))


def total(tensor, *, largest=False):
    """Sum of a tensor over all ranks, or its largest values.

    Parameters
    ----------
    tensor : tensor
        float64, int64 or uint8, of one shape on every rank.
    largest : bool

    Returns
    -------
    tensor
        On the device that the given one was on.
    """
    if size() == 1:
        return tensor
    there = "cuda" if dist.get_backend() == "nccl" else "cpu"
    added = tensor.to(there).contiguous().clone()
    dist.all_reduce(added, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return added.to(tensor.device)


def share(items):
    """This rank's run of a list, as even as can be.

    Raises
    ------
    ValueError
        If there are fewer items than ranks.
    """
    if len(items) < size():
        raise InputError(
            f"{len(items)} batches of calibration sequences cannot be shared by {size()} ranks; start fewer ranks, or make the "
            "batches smaller (--batch-size)."
        )
    bounds = [len(items) * r // size() for r in range(size() + 1)]
    return items[bounds[rank()] : bounds[rank() + 1]]
