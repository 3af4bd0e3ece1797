"""AdamW with moments in 8 bits, in CPU memory, or both.

8 bits: block-wise dynamic quantization (Dettmers et al. 2022, arXiv 2110.02861). It is written in plain
PyTorch, so that a CPU runs the same code as a GPU, and so that the states can be sharded: a block never
crosses the first dimension of a parameter, along which FSDP2 splits it.
"""

from collections.abc import Callable, Iterable
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from d2g.core.distributed.engine import local_shard, shard_like
from d2g.core.transfer import to_device

BLOCK = 256
"""Largest number of values that share a scale."""

SMALLEST = 4096
"""Parameters with fewer values, and those of one dimension, keep moments in fp32, as in the paper's code."""

WORKING_COPIES = 9
"""Temporaries of an update, in fp32 copies of the largest parameter."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of the two moments in the state, as in torch's AdamW."""


def dynamic_codes(signed: bool) -> Tensor:
    """The 256 values in [-1, 1] or [0, 1] of an 8-bit code, in ascending order, fp32 [256].

    Decade i of 7, from 10^(i-7) to 10^(i-6), has 2^i values with a sign, else 2^(i+1), at the centers of
    equal intervals; 0 and 1 complete them (the paper, section 1.3).
    """
    values = [torch.zeros(1), torch.ones(1)]
    for decade in range(7):
        count = 2 ** (decade + (not signed))
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        centers = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)).float()
        values += [centers, -centers] if signed else [centers]
    return torch.cat(values).sort().values


def takes_8_bits(parameter: Tensor) -> bool:
    """Whether the moments of a parameter are quantized."""
    return parameter.dim() > 1 and parameter.numel() >= SMALLEST


def scales_shape(shape: torch.Size) -> tuple[int, int]:
    """Number of rows of a parameter, and of blocks in each row."""
    return shape[0], ceil(shape[1:].numel() / BLOCK)


def moment_bytes(parameter: Tensor, eight_bit: bool) -> int:
    """Bytes of both moments of a parameter."""
    if not (eight_bit and takes_8_bits(parameter)):
        return 8 * parameter.numel()
    rows, blocks = scales_shape(parameter.shape)
    return 2 * (parameter.numel() + 4 * rows * blocks)


def quantize(values: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Values [rows, ...] -> codes of the same shape, uint8, and scales [rows, blocks], fp32.

    edges: upper edges of the codes' intervals but the last, [255].
    """
    blocks = _blocks(values.flatten(1))
    scales = blocks.abs().amax(-1)
    # A block of zeros has scale 0: divide it by 1.
    divisor = torch.where(scales > 0, scales, 1.0)
    codes = torch.bucketize(blocks / divisor[..., None], edges, out_int32=True).to(torch.uint8)
    return _rows(codes, values.shape), scales


def dequantize(codes: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """The values of `quantize`'s codes and scales, fp32. table: the value of each code, [256]."""
    values = table[_blocks(codes.flatten(1)).int()] * scales[..., None]
    return _rows(values, codes.shape)


def _blocks(rows: Tensor) -> Tensor:
    """[rows, n] -> [rows, blocks, values of a block]; zeros fill the last block."""
    count = ceil(rows.shape[1] / BLOCK)
    size = ceil(rows.shape[1] / count)
    padded: Tensor = F.pad(rows, (0, count * size - rows.shape[1]))
    return padded.view(len(rows), count, size)


def _rows(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Blocks as values of the shape that they were made of."""
    return blocks.flatten(1)[:, : shape[1:].numel()].reshape(shape)


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, one parameter at a time.

    eight_bit: moments take 1 byte per value and 4 bytes per block. offload: moments stay in CPU memory; they
    visit the device for their update, in copies that the host does not wait for. The arithmetic is fp32.

    If `found_inf` is 1 (fp32 [] on the device), a step leaves weights and states as they are, as with torch's
    fused optimizers.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]] | Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 1e-2,
        *,
        eight_bit: bool = True,
        offload: bool = False,
    ) -> None:
        # capturable: the counter of steps is on the device, as for torch's optimizers of that name.
        defaults = dict(lr=lr, betas=betas, eps=1e-8, weight_decay=weight_decay, capturable=True)
        super().__init__(params, {**defaults, "offload": offload})
        self.eight_bit, self.found_inf = eight_bit, torch.zeros(())
        self.tables: dict[torch.device, dict[str, tuple[Tensor, Tensor]]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. There is no closure."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state: dict[str, Tensor] = self.state[parameter] or self._new_state(parameter, group["offload"])
        assert parameter.grad is not None
        weights, gradient = local_shard(parameter), local_shard(parameter.grad).float()
        first, second = (self._read(state, name, weights.device) for name in MOMENTS)
        go_on = self.found_inf.to(weights.device) == 0

        # Moments, and the step that they give (Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019).
        beta1, beta2 = group["betas"]
        step = state["step"] + 1
        first = first.lerp_(gradient, 1 - beta1)
        second = second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        updated = weights * (1 - group["lr"] * group["weight_decay"])
        updated = updated - group["lr"] / (1 - beta1**step) * (first / root)

        # Write all of it, or nothing.
        weights.copy_(torch.where(go_on, updated, weights))
        state["step"].copy_(torch.where(go_on, step, state["step"]))
        for name, moment in zip(MOMENTS, (first, second), strict=True):
            self._write(state, name, moment, go_on)

    def _new_state(self, parameter: nn.Parameter, offload: bool) -> dict[str, Tensor]:
        """Zero moments, sharded like the parameter."""
        state: dict[str, Tensor] = self.state[parameter]
        state["step"] = torch.zeros((), device=local_shard(parameter).device)
        for name in MOMENTS:
            small = self.eight_bit and takes_8_bits(parameter)
            dtype = torch.uint8 if small else torch.float32
            state[name] = empty_moment(parameter, parameter.shape, dtype, offload)
            if small:
                shape = torch.Size(scales_shape(parameter.shape))
                state[f"{name}_scale"] = empty_moment(parameter, shape, torch.float32, offload)
        return state

    def _table(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """(values of the codes of a moment, edges between them) on a device."""
        if device not in self.tables:
            self.tables[device] = {}
            for moment in MOMENTS:
                values = dynamic_codes(signed=moment == "exp_avg")
                edges = (values[1:] + values[:-1]) / 2
                # A second moment above zero never becomes zero, by which the update is divided.
                if moment == "exp_avg_sq":
                    edges[0] = 0
                self.tables[device][moment] = (to_device(values, device), to_device(edges, device))
        return self.tables[device][name]

    def _read(self, state: dict[str, Tensor], name: str, device: torch.device) -> Tensor:
        """A moment in fp32 on the device; a tensor that may be changed."""
        moment = _visit(local_shard(state[name]), device)
        if f"{name}_scale" not in state:
            return moment.clone()
        scales = _visit(local_shard(state[f"{name}_scale"]), device)
        return dequantize(moment, scales, self._table(name, device)[0])

    def _write(self, state: dict[str, Tensor], name: str, moment: Tensor, go_on: Tensor) -> None:
        values = {name: moment}
        if f"{name}_scale" in state:
            codes, scales = quantize(moment, self._table(name, moment.device)[1])
            values = {name: codes, f"{name}_scale": scales}
        for key, value in values.items():
            old = local_shard(state[key])
            old.copy_(torch.where(go_on, value, _visit(old, value.device)), non_blocking=True)


def empty_moment(parameter: Tensor, shape: torch.Size, dtype: torch.dtype, offload: bool) -> Tensor:
    """Zeros for a moment (or its scales) of a parameter: sharded like it, or in the CPU's pinned memory."""
    if offload:
        zeros = torch.zeros(shape, dtype=dtype)
        return zeros if parameter.device.type == "cpu" else zeros.pin_memory()
    if shape == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    if isinstance(parameter, DTensor):
        return shard_like(torch.zeros(shape), parameter)
    return torch.zeros(shape, dtype=dtype, device=parameter.device)


def _visit(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; a copy if it is elsewhere."""
    return tensor if tensor.device == device else to_device(tensor, device)
