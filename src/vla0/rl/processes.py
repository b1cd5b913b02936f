"""Several processes of torchrun, each with a GPU and worlds of its own; one where there is none."""

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed


def joined() -> tuple[int, int]:
    """Meet the other processes, and return (number of this one, how many there are)."""
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if count > 1 and not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # Objects go by gloo. One process may play for long while the others wait for it.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(days=1))
    return rank, count


def together() -> bool:
    """Return whether there are several processes."""
    return distributed.is_available() and distributed.is_initialized()


def gathered(value: Any) -> list[Any]:
    """Return the values of all processes, in their order."""
    if not together():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def of_the_first(value: Any) -> Any:
    """Return the value of the first process."""
    return gathered(value)[0]


def summed(values: Iterable[float]) -> list[float]:
    """Return the sums of numbers over all processes."""
    return [sum(column) for column in zip(*gathered(list(values)), strict=True)]


def sum_gradients(weights: Iterable[torch.Tensor]) -> None:
    """Replace each gradient by its sum over all processes; none counts as 0."""
    if not together():
        return
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        distributed.all_reduce(weight.grad)


def left() -> None:
    """Part from the other processes."""
    if together():
        distributed.destroy_process_group()
