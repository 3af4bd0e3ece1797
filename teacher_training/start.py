"""What a teacher's training starts from: fresh components, a given autoencoder, or another teacher."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d2g.core.errors import UserError
from d2g.diffusion import pretrained
from d2g.diffusion.autoencoders import open_autoencoder
from d2g.diffusion.families.sd import SDConditioner
from d2g.diffusion.latents import latent_space
from d2g.diffusion.pipelines import open_pipeline
from d2g.diffusion.schedule import Schedule
from latent_lpips.distance import LatentLPIPS
from latent_lpips.weights import save_lpips
from teacher_training.autoencoder import build_autoencoder
from teacher_training.config import TeacherConfig
from teacher_training.unet import build_denoiser


def starting_autoencoder(config: TeacherConfig) -> Any | None:
    """The autoencoder that is used as it is: the given one, else that of `init`; None to train one.

    Raises UserError for one that does not exist, and for pictures whose size it does not divide.
    """
    source = config.pretrained_vae or config.init
    if not source:
        return None
    vae = open_autoencoder(source) if config.pretrained_vae else pretrained.load_vae(source)
    downscale = latent_space(vae).downscale
    if config.size % downscale:
        raise UserError(
            f"size is {config.size}, but autoencoder {source} takes multiples of {downscale} pixels; "
            f"give --set size={max(1, round(config.size / downscale)) * downscale}"
        )
    return vae


def check_init(name: str) -> None:
    """Raise UserError unless this teacher can be trained further: Stable Diffusion that predicts epsilon."""
    pipeline = open_pipeline(name)
    if pipeline.family.name != "sd":
        raise UserError(f"--init {name} is a {pipeline.kind}; expected a StableDiffusionPipeline")
    schedule = pretrained.load_any_schedule(name)
    if not isinstance(schedule, Schedule) or schedule.prediction != "epsilon":
        kind = schedule.prediction
        raise UserError(f"--init {name} predicts {kind}; expected a teacher that predicts epsilon")


def starting_tokenizer(config: TeacherConfig, captions: Sequence[str], folder: Path) -> Any:
    """The tokenizer of `init`, else one that is trained on the captions; saved to `folder`."""
    if not config.init:
        return pretrained.new_tokenizer(captions, folder, config.unet.vocab_size, config.unet.max_length)
    tokenizer = pretrained.load_tokenizer(config.init)
    tokenizer.save_pretrained(folder)
    return tokenizer


def starting_denoiser(
    config: TeacherConfig, tokenizer: Any, latent_channels: int, latent_size: int
) -> tuple[SDConditioner, nn.Module]:
    """The text encoder and U-Net of `init`, else fresh ones of the settings' shape.

    Raises UserError for an `init` whose U-Net takes other latents.
    """
    if not config.init:
        torch.manual_seed(config.seed)
        return build_denoiser(config.unet, tokenizer, latent_channels, latent_size)
    unet = pretrained.load_unet(config.init)
    if unet.config.in_channels != latent_channels:
        raise UserError(
            f"--init {config.init} takes latents of {unet.config.in_channels} channels, the autoencoder "
            f"{config.pretrained_vae} makes {latent_channels}; leave --vae out, or give another"
        )
    unet.register_to_config(sample_size=latent_size)
    text: Any = pretrained.load_conditioner(config.init)
    return SDConditioner(dict(text.models.items()), {"tokenizer": tokenizer}), unet


def save_untrained_teacher(config: TeacherConfig, folder: Path) -> None:
    """Save the teacher that a training starts from, with an untrained LatentLPIPS, to try later parts."""
    vae = starting_autoencoder(config)
    vae = build_autoencoder(config.vae, config.size) if vae is None else vae
    space = latent_space(vae)
    tokenizer = starting_tokenizer(config, ["a photo of a picture"], folder / "tokenizer")
    text, unet = starting_denoiser(config, tokenizer, space.channels, config.size // space.downscale)
    pretrained.save_pipeline(folder, unet=unet, vae=vae, conditioner=text, set_alpha_to_one=True)
    network = replace(config.lpips.network, channels=space.channels)
    save_lpips(LatentLPIPS(network), folder / "latent_lpips", {"trained_on": "nothing"})
