"""Students that are style-based generators with weights of their own (StyleGAN-T, GigaGAN).

`GeneratorStudent` adapts a generator to the teacher's noise, conditioning and latents; `generator_kind` makes
a kind of student from it.
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

BuildGenerator = Callable[[GeneratorConfig, tuple[int, int, int], ConditionShape], StyleGenerator]
"""(settings, shape (C, h, w) of its latents, sizes of the condition) -> a generator, not initialized."""


class GeneratorStudent(Student):
    """A generator that maps noise [B, N, 1, 1] and the teacher's conditioning to scaled latents.

    size: height and width of the generator's output. In progressive growing it is smaller than the teacher's
    latents, and the output is enlarged to their size. name: the kind of student.
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

        psi in [0, 1]: truncation, w = mean + psi (w - mean); 1 is none. An upsampler takes its small latents
        from the conditioning (`prior`). The guidance scale is not used.
        """
        prior = self._prepare_prior(cond.tensors.get("prior"))
        return self._enlarge(self.generator(*self._inputs(noise, cond), prior, psi))

    def styles(self, noise: Tensor, cond: Conditioning, psi: float = 1.0) -> list[BlockStyle]:
        """Compute the style of each block for B rows; inputs as in `forward`.

        `draw` also accepts styles that come from different inputs (style mixing).
        """
        return self.generator.styles(*self._inputs(noise, cond), psi)

    def draw(self, styles: Sequence[BlockStyle], prior: Tensor | None = None) -> Tensor:
        """Generate scaled latents [B, C, h, w], fp32, from the style of each block.

        prior [B, C, h, w]: the latents that an upsampler enlarges. The forward pass equals
        `draw(styles(noise, cond, psi), prior)`.
        """
        return self._enlarge(self.generator.draw(styles, self._prepare_prior(prior)))

    def _inputs(
        self, noise: Tensor, cond: Conditioning
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return noise [B, N], condition vector or labels, tokens and mask, in the generator's precision."""
        dtype = next(self.generator.parameters()).dtype
        hidden, vector = cond.tensors.get("hidden"), condition_vector(cond)
        return (
            noise.flatten(1).to(dtype),
            vector.to(dtype) if vector is not None and vector.is_floating_point() else vector,
            None if hidden is None else hidden.to(dtype),
            cond.tensors.get("mask"),
        )

    def _prepare_prior(self, prior: Tensor | None) -> Tensor | None:
        """Reduce `prior` to the small latents of an upsampler, in the generator's precision."""
        if prior is None or self.prior_shape is None:
            return None
        return self._shrink(prior).to(next(self.generator.parameters()).dtype)

    def _enlarge(self, latents: Tensor) -> Tensor:
        """Resize the generator's output to the size of the teacher's latents, in fp32."""
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
        """(N, 1, 1): N numbers for z and the spatial noise."""
        return self.generator.noise_width, 1, 1

    @property
    def prior_shape(self) -> tuple[int, int, int] | None:
        """The shape (C, h', w') of an upsampler's small latents; None for other generators."""
        low = getattr(self.generator, "low_size", None)
        return None if low is None else (self.latent_shape[0], *low)

    @property
    def evaluation_point(self) -> str:
        """The kind of generator, in words: it has no timestep."""
        return f"a generator of kind {self.name}"

    def limit_detail(self, latents: Tensor) -> Tensor:
        """Reduce latents [B, C, h, w] to the generator's size and enlarge them again as its output is."""
        if self.size == self.latent_shape[1:]:
            return latents
        return resize(F.adaptive_avg_pool2d(latents, self.size), self.latent_shape[1:])

    def small_latents(self, latents: Tensor) -> Tensor | None:
        """Average latents [B, C, h, w] over squares to an upsampler's small latents; None for others."""
        return None if self.prior_shape is None else self._shrink(latents)

    def _shrink(self, latents: Tensor) -> Tensor:
        assert self.prior_shape is not None
        return F.adaptive_avg_pool2d(latents, self.prior_shape[1:])

    def grow_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add this generator's higher blocks to the weights of the same generator at a lower resolution.

        The contribution of the new blocks to the image starts at zero, so the grown generator first draws the
        enlarged image of the smaller one (ours). Weights that do not fit are returned unchanged.
        """
        prefix = "generator.blocks."
        stored_blocks = {name.split(".")[2] for name in tensors if name.startswith(prefix)}
        added = {
            name: tensor.clone()
            for name, tensor in self.state_dict().items()
            if name.startswith(prefix) and name.split(".")[2] not in stored_blocks
        }
        # All new blocks must lie above the stored ones.
        if not stored_blocks or any(int(name.split(".")[2]) < len(stored_blocks) for name in added):
            return tensors

        # Zero their output layers.
        for name, tensor in added.items():
            if ".to_image.conv.weight" in name or ".to_image.bias" in name:
                tensor.zero_()
        return {**tensors, **added}

    def begin_step(self) -> None:
        """Reset the sums for the tracked mean of the mapping network."""
        self.generator.begin_step()

    def after_update(self, steps: int) -> None:
        """Update the tracked mean of the mapping network."""
        self.generator.track_mean(steps)


def resize(latents: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize latents [B, C, h', w'] to `size` (h, w), bilinear; the same tensor if it has this size."""
    if latents.shape[2:] == torch.Size(size):
        return latents
    return F.interpolate(latents, size=size, mode="bilinear", align_corners=False)


def generator_kind(
    name: str, build: BuildGenerator, settings: tuple[str, ...], grows: bool = False, upsamples: bool = False
) -> StudentKind:
    """Make the kind of student whose network is built by `build`.

    settings: fields of GeneratorConfig that the network uses. grows: whether it can be trained at a lower
    resolution first. upsamples: whether it enlarges a row's latents, so that a regression loss applies.
    """

    def build_on(device: str, teacher: str, config: StudentConfig) -> GeneratorStudent:
        # The teacher must draw images alone.
        family = family_of(teacher)
        if family.prior_family is not None or not family.draws_images:
            raise SettingError(
                f"student.kind is {name!r}, but {teacher} is a stage of a cascade ({family.title}), whose "
                "latents decode to no image alone; give a teacher whose latents do"
            )

        # The generator at its own size, and the facts of the teacher that the student needs.
        shape = pretrained.latent_shape(teacher)
        size = _output_size(teacher, shape, config.generator.resolution if grows else 0)
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
        student = build_on("cpu", teacher, config)
        initialize(student.network, generator(seed, Stream.GENERATOR_INIT))
        return student

    return StudentKind(
        name=name,
        build=build_student,
        build_on_meta=lambda teacher, timestep, config, seed, stage: build_on("meta", teacher, config),
        shard_units=lambda teacher, student: student.network.shard_units(),
        settings=(*settings, "resolution") if grows else settings,
        own_noise=True,
        regresses=upsamples,
        enlarges=upsamples,
    )


def _output_size(teacher: str, shape: tuple[int, int, int], resolution: int) -> tuple[int, int]:
    """The output size (h, w) of a generator: that of the teacher's latents, or of height `resolution`.

    Raises SettingError unless the latents are a power of two times as large.
    """
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
