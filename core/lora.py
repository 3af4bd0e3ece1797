"""Low-rank adapters (Hu et al. 2022) on a U-Net's attention: the door to peft."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Layers that get an adapter, by the end of their name: diffusers' own choice for Stable Diffusion."""


def add_lora(unet: Any, rank: int, alpha: float, generator: torch.Generator) -> None:
    """Put adapters of `rank` into the U-Net's attention layers, scaled by alpha / rank. `generator` draws
    their first factor; the second is zero, so that the network starts as it was.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGETS), init_lora_weights=True)  # type: ignore[arg-type]
    with torch.random.fork_rng():  # peft draws from the global state
        inject_adapter_in_model(config, unet)
    for name, parameter in unet.named_parameters():
        if ".lora_A." in name:  # uniform in +-1 / sqrt(inputs), as there
            drawn = torch.rand(parameter.shape, generator=generator, device=generator.device)
            parameter.data.copy_((2 * drawn - 1) / parameter.shape[1] ** 0.5)


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


def adapters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters alone, under the names that diffusers' `load_lora_weights` reads: *.lora_A.weight."""
    return {k.replace(".default.", "."): v for k, v in tensors.items() if ".lora_" in k}
