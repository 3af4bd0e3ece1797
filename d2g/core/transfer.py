"""Copies from the CPU to a device that do not wait for the device."""

from typing import TypeVar

import torch
from torch import Tensor

X = TypeVar("X", Tensor, Tensor | None)


def to_device(x: X, device: torch.device | str) -> X:
    """Copy `x` from the CPU to the device without waiting, through pinned memory where there is a GPU.

    The type stays: a conversion on the way would happen on the CPU, in memory that is not pinned.
    """
    if x is None:
        return x
    is_cuda = torch.device(device).type == "cuda" and x.device.type == "cpu"
    return (x.pin_memory() if is_cuda else x).to(device, non_blocking=True)
