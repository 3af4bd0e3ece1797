"""Bytes that autograd saves of a forward pass, counted on fake tensors: shapes without data."""

import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, kw_only=True)
class SavedBytes:
    """Bytes that a forward pass saves for backward: a fixed part, and a part per row."""

    fixed: float
    row: float

    @classmethod
    def from_batches(cls, one_row: float, two_rows: float) -> Self:
        """Separate the two parts, from the bytes of a batch of one row and of a batch of two rows."""
        return cls(fixed=2 * one_row - two_rows, row=two_rows - one_row)

    def of(self, rows: float) -> float:
        """Bytes for a batch of `rows`."""
        return self.fixed + rows * self.row


def saved_bytes(network: nn.Module, run: Callable[[], Any], bf16: bool) -> float:
    """Sum of `saved_parts`."""
    return sum(saved_parts(network, run, bf16))


def saved_parts(network: nn.Module, run: Callable[[], Any], bf16: bool) -> tuple[float, float]:
    """Measure the memory that autograd keeps for backward during `run`: (saved bytes, recomputed bytes).

    Saved bytes are those of all saved storages except the network's weights; each storage counts once. Layers
    under activation checkpointing save their inputs only. Recomputed bytes are what the largest of these
    layers saves, because backward recomputes one layer at a time. bf16: run under autocast.
    """
    # Weights are counted elsewhere; views of one storage count once.
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    storages, largest = _StorageCounter(weights), 0.0

    def count_layer(layer: nn.Module, args: Any, settings: Any) -> None:
        """Count the inputs of a checkpointed layer, which autograd does not see, and run it to size it."""
        nonlocal largest
        for value in (*args, *settings.values()):
            if isinstance(value, Tensor):
                storages(value)
        inside = _StorageCounter({*weights, *storages.sizes})
        with torch.autograd.graph.saved_tensors_hooks(inside, _identity):
            cast(Any, layer.forward).args[0](*args, **settings)
        largest = max(largest, inside.total)

    # engine.recompute replaces the forward of a checkpointed layer by a partial.
    checkpointed = [layer for layer in network.modules() if isinstance(layer.forward, partial)]
    hooks = [layer.register_forward_pre_hook(count_layer, with_kwargs=True) for layer in checkpointed]

    # Autograd reports each tensor that it saves to the hook.
    with (
        torch.autograd.graph.saved_tensors_hooks(storages, _identity),
        _cuda_autocast_rules(bf16),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        warnings.catch_warnings(),
    ):
        # This warns about speed, which does not matter here: FLUX's norms have fp32 weights under autocast.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        run()
    for hook in hooks:
        hook.remove()
    return storages.total, largest


class _StorageCounter:
    """A saved-tensor hook that adds up the sizes of storages, except those in `excluded`.

    It keeps the storages alive, because the key of a freed storage could be reused.
    """

    def __init__(self, excluded: Collection[int]) -> None:
        self.excluded, self.sizes, self.storages = excluded, dict[int, int](), list[Any]()

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.excluded and storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.storages.append(storage)
        return tensor

    @property
    def total(self) -> float:
        return float(sum(self.sizes.values()))


def peak_bytes(run: Callable[[], Any], existing: Iterable[Tensor] = ()) -> float:
    """Peak bytes of the storages that `run` creates. existing: tensors that it only views or updates."""
    live = LiveBytes()
    live.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in existing}
    with live:
        run()
    return float(live.peak)


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of the storages that operations inside the context create, while they live.

    device_type: the type of device that is counted.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type, self.live, self.peak = device_type, 0, 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device_type:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.live += self.sizes[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def _identity(tensor: Tensor) -> Tensor:
    return tensor


class _Fp32Norms(TorchFunctionMode):
    """Run group and layer norms in fp32, as autocast does on CUDA but not on CPUs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.group_norm, F.layer_norm):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def _cuda_autocast_rules(bf16: bool) -> Iterator[None]:
    if not bf16:
        yield
        return
    with _Fp32Norms():
        yield
