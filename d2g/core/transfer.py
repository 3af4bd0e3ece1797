"""Copies between the CPU and a device that do not wait for the device."""

from typing import TypeVar

import torch
from torch import Tensor, nn

X = TypeVar("X", Tensor, Tensor | None)


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first parameter."""
    return next(module.parameters()).device


def to_device(x: X, device: torch.device | str) -> X:
    """Copy `x` from the CPU to the device without waiting, through pinned memory where there is a GPU.

    The type stays: a conversion on the way would happen on the CPU, in memory that is not pinned.
    """
    if x is None:
        return x
    is_cuda = torch.device(device).type == "cuda" and x.device.type == "cpu"
    return (x.pin_memory() if is_cuda else x).to(device, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """Copy `x` to CPU memory without waiting. Only `to_device` may read the copy: the values are not there
    before the device has reached it."""
    if x.device.type != "cuda":
        return x.clone()
    return torch.empty(x.shape, dtype=x.dtype).pin_memory().copy_(x, non_blocking=True)


class HostCopy:
    """A copy of a tensor on the CPU, which starts now and is read later.

    `read` waits until the device has reached the copy. Once a later training step is queued, that keeps no
    device idle.
    """

    def __init__(self, x: Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        self.value = to_host(x)
        if x.device.type == "cuda":
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> Tensor:
        """The copied values."""
        if self.event is not None:
            self.event.synchronize()
        return self.value
