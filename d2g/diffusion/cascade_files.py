"""New networks of Wuerstchen v2, and the folders of its two stages in diffusers' layout."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from d2g.core.atomic_files import write_atomically
from d2g.core.errors import UserError
from d2g.core.json_files import COPY_AGAIN, read_json_object
from d2g.diffusion import pretrained
from d2g.diffusion.families.base import EMPTY_PROMPT
from d2g.diffusion.families.wuerstchen import LATENT_MEAN, LATENT_STD, WuerstchenConditioner
from d2g.diffusion.pipelines import family_of


def new_vqgan(**settings: Any) -> Any:
    """A PaellaVQModel with fresh weights: stage A, with 4 pixels per latent.

    Its codes are drawn as its latents are distributed, with zero mean and unit variance.
    """
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    vqgan = PaellaVQModel(**settings)
    nn.init.normal_(vqgan.vquantizer.embedding.weight)
    return vqgan


def new_decoder(**settings: Any) -> Any:
    """A WuerstchenDiffNeXt with fresh weights and without dropout: stage B."""
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenDiffNeXt

    network = WuerstchenDiffNeXt(**settings, dropout=0.0)
    # The constructor scales these weights once for each module, down to nothing; its intent is once.
    for name, parameter in network.named_parameters():
        if name.endswith("channelwise.4.weight"):
            nn.init.xavier_uniform_(parameter, gain=sum(network.config.blocks) ** -0.5)
    return network


def new_prior(**settings: Any) -> Any:
    """A WuerstchenPrior with fresh weights and without dropout: stage C. It starts with its input as the
    prediction, as in the paper's section 3.2."""
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior

    network = WuerstchenPrior(**settings, dropout=0.0)
    for parameter in network.out[1].parameters():
        nn.init.zeros_(parameter)
    return network


def frozen_text(teacher: str) -> WuerstchenConditioner:
    """The tokenizer and text encoder of a teacher with one CLIP, as the conditioner of both stages, frozen.

    Raises UserError for a teacher with other text encoders.
    """
    family = family_of(teacher)
    encoders = [name for name in family.components if name.startswith("text_encoder")]
    if encoders != ["text_encoder"] or "CLIPTextModel" not in family.components["text_encoder"]:
        raise UserError(
            f"teacher {teacher} is {family.title}, but a cascade takes one CLIP text encoder; name a teacher "
            "of Stable Diffusion 1.x or 2.x, or miniature"
        )
    models = {"text_encoder": pretrained.load_model(teacher, "text_encoder")}
    tokenizers = {"tokenizer": pretrained.load_tokenizer(teacher)}
    return WuerstchenConditioner(models, tokenizers, {"no_prompt": EMPTY_PROMPT})


def save_stage_b(
    folder: Path, network: Any, vqgan: Any, conditioner: WuerstchenConditioner, side: int, scale: float
) -> None:
    """Save a WuerstchenDecoderPipeline for latents of this side; `scale`: its side over stage C's."""
    parts = {"decoder": network, "vqgan": vqgan}
    _save_stage(folder, "WuerstchenDecoderPipeline", parts, conditioner, side, {"latent_dim_scale": scale})


def save_stage_c(folder: Path, network: Any, conditioner: WuerstchenConditioner, side: int) -> None:
    """Save a WuerstchenPriorPipeline for latents of this side."""
    normalization = {"latent_mean": LATENT_MEAN, "latent_std": LATENT_STD}
    _save_stage(folder, "WuerstchenPriorPipeline", {"prior": network}, conditioner, side, normalization)


def load_vqgan(folder: Path) -> Any:
    """A PaellaVQModel from a folder of its own, in eval mode, frozen."""
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    return PaellaVQModel.from_pretrained(folder, use_safetensors=True).eval().requires_grad_(False)


def _save_stage(
    folder: Path,
    kind: str,
    networks: dict[str, Any],
    conditioner: WuerstchenConditioner,
    side: int,
    settings: dict[str, Any],
) -> None:
    from diffusers import DDPMWuerstchenScheduler

    # The constructors of diffusers' pipelines warn that they are deprecated, so the parts are saved alone.
    text: Any = conditioner.models["text_encoder"]
    tokenizer: Any = conditioner.tokenizers["tokenizer"]
    for name, network in networks.items():
        pretrained.save_component(network, folder / name)
    pretrained.save_component(text, folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    DDPMWuerstchenScheduler().save_pretrained(folder / "scheduler")
    # The classes have no size in their configs: it is written beside their settings.
    denoiser = next(iter(networks))
    file = folder / denoiser / "config.json"
    config = read_json_object(file, COPY_AGAIN) | {"sample_size": side}
    write_atomically(file, json.dumps(config, indent=2) + "\n")
    # The index is written last: it makes the folder a pipeline.
    index = {
        "_class_name": kind,
        **{name: ["wuerstchen", type(network).__name__] for name, network in networks.items()},
        "text_encoder": ["transformers", type(text).__name__],
        "tokenizer": ["transformers", type(tokenizer).__name__],
        "scheduler": ["diffusers", "DDPMWuerstchenScheduler"],
        **settings,
    }
    write_atomically(folder / "model_index.json", json.dumps(index, indent=2) + "\n")
