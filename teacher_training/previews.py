"""Pictures and losses that `d2g teacher train` reports while it trains, in OUT/previews."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2g.core.logs import logger
from d2g.core.png import image_grid, save_png
from d2g.core.tracking.run_directory import RunLog
from d2g.core.transfer import device_of
from d2g.diffusion import pretrained
from d2g.diffusion.latents import decode_uint8, encode, from_uint8
from d2g.diffusion.teacher import load_teacher
from teacher_training.autoencoder_losses import FeatureDistance, mean_feature_distance
from teacher_training.data import TrainingPictures
from teacher_training.loop import Previews
from teacher_training.networks.kind import TrainableNetwork
from teacher_training.verdict import (
    SAMPLES,
    denoising_loss,
    draw_samples,
    gaussian_loss,
    reconstruction_psnr,
    spread_rows,
)

SHEET_COLUMNS = 8


def two_row_sheet(first: Tensor, second: Tensor) -> Tensor:
    """A grid of N pairs of uint8 images [N, 3, H, W]: each image of `first` above its image of `second`."""
    rows: list[Tensor] = []
    for start in range(0, len(first), SHEET_COLUMNS):
        for images in (first, second):
            part = images[start : start + SHEET_COLUMNS]
            blank = torch.full((SHEET_COLUMNS - len(part), *part.shape[1:]), 255, dtype=torch.uint8)
            rows += [part, blank if len(first) > SHEET_COLUMNS else blank[:0]]
    return image_grid(torch.cat(rows), columns=min(SHEET_COLUMNS, len(first)))


@torch.no_grad()
def reconstructions(vae: Any, images: Tensor) -> Tensor:
    """uint8 images [N, 3, S, S] through the autoencoder and back."""
    return torch.cat(list(decode_uint8(vae, encode(vae, from_uint8(images)))))


def autoencoder_previews(
    folder: Path,
    images: Tensor,
    log: RunLog,
    minutes: float,
    perceptual: FeatureDistance | None = None,
) -> Previews:
    """Report the PSNR, and the perceptual distance if one is given, and draw pictures above their
    reconstructions, as FOLDER/reconstructions-*.png."""
    sheet_images, validation_images = (
        images[spread_rows(len(images), SAMPLES)],
        images[spread_rows(len(images))],
    )

    def draw(modules: Mapping[str, nn.Module], nimg: int) -> None:
        vae: Any = modules["vae"]
        # Reconstructions do not depend on the scaling of the latents.
        quality, _ = reconstruction_psnr(vae, validation_images)
        values, description = {"preview/psnr": quality}, f"a PSNR of {quality:.1f} dB"
        if perceptual is not None:
            distance = mean_feature_distance(
                perceptual, validation_images, reconstructions(vae, validation_images)
            )
            values["preview/perceptual"] = distance
            description += f" and a perceptual distance of {distance:.3f}"
        file = folder / f"reconstructions-{nimg:09d}.png"
        save_png(
            two_row_sheet(sheet_images, reconstructions(vae, sheet_images)), file, {"psnr": f"{quality:.2f}"}
        )
        log.write(nimg, values)
        logger.info("vae: %d images, reconstructions have %s: %s", nimg, description, file)

    return Previews(draw=draw, minutes=minutes)


def as_latents(inputs: Tensor) -> Tensor:
    """The inputs of a training, latents or uint8 images, as scaled latents or pixels in [-1, 1]."""
    return from_uint8(inputs) if inputs.dtype == torch.uint8 else inputs


def network_previews(
    folder: Path,
    pipeline: str,
    network: TrainableNetwork,
    inputs: Tensor,
    pictures: TrainingPictures,
    log: RunLog,
    minutes: float,
) -> Previews:
    """Report the loss of the averaged weights, and draw samples below real pictures, FOLDER/samples-*.png.

    pipeline: a folder with everything but trained weights. inputs: as `TrainableNetwork.loss` takes them.
    """
    device, images = device_of(next(iter(network.modules.values()))), pictures.images
    teacher, vae = load_teacher(pipeline, device), pretrained.load_vae(pipeline).to(device)
    sheet_rows, validation_rows = spread_rows(len(images), SAMPLES), spread_rows(len(images))
    texts, validation_texts = (
        [pictures.prompts[row] for row in rows.tolist()] for rows in (sheet_rows, validation_rows)
    )
    latents = as_latents(inputs[validation_rows])
    gaussian, _ = gaussian_loss(latents, teacher.schedule)

    @torch.no_grad()
    def draw(modules: Mapping[str, nn.Module], nimg: int) -> None:
        trained = network.teacher(teacher, modules)
        # The loss of the averaged weights, on the same rows and noise each time.
        loss = denoising_loss(trained, trained.conditioner.encode(validation_texts), latents)
        samples = torch.cat(list(decode_uint8(vae, draw_samples(trained, texts))))
        file = folder / f"samples-{nimg:09d}.png"
        save_png(two_row_sheet(images[sheet_rows], samples), file, {"loss": f"{loss:.4f}"})
        log.write(nimg, {"preview/loss": loss})
        name = log.folder.name
        logger.info(
            "%s: %d images, loss %.3f (without structure: %.3f): %s", name, nimg, loss, gaussian, file
        )

    return Previews(draw=draw, minutes=minutes)
