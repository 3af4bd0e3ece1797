"""A student that is a generator with styles: how it takes a row's noise and conditioning, and draws latents
of the teacher's shape.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d2g.core.errors import SettingError
from d2g.core.seeds import Stream, generator
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.families.base import Family
from d2g.diffusion.pipelines import family_of
from distill.config.student import GeneratorConfig, StudentConfig
from distill.models.condition_vector import ConditionShape, condition_shape, condition_vector
from distill.models.student import Student
from distill.models.student_kind import StudentKind
from distill.models.style_generator import BlockStyle, StyleGenerator
from distill.models.style_layers import initialize

Build = Callable[[GeneratorConfig, tuple[int, int, int], ConditionShape], StyleGenerator]
"""(sizes, shape of the image, the condition) -> a generator without weights."""


class GeneratorStudent(Student):
    """A generator's latents from noise [B, N, 1, 1] and the teacher's conditioning.

    `size`: of what the generator draws; it is enlarged to the teacher's latents (progressive growing).
    """

    own_noise = True
    has_styles = True

    def __init__(
        self,
        network: StyleGenerator,
        family: Family,
        conditioning_config: Any,
        latent_shape: tuple[int, int, int],
        size: tuple[int, int],
        downscale: int,
        name: str,
    ) -> None:
        super().__init__()
        self.generator, self.family, self.downscale = network, family, downscale
        self._conditioning_config, self._latent_shape, self.size = conditioning_config, latent_shape, size
        self.name = name

    def forward(
        self, noise: Tensor, cond: Conditioning, guidance: Tensor | None = None, psi: float = 1.0
    ) -> Tensor:
        """noise [B, N, 1, 1] ~ N(0, 1) and the conditioning of B rows -> scaled latents [B, C, h, w], fp32.

        psi in [0, 1]: truncation, w = mean + psi (w - mean); 1 changes nothing. An upsampler's small latents
        are the conditioning's prior. The guidance scale is not read.
        """
        prior = self._small_latents(cond.tensors.get("prior"))
        return self._enlarged(self.generator(*self._inputs(noise, cond), prior, psi))

    def styles(self, noise: Tensor, cond: Conditioning, psi: float = 1.0) -> list[BlockStyle]:
        """The style of each block for B rows; inputs as in `forward`. Styles of different inputs can be
        mixed: `draw` takes them from anywhere."""
        return self.generator.styles(*self._inputs(noise, cond), psi)

    def draw(self, styles: Sequence[BlockStyle], prior: Tensor | None = None) -> Tensor:
        """The style of each block, and the latents [B, C, h, w] that an upsampler enlarges -> scaled latents
        [B, C, h, w], fp32. The forward pass is `draw(styles(noise, cond, psi), prior)`."""
        return self._enlarged(self.generator.draw(styles, self._small_latents(prior)))

    def _inputs(
        self, noise: Tensor, cond: Conditioning
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Noise [B, N], the condition's vector or classes, tokens and mask, in the generator's precision."""
        dtype = next(self.generator.parameters()).dtype
        hidden, vector = cond.tensors.get("hidden"), condition_vector(cond)
        return (
            noise.flatten(1).to(dtype),
            vector.to(dtype) if vector is not None and vector.is_floating_point() else vector,
            None if hidden is None else hidden.to(dtype),
            cond.tensors.get("mask"),
        )

    def _small_latents(self, prior: Tensor | None) -> Tensor | None:
        """An upsampler's small latents, in the generator's precision."""
        if prior is None or self.prior_shape is None:
            return None
        return self._shrink(prior).to(next(self.generator.parameters()).dtype)

    def _enlarged(self, latents: Tensor) -> Tensor:
        """The generator's image at the size of the teacher's latents, fp32."""
        with torch.autocast(latents.device.type, enabled=False):
            return resize(latents.float(), self.latent_shape[1:])

    @property
    def network(self) -> StyleGenerator:
        """The generator."""
        return self.generator

    @property
    def conditioning_config(self) -> Any:
        """The config of the teacher's network."""
        return self._conditioning_config

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The shape (C, h, w) of the teacher's latents."""
        return self._latent_shape

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """(N, 1, 1): z and the spatial noise of a row."""
        return self.generator.noise_width, 1, 1

    @property
    def prior_shape(self) -> tuple[int, int, int] | None:
        """The shape of an upsampler's small latents."""
        low = getattr(self.generator, "low_size", None)
        return None if low is None else (self.latent_shape[0], *low)

    @property
    def where(self) -> str:
        """What the network is, in words."""
        return f"a generator of kind {self.name}"

    def real_view(self, latents: Tensor) -> Tensor:
        """Latents reduced to the generator's size, and enlarged again as its own are."""
        if self.size == self.latent_shape[1:]:
            return latents
        return resize(F.adaptive_avg_pool2d(latents, self.size), self.latent_shape[1:])

    def prior_of(self, latents: Tensor) -> Tensor | None:
        """An upsampler's small latents: means over cells of `latents` [B, C, h, w]."""
        return None if self.prior_shape is None else self._shrink(latents)

    def _shrink(self, latents: Tensor) -> Tensor:
        assert self.prior_shape is not None
        return F.adaptive_avg_pool2d(latents, self.prior_shape[1:])

    def grown(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the same generator at a lower resolution, with this one's new blocks.

        Their contribution to the image starts at zero, so that the grown generator draws the enlarged image
        first (ours). Other weights stay as they are.
        """
        own = self.state_dict()
        known = {name.split(".")[2] for name in tensors if name.startswith("generator.blocks.")}
        added = {
            name: tensor.clone()
            for name, tensor in own.items()
            if name.startswith("generator.blocks.") and name.split(".")[2] not in known
        }
        # Only blocks above the known ones are new.
        if not known or any(int(name.split(".")[2]) < len(known) for name in added):
            return tensors
        for name, tensor in added.items():
            if ".to_image.conv.weight" in name or ".to_image.bias" in name:
                tensor.zero_()
        return {**tensors, **added}

    def begin_step(self) -> None:
        """Start to sum the mapping network's outputs."""
        self.generator.begin_step()

    def after_update(self, steps: int) -> None:
        """Track the mean of the mapping network."""
        self.generator.track_mean(steps)


def resize(latents: Tensor, size: tuple[int, ...]) -> Tensor:
    """Bilinear enlargement to (h, w); the same tensor if it has this size."""
    if latents.shape[2:] == torch.Size(size):
        return latents
    return F.interpolate(latents, size=size, mode="bilinear", align_corners=False)


def generator_kind(
    name: str, build: Build, settings: tuple[str, ...], grows: bool = False, upsamples: bool = False
) -> StudentKind:
    """The kind of student whose network `build` makes. grows: whether it can draw at a lower resolution.
    upsamples: whether it enlarges latents, so that what it draws for a row belongs to the row's latents."""

    def on(device: str, teacher: str, config: StudentConfig) -> GeneratorStudent:
        family = family_of(teacher)
        if family.prior_family is not None or not family.draws_images:
            raise SettingError(
                f"student.kind is {name!r}, but {teacher} is a stage of a cascade ({family.title}), whose "
                "latents decode to no image alone; give a teacher whose latents do"
            )
        shape = pretrained.latent_shape(teacher)
        size = _drawn_size(teacher, shape, config.generator.resolution if grows else 0)
        with torch.device(device):
            network = build(config.generator, (shape[0], *size), condition_shape(teacher))
        return GeneratorStudent(
            network,
            family,
            pretrained.load_on_meta(teacher, family.network).config,
            shape,
            size,
            pretrained.latent_downscale(teacher),
            name,
        )

    def build_student(teacher: str, timestep: int, config: StudentConfig, seed: int, stage: str) -> Student:
        student = on("cpu", teacher, config)
        initialize(student.network, generator(seed, Stream.GENERATOR_INIT))
        return student

    return StudentKind(
        name=name,
        build=build_student,
        build_on_meta=lambda teacher, timestep, config, seed, stage: on("meta", teacher, config),
        shard_units=lambda teacher, student: student.network.shard_units(),
        settings=(*settings, "resolution") if grows else settings,
        regresses=upsamples,
        enlarges=upsamples,
    )


def _drawn_size(teacher: str, shape: tuple[int, int, int], resolution: int) -> tuple[int, int]:
    """The size that a generator draws. Raises SettingError unless the teacher's is a power of two of it."""
    _, height, width = shape
    if not resolution:
        return height, width
    halvings = 0
    while height >> halvings > resolution:
        halvings += 1
    unit = 2**halvings
    if height != resolution * unit or width % unit or width // unit < 1:
        raise SettingError(
            f"student.generator.resolution is {resolution}, but latents of {teacher} are {height}x{width}; "
            f"expected {height}, or the half, quarter, ... of it"
        )
    return height // unit, width // unit
