"""Low-rank adapters (Hu et al. 2022): the entry point to peft."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def add_lora(
    network: Any, targets: Sequence[str], rank: int, alpha: float, generator: torch.Generator
) -> None:
    """Add adapters of `rank`, scaled by alpha / rank, to the layers whose names end with one of `targets`.

    `generator` draws the first factors; the second ones are zero, so the network's output stays the same.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=True)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        inject_adapter_in_model(config, network)
    for name, parameter in network.named_parameters():
        if ".lora_A." in name:  # uniform in +-1 / sqrt(inputs), as in peft
            uniform = torch.rand(parameter.shape, generator=generator, device=generator.device)
            parameter.data.copy_((2 * uniform - 1) / parameter.shape[1] ** 0.5)


def has_lora(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict holds adapters."""
    return any(".lora_A." in name for name in tensors)


def merged(tensors: Mapping[str, Tensor], rank: int, alpha: float) -> dict[str, Tensor]:
    """A state dict with its adapters merged, W + alpha / rank B A in fp32, under plain names.

    Merged weights are fp32, also where W is stored in bf16: rounding the sum would lose part of the adapters.
    """
    plain: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if ".lora_" in name:
            continue
        layer, is_base, parameter = name.rpartition(".base_layer.")
        # W + alpha / rank B A in fp32; a convolution's weight keeps its shape.
        if is_base and parameter == "weight":
            a, b = (tensors[f"{layer}.lora_{factor}.default.weight"].float() for factor in "AB")
            value = value.float() + alpha / rank * (b @ a).view(value.shape)
        plain[f"{layer}.{parameter}" if is_base else name] = value
    return plain


def unexplained_weights(tensors: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> list[str]:
    """Plain names of the weights of a state dict that differ from the teacher's, and that no adapters can
    represent: those of layers without adapters, and all that are stored in half precision.

    An fp32 weight below adapters may hold the merged adapters of an earlier run. In half precision the sum
    would have been rounded, and the rounding has full rank. `teacher` has the plain names of `tensors`.
    """
    unexplained = []
    for name, value in tensors.items():
        layer, is_base, parameter = name.rpartition(".base_layer.")
        plain = f"{layer}.{parameter}" if is_base else name
        if ".lora_" in name or torch.equal(value.float(), teacher[plain].float()):
            continue
        if not is_base or parameter != "weight" or value.dtype != torch.float32:
            unexplained.append(plain)
    return unexplained


def adapters_from_teacher(
    tensors: Mapping[str, Tensor], teacher: Mapping[str, Tensor], rank: int, alpha: float
) -> dict[str, Tensor]:
    """Adapters of scale 1 for the teacher's weights, which give the same network as
    `merged(tensors, rank, alpha)`, under the names that diffusers' `load_lora_weights` reads.

    A run that started from another run's adapters may have them merged into its base weights. The difference
    between base weights and teacher is factorized, and concatenated with the run's own adapters. It is
    computed from the weights, because the folder of the earlier run may be gone. `unexplained_weights` must
    be empty.
    """
    # Factorize what earlier runs changed in the base weights.
    earlier: dict[str, tuple[Tensor, Tensor]] = {}
    for name, value in tensors.items():
        layer, is_base, parameter = name.rpartition(".base_layer.")
        if not is_base or parameter != "weight":
            continue
        before = teacher[f"{layer}.weight"]
        if not torch.equal(value.float(), before.float()):
            rows, columns = value.flatten(1).shape
            rounding = torch.finfo(torch.float32).eps * float(value.abs().max()) * (rows**0.5 + columns**0.5)
            earlier[layer] = low_rank_factors((value.double() - before.double()).flatten(1), rounding)
    # Concatenate with the run's own adapters; zeros give all layers the same rank, as diffusers expects.
    earlier_rank = max((len(a) for _, a in earlier.values()), default=0)
    adapters = {}
    for name in tensors:
        layer, is_adapter, _ = name.rpartition(".lora_A.default.weight")
        if not is_adapter:
            continue
        a, b = (tensors[f"{layer}.lora_{factor}.default.weight"].float() for factor in "AB")
        b0, a0 = earlier.get(layer, (b[:, :0], a[:0]))
        padding = earlier_rank - len(a0)
        adapters[f"{layer}.lora_A.weight"] = torch.cat([a, a0, a.new_zeros(padding, a.shape[1])])
        adapters[f"{layer}.lora_B.weight"] = torch.cat(
            [b * (alpha / rank), b0, b.new_zeros(len(b), padding)], 1
        )
    return adapters


def low_rank_factors(matrix: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """(B [m, r], A [r, n]), fp32, with B A = matrix [m, n], fp64, except for singular values up to `noise`.

    r is the smallest possible rank. Only a sketch is decomposed, by the randomized range finder (Halko et al.
    2011, algorithm 4.1): a matrix of a thousand rows and rank 64 takes milliseconds.
    """
    rng, full_rank, width = torch.Generator().manual_seed(0), min(matrix.shape), 32
    while True:
        # Double the sketch until its smallest singular values are noise.
        width = min(2 * width, full_rank)
        probes = torch.randn(matrix.shape[1], width, generator=rng, dtype=matrix.dtype)
        basis = torch.linalg.qr(matrix @ probes).Q
        u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        rank = int((s > noise).sum())
        if rank <= width - 8 or width == full_rank:
            break
    root = s[:rank].sqrt()
    return (basis @ u[:, :rank] * root).float(), (root[:, None] * v[:rank]).float()
