"""The start of a teacher's training: fresh components, a pretrained autoencoder, or another teacher."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from d2g.core.errors import SettingError, UserError
from d2g.diffusion import pretrained
from d2g.diffusion.autoencoders import open_autoencoder
from d2g.diffusion.latents import PixelSpace, latent_space
from latent_lpips.distance import LatentLPIPS
from latent_lpips.weights import save_lpips
from teacher_training.autoencoder import build_autoencoder
from teacher_training.config import TeacherConfig
from teacher_training.data import LABEL_COLUMN, TrainingPictures, class_names
from teacher_training.networks.registry import network_of
from teacher_training.networks.unet_text import check_init


def check_start(config: TeacherConfig) -> None:
    """Raise SettingError for a start that the network cannot have, and UserError for a teacher in `init` that
    cannot be trained further, and for pictures without the classes that the network needs."""
    kind = network_of(config)
    if config.init and not kind.takes_init:
        raise SettingError(
            f"network is {kind.name!r}, but --init trains a Stable Diffusion further; leave one of them out"
        )
    if config.init:
        check_init(config.init)
    if config.pretrained_vae and config.denoiser.in_pixels:
        raise SettingError(
            f"network is {kind.name!r}, which works in pixels and has no autoencoder; leave --vae out"
        )
    if kind.needs_classes and class_names(config.data, config.column) is None:
        raise UserError(
            f"{config.data}: {kind.title} needs classes, found none; expected two or more subfolders named "
            f"by class, or parquet files with a column {config.column or LABEL_COLUMN}; or train --set "
            "network=edm, which needs none"
        )


def starting_autoencoder(config: TeacherConfig) -> Any | None:
    """The autoencoder that is used as it is: the given one, that of `init`, or none for networks in pixels;
    None to train one.

    Raises UserError for one that does not exist, and for pictures whose size it does not divide.
    """
    if config.denoiser.in_pixels:
        return PixelSpace(3)
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


def save_untrained_teacher(config: TeacherConfig, folder: Path) -> None:
    """Save the teacher that a training starts from, with an untrained LatentLPIPS, to try later parts."""
    vae = starting_autoencoder(config)
    vae = build_autoencoder(config.vae, config.size) if vae is None else vae
    space = latent_space(vae)
    images = torch.zeros(1, 3, config.size, config.size, dtype=torch.uint8)
    pictures = TrainingPictures(images=images, prompts=["a photo of a picture"])
    shape = (space.channels, config.size // space.downscale)
    network_of(config).build(config, pictures, shape, folder, True).save(folder, vae)
    network = replace(config.lpips.network, channels=space.channels)
    save_lpips(LatentLPIPS(network), folder / "latent_lpips", {"trained_on": "nothing"})
