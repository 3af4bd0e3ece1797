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
    with torch.random.fork_rng():  # peft draws from the global generator
        inject_adapter_in_model(config, network)
    for name, parameter in network.named_parameters():
        if ".lora_A." in name:  # uniform in +-1 / sqrt(inputs), as in peft
            uniform = torch.rand(parameter.shape, generator=generator, device=generator.device)
            parameter.data.copy_((2 * uniform - 1) / parameter.shape[1] ** 0.5)


def has_lora(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict holds adapters."""
    return any(".lora_A." in name for name in tensors)


def merged(tensors: Mapping[str, Tensor], rank: int, alpha: float) -> dict[str, Tensor]:
    """A state dict with its adapters added to the weights: W + alpha / rank B A, in fp32, plain names."""
    plain: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if ".lora_" in name:
            continue
        stem, found, last = name.rpartition(".base_layer.")
        if found and last == "weight":
            a, b = (tensors[f"{stem}.lora_{factor}.default.weight"].float() for factor in "AB")
            value = (value.float() + alpha / rank * (b @ a).view(value.shape)).to(value.dtype)
        plain[f"{stem}.{last}" if found else name] = value
    return plain


def whole_update(
    tensors: Mapping[str, Tensor], teacher: Mapping[str, Tensor], rank: int, alpha: float
) -> tuple[dict[str, Tensor], list[str]]:
    """(adapters, unexplained): adapters of scale 1 that make `merged(tensors, rank, alpha)` of the teacher's
    weights, under the names that diffusers' `load_lora_weights` reads; names of the weights, outside the
    layers with adapters, that are not the teacher's.

    A run that began from another's adapters stands on base weights with those merged in: what the base is
    apart from the teacher is factored again, and stands beside the run's own in one adapter. It is taken from
    the weights, for the earlier run may have moved or gone on. `teacher` has the plain names of `tensors`.
    """
    earlier: dict[str, tuple[Tensor, Tensor]] = {}
    unexplained = []
    for name, value in tensors.items():
        stem, adapted, last = name.rpartition(".base_layer.")
        plain = f"{stem}.{last}" if adapted else name
        if ".lora_" in name or torch.equal(value.float(), teacher[plain].float()):
            continue
        if adapted and last == "weight":
            rows, columns = value.flatten(1).shape
            noise = torch.finfo(torch.float32).eps * float(value.abs().max()) * (rows**0.5 + columns**0.5)
            earlier[stem] = factors((value.double() - teacher[plain].double()).flatten(1), noise)
        else:
            unexplained.append(plain)
    width = max((len(a) for _, a in earlier.values()), default=0)  # one rank for all, as readers expect
    found = {}
    for name in tensors:
        stem, own, _ = name.rpartition(".lora_A.default.weight")
        if not own:
            continue
        a, b = (tensors[f"{stem}.lora_{factor}.default.weight"].float() for factor in "AB")
        b0, a0 = earlier.get(stem, (b[:, :0], a[:0]))
        spare = width - len(a0)
        found[f"{stem}.lora_A.weight"] = torch.cat([a, a0, a.new_zeros(spare, a.shape[1])])
        found[f"{stem}.lora_B.weight"] = torch.cat([b * (alpha / rank), b0, b.new_zeros(len(b), spare)], 1)
    return found, unexplained


def factors(matrix: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """(B [m, r], A [r, n]) in fp32 of the least rank r with B A = matrix [m, n], fp64, but for singular
    values up to `noise`.

    Only a sketch is decomposed, by the randomised range finder (Halko et al. 2011, algorithm 4.1): a matrix
    of a thousand rows and rank 64 takes milliseconds.
    """
    rng, least, width = torch.Generator().manual_seed(0), min(matrix.shape), 32
    while True:
        width = min(2 * width, least)
        probes = torch.randn(matrix.shape[1], width, generator=rng, dtype=matrix.dtype)
        basis = torch.linalg.qr(matrix @ probes).Q
        u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        rank = int((s > noise).sum())
        if rank <= width - 8 or width == least:  # some to spare, or nothing to miss
            break
    root = s[:rank].sqrt()
    return (basis @ u[:, :rank] * root).float(), (root[:, None] * v[:rank]).float()
