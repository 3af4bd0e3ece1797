"""What autograd keeps of a pass for its backward pass, counted on fake tensors: shapes without data."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes that a forward pass keeps for its backward pass: those of a pass, and those of each row."""

    fixed: float
    row: float

    def of(self, rows: float) -> float:
        """Bytes for so many rows."""
        return self.fixed + rows * self.row


def saved(network: nn.Module, run: Callable[[], Any], half: bool) -> float:
    """Bytes of the storages that autograd saves, each once, the network's own weights left out; of layers
    that are computed again what the largest needs when its turn comes.
    """
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    storages, largest = _Storages(own), 0.0

    def inputs(layer: nn.Module, args: Any, settings: Any) -> None:
        """What is computed again keeps its inputs, which autograd does not know of."""
        nonlocal largest
        for value in (*args, *settings.values()):
            if isinstance(value, Tensor):
                storages(value)
        inside = _Storages({*own, *storages.sizes})
        with torch.autograd.graph.saved_tensors_hooks(inside, _itself):
            cast(Any, layer.forward).args[0](*args, **settings)
        largest = max(largest, inside.total)

    again = [layer for layer in network.modules() if isinstance(layer.forward, partial)]
    hooks = [layer.register_forward_pre_hook(inputs, with_kwargs=True) for layer in again]
    with (
        torch.autograd.graph.saved_tensors_hooks(storages, _itself),
        _as_on_cuda(half),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        run()
    for hook in hooks:
        hook.remove()
    return storages.total + largest


class _Storages:
    """Called with tensors, adds up their storages, each once, but those that are `known`. Keeps them: else
    another could get the same number."""

    def __init__(self, known: Collection[int]) -> None:
        self.known, self.sizes, self.kept = known, dict[int, int](), list[Any]()

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known and storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.kept.append(storage)
        return tensor

    @property
    def total(self) -> float:
        return float(sum(self.sizes.values()))


def _itself(tensor: Tensor) -> Tensor:
    return tensor


class _WideNorms(TorchFunctionMode):
    """CUDA's autocast runs norms in fp32, the CPU's does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.group_norm, F.layer_norm):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def _as_on_cuda(half: bool) -> Iterator[None]:
    if not half:
        yield
        return
    with _WideNorms():
        yield
