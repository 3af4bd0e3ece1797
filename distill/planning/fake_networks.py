"""The networks and inputs of a run as fake tensors: shapes without data, for memory and operations."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.families.base import Pipeline
from d2g.diffusion.latents import decode
from distill.config.discriminator import DiscriminatorConfig
from distill.config.regression import RegressionConfig
from distill.config.run import DistillConfig
from distill.losses.gradient_penalty import DiscriminatorInput
from distill.losses.regression.decoder_features import DecoderFeatures
from distill.losses.regression.registry import regression_networks
from distill.models.discriminators import DISCRIMINATORS, check_discriminator
from distill.models.projected_discriminator import ProjectedDiscriminator
from distill.models.row_dropout import set_dropout_keys
from distill.models.student import DiffusionStudent, Student, check_teacher
from distill.models.students import build_student_on_meta, check_student
from distill.models.text_student import (
    TextStudent,
    check_text_teacher,
    set_stage_trainable,
    text_conditioner_on_meta,
)
from distill.planning.reference_models import NAMES, configs_only
from latent_lpips.config import LPIPSConfig
from latent_lpips.distance import LatentLPIPS
from latent_lpips.lpips import PixelLPIPS
from latent_lpips.weights import read_lpips_config


@contextmanager
def planning_config(config: DistillConfig, model: str) -> Iterator[DistillConfig | None]:
    """Yield the config with a teacher whose config files can be read; None if there is none.

    It is the run's own teacher, or, if that is not on this disk, the published networks of `model`, a key of
    NAMES.
    """
    if config.teacher in pretrained.SHIPPED or Path(config.teacher or "-").is_dir():
        yield config
    elif model not in NAMES:
        yield None
    else:
        with TemporaryDirectory() as folder:
            yield replace(config, teacher=configs_only(model, Path(folder) / model))


def build_meta_student(config: DistillConfig) -> Student:
    """The student of a run without weights, with its trained parameters switched on."""
    check_teacher(config.teacher, config.stage, config.student)
    check_student(config)
    student = build_student_on_meta(
        config.teacher, config.student_timestep, config.student, config.seed, config.stage
    )
    if config.own_text:
        check_text_teacher(config.teacher)
        assert isinstance(student, DiffusionStudent), "check_student refuses others"
        student = TextStudent(student, text_conditioner_on_meta(config.teacher))
    set_stage_trainable(student, config.teacher, config.stage, config.student)
    return student


def build_meta_discriminator(teacher: str, gan: DiscriminatorConfig) -> nn.Module:
    """The discriminator of a run without weights."""
    check_discriminator(teacher, gan)
    return DISCRIMINATORS[gan.discriminator].build_on_meta(teacher, gan)


def autoencoder_distances(teacher: str, options: RegressionConfig) -> list[nn.ModuleList]:
    """The losses that differentiate the autoencoder, each with the autoencoder beside it, without weights."""
    distances = []
    if "lpips" in options.names:
        vae = pretrained.autoencoder_on_meta(teacher).requires_grad_(False)
        resize = options.lpips_resize or None
        metric = PixelLPIPS(options.lpips_net, pretrained=False, decode=partial(decode, vae), resize=resize)
        distances.append(nn.ModuleList([metric, vae]))
    if "decoder_features" in options.names:
        vae = pretrained.autoencoder_on_meta(teacher)
        distances.append(nn.ModuleList([DecoderFeatures(vae, options.decoder_blocks), nn.Module()]))
    return distances


def to_fake(network: nn.Module, device: str = "cpu") -> None:
    """Replace parameters and buffers by fake tensors. Call it in a FakeTensorMode."""
    for module in network.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(
                    torch.empty(p.shape, dtype=p.dtype, device=device), p.requires_grad
                )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def latent_metric(config: DistillConfig, channels: int) -> LatentLPIPS | None:
    """The LatentLPIPS of the regression loss as the run folds it, without weights; None if there is none.

    If it is not on this disk, one of full width stands in for it.
    """
    if "latent_lpips" not in regression_networks(config.regression):
        return None
    folder = Path(config.lpips) if config.lpips else pretrained.resolve(config.teacher) / "latent_lpips"
    known = (folder / "config.json").is_file()
    shape = read_lpips_config(folder) if known else LPIPSConfig(channels=channels)
    with torch.device("meta"):
        return LatentLPIPS(shape).fold("bf16" if config.train.bf16 else "fp32")


@dataclass(frozen=True)
class FakeBatch:
    """Inputs of B rows: noise [B, *noise_shape], latents [B, C, h, w], conditioning, and guidance scales for
    students that take them."""

    noise: Tensor
    latents: Tensor
    cond: Conditioning
    guidance: tuple[Tensor, ...]


def fake_batch(pipeline: Pipeline, student: Student, count: int) -> FakeBatch:
    """Inputs of `count` rows for a student and its discriminator; `guidance` is empty without that input."""
    noise, latents = (torch.empty(count, *shape) for shape in (student.noise_shape, student.latent_shape))
    cond = student.family.fake_conditioning(pipeline, student.conditioning_config, count)
    if student.prior_shape is not None:
        cond = cond.with_prior(torch.empty(count, *student.prior_shape))
    return FakeBatch(noise, latents, cond, (torch.empty(count),) if student.guided else ())


def fake_forward(student: Student, b: FakeBatch) -> Tensor:
    """A forward pass of the student: latents [B, C, h, w]."""
    set_dropout_keys(student, torch.zeros(len(b.noise), dtype=torch.int64))
    cond = student.fake_tokens(len(b.noise)) if isinstance(student, TextStudent) else b.cond
    latents: Tensor = student(b.noise, cond, *b.guidance)
    return latents


def discriminator_input(gan: DiscriminatorConfig, b: FakeBatch) -> DiscriminatorInput:
    """Inputs of a discriminator for the rows of a batch."""
    count = DISCRIMINATORS[gan.discriminator].draws
    draws = torch.zeros(len(b.noise), count, dtype=torch.int64) if count else None
    return DiscriminatorInput(b.latents, b.latents, b.cond, None, draws)


def pixel_features_of(discriminator: nn.Module) -> list[nn.Module]:
    """The frozen feature networks of a discriminator, or of its part on pixels; none for other kinds."""
    parts = [part for part in discriminator.modules() if isinstance(part, ProjectedDiscriminator)]
    return [part.pixel_features for part in parts]
