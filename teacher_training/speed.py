"""Speed and disk space of each stage of a teacher's training on this device, from a few steps."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2g.core.distributed import process_group
from d2g.core.seeds import fork_rng
from d2g.core.transfer import device_of, to_device
from d2g.diffusion.latents import encode, from_uint8, latent_space
from eval.networks.registry import clip_tokenizer, new_clip
from latent_lpips.vgg import VGG16
from teacher_training.autoencoder import autoencoder_loss, build_autoencoder
from teacher_training.autoencoder_losses import open_discriminator, open_perceptual
from teacher_training.clip import contrastive_loss, model_config
from teacher_training.config import AutoencoderConfig, FitConfig, TeacherConfig
from teacher_training.data import TrainingPictures
from teacher_training.loop import LossFn, TrainedDiscriminator
from teacher_training.networks.kind import NetworkKind
from teacher_training.networks.precision import loss_in_precision
from teacher_training.networks.registry import network_of
from teacher_training.start import starting_autoencoder

CPU = torch.device("cpu")
TIMED_ROWS, TIMED_STEPS = 16, 2
"""Different rows of the timed steps; steps that are timed after one to warm up."""


@dataclass(kw_only=True)
class Speed:
    """Seconds per training image by stage, seconds per judgment that LatentLPIPS is calibrated on, seconds to
    encode a picture, and bytes on disk: per picture, and for checkpoints and weights.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    judgment_seconds: float = 0.0
    encode_seconds: float = 0.0
    picture_bytes: float = 0.0
    fixed_bytes: float = 0.0


def measure_speed(config: TeacherConfig, stages: Sequence[str], device: torch.device = CPU) -> Speed:
    """Measure the stages on random pictures. The random state of the caller stays as it is."""
    speed, kind = Speed(), network_of(config)
    with fork_rng(device), TemporaryDirectory() as folder:
        torch.manual_seed(0)
        images = torch.randint(256, (TIMED_ROWS, 3, config.size, config.size), dtype=torch.uint8)
        pictures = _random_pictures(kind, images)
        # The autoencoder, trained or given; networks in pixels have none.
        start = starting_autoencoder(config)
        vae = (start if start is not None else build_autoencoder(config.vae, config.size)).to(device)
        if start is None and "vae" in stages:
            _time_autoencoder(speed, vae, images, config.vae)
        started = time.perf_counter()
        with torch.no_grad():
            latents = encode(vae, from_uint8(images[:4])).cpu().repeat(TIMED_ROWS // 4, 1, 1, 1)
        speed.encode_seconds = (time.perf_counter() - started) / 4
        # The network, with its tokenizer if it has one.
        network = kind.build(config, pictures, (latents.shape[1], latents.shape[-1]), Path(folder), True)
        if kind.stage in stages:
            network.to(device)
            inputs = images if config.denoiser.in_pixels else latents
            loss_of = loss_in_precision(network, inputs, pictures.prompts, config)
            modules = list(network.modules.values())
            _time_stage(speed, kind.stage, modules, loss_of, _local_batch(config.denoiser.fit))
        # LatentLPIPS: a judgment encodes 3 pictures and takes 4 passes, each a third of a training step.
        if "lpips" in stages:
            settings = replace(config.lpips.network, channels=latents.shape[1])
            trunk = VGG16(settings, 16, config.lpips.trunk.dropout, config.lpips.trunk.grid).to(device)
            _time_stage(speed, "lpips", [trunk], _trunk_loss(trunk, latents), config.lpips.trunk.batch)
            speed.judgment_seconds = 4 * speed.seconds["lpips"] / 3 + 3 * speed.encode_seconds
        if "clip" in stages:
            clip, loss_of = _clip(config, Path(folder) / "tokenizer", images, pictures.prompts, device)
            _time_stage(speed, "clip", [clip], loss_of, config.clip.batch_size)
        space = latent_space(vae)
        # The cached pictures, and their latents where there is an autoencoder.
        values = 0 if config.denoiser.in_pixels else space.channels * (config.size // space.downscale) ** 2
    speed.picture_bytes = 3.0 * config.size**2 + 4.0 * values
    return speed


def _random_pictures(kind: NetworkKind, images: Tensor) -> TrainingPictures:
    """Random images with prompts as this network takes them."""
    if kind.prompts == "text":
        prompts = [f"a photo of picture {number}" for number in range(len(images))]
        return TrainingPictures(images=images, prompts=prompts)
    return TrainingPictures(images=images, prompts=["0"] * len(images), classes=["0"])


def _time_autoencoder(speed: Speed, vae: Any, images: Tensor, config: AutoencoderConfig) -> None:
    """Time the autoencoder without and with its discriminator, each for its share of the images."""
    perceptual, batch = open_perceptual(config, device_of(vae)), _local_batch(config.fit)
    _time_stage(speed, "vae", [vae], autoencoder_loss(vae, images, config, perceptual), batch)
    if (discriminator := open_discriminator(vae, config)) is not None:
        discriminator.begin(config.adversarial_from)
        loss_of = autoencoder_loss(vae, images, config, perceptual, discriminator)
        seconds, start = _seconds_per_image([vae], loss_of, batch, discriminator), config.adversarial_start
        speed.seconds["vae"] = start * speed.seconds["vae"] + (1 - start) * seconds
        # Two checkpoints of weights and two moments.
        speed.fixed_bytes += 4.0 * 2 * 3 * sum(p.numel() for p in discriminator.module.parameters())


def _time_stage(
    speed: Speed, stage: str, modules: Sequence[nn.Module], loss_of: LossFn, batch_size: int
) -> None:
    """Time a stage's steps, and count the bytes of its checkpoints and weights."""
    speed.seconds[stage] = _seconds_per_image(modules, loss_of, batch_size)
    # Two checkpoints of weights, average and two moments, and the weights themselves twice, all fp32.
    # LatentLPIPS and CLIP have no average and one checkpoint, which is written beside the one before.
    copies = 2 * 3 + 1 if stage in ("lpips", "clip") else 2 * 4 + 2
    parameters = (parameter for module in modules for parameter in module.parameters())
    speed.fixed_bytes += 4.0 * copies * sum(parameter.numel() for parameter in parameters)


def _seconds_per_image(
    modules: Sequence[nn.Module],
    loss_of: LossFn,
    batch_size: int,
    discriminator: TrainedDiscriminator | None = None,
) -> float:
    """Time forward, backward and an AdamW step, and those of the discriminator: on a few rows on a CPU, whose
    time is that of its rows, and on this process's whole batch on a GPU, where a few rows take as long."""
    group = nn.ModuleList(modules).train().requires_grad_(True)
    device = device_of(group)
    rows = max(2, batch_size)
    rows = rows if device.type == "cuda" else min(TIMED_ROWS, rows)
    optimizer = torch.optim.AdamW(group.parameters(), lr=0.0)
    generator = torch.Generator().manual_seed(0)
    started = 0.0
    for step in range(TIMED_STEPS + 1):
        # The first step warms up.
        if step == 1:
            _wait_for(device)
            started = time.perf_counter()
        loss, _ = loss_of([row % TIMED_ROWS for row in range(rows)], generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if discriminator is not None and (adversarial_loss := discriminator.loss()) is not None:
            adversarial_loss.backward()
            discriminator.optimizer.step()
            discriminator.optimizer.zero_grad(set_to_none=True)
    _wait_for(device)
    return (time.perf_counter() - started) / (TIMED_STEPS * rows)


def _local_batch(fit: FitConfig) -> int:
    """Rows of a step on this process, of a stage whose steps all processes share."""
    return fit.batch_size // process_group.world_size()


def _wait_for(device: torch.device) -> None:
    """Wait until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _trunk_loss(trunk: nn.Module, latents: Tensor) -> LossFn:
    def loss_of(rows: list[int], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        logits = trunk(to_device(latents[rows], device_of(trunk)))
        return F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits)), {}

    return loss_of


def _clip(
    config: TeacherConfig, tokenizer: Path, images: Tensor, captions: Sequence[str], device: torch.device
) -> tuple[nn.Module, LossFn]:
    """An untrained CLIP of the settings' shape on a device, and its loss on these pictures."""
    settings = replace(config.clip, image_size=config.size)
    tokenize = clip_tokenizer(tokenizer, settings.context)
    hf_tokenizer = tokenize.tokenizer  # type: ignore[attr-defined]
    model = new_clip(model_config(settings, len(hf_tokenizer), hf_tokenizer.eos_token_id)).to(device)
    tokens = tokenize(list(captions))

    def loss_of(rows: list[int], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, texts, ids = (to_device(x, device) for x in (images[rows], tokens[rows], torch.tensor(rows)))
        image_vectors = F.normalize(model.encode_image(from_uint8(pixels)), dim=1)
        text_vectors = F.normalize(model.encode_text(texts), dim=1)
        return contrastive_loss(image_vectors, text_vectors, model.logit_scale.exp(), ids), {}

    return model, loss_of
