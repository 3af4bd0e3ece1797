"""Prepare the rows and random numbers of one step: the same for any number of processes and micro-batches.

Some random numbers are drawn for the whole batch from (seed, images seen), and each process takes those of
its rows. Others are drawn for each row from (seed, number of the row since the run began).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from d2g.core.distributed import process_group
from d2g.core.seeds import StepStream, Stream, generator
from d2g.core.seeds import noise as row_noise
from d2g.core.transfer import to_device
from d2g.diffusion.conditioning import Conditioning
from distill.config.discriminator import DiscriminatorConfig, Penalty
from distill.losses.adversarial import sample_mismatches
from distill.losses.clip_guidance import ClipGuidance
from distill.losses.gradient_penalty import DiscriminatorInput, sample_penalty_rows
from distill.losses.noise_augmentation import NoiseAugmentation
from distill.losses.regression.base import Transforms
from distill.losses.regression.regression import Regression
from distill.models.discriminators import DISCRIMINATORS
from distill.models.row_dropout import row_keys
from distill.models.student import Student
from distill.training.text_cache import TextCache
from latent_lpips.augment import select_transforms
from pairgen.store.concat import guidance_scales
from pairgen.store.hdf5 import PairBatch


@dataclass(frozen=True)
class StepRandomness:
    """The random numbers of one step for all B rows of the batch, on the CPU, equal on every process."""

    transforms: Transforms  # of the regression loss
    mix: Tensor  # [B] in [0, 1): which rows mix-and-match replaces, and how
    levels: Tensor | None  # [B] time inputs of D; None: D uses its constant
    draws: Tensor | None  # [3, B, n] integers for D's real rows, its fake rows, and the rows of G's loss
    penalized_rows: list[int]  # rows of single-sample R1, sampled in every step, also where R1 is not due
    clip_crops: Tensor  # [B, 2] in [0, 1): positions of the crops that CLIP sees
    consistency_levels: Tensor | None  # [B] indices of noise levels, 1 to N - 1
    nimg: int  # images seen before the step: the number of its first row


@dataclass
class MicroBatch:
    """b rows that pass through the networks together, and the tensors that a step computes from them.

    Tensors lie on the run's device. `consistency_*` belong to consistency distillation.
    """

    prompts: list[str]
    noise: Tensor  # [b, C, h, w] fp32, the noise of the pairs, which conditions D
    student_noise: Tensor  # [b, *noise_shape] fp32, the student's input: the same, or its own noise
    target: Tensor  # [b, C, h, w] fp32, the teacher's latents
    cond: Conditioning
    student_cond: Conditioning  # `cond`, or token ids for a student with its own text encoders
    guidance: tuple[Tensor, ...]  # (scales [b],) for a student with an added guidance input
    transforms: Transforms
    rows: range  # numbers of the rows since the run began
    dropout_keys: Tensor | None  # [b] keys of the student's dropout masks
    # For the discriminator:
    mix_mode: Tensor  # [b] mode of `sample_mismatches`: 0 is not mismatched
    mix_partner: Tensor  # [b] the row with which it is mismatched
    t: Tensor | None  # [b] D's time inputs
    augment_noise: tuple[Tensor | None, Tensor | None]  # [b, C, h, w] added to real and to fake rows before D
    r1_noise: Tensor | None  # [b, C, h, w] perturbation of the approximate R1
    draws: tuple[Tensor | None, ...] = (None,) * 3  # [b, n] of D's real rows, its fake rows, and G's rows
    # For CLIP guidance:
    clip_text: Tensor | None = None  # [b, D] unit vectors of the prompts
    clip_texts: Tensor | None = None  # [B, D] unit vectors of the whole batch, for the contrastive loss
    clip_crops: Tensor | None = None  # [b, 2] in [0, 1)
    consistency_level: Tensor | None = None  # [b] index of the noise level, 1 to N - 1
    consistency_noise: Tensor | None = None  # [b, C, h, w] of unit variance
    # Set during the step:
    generated: Tensor = field(init=False)  # [b, C, h, w] the student's latents
    d_real: DiscriminatorInput = field(init=False)
    d_fake: DiscriminatorInput = field(init=False)


@dataclass(frozen=True)
class _ProcessRows:
    """The n rows of this process in one step, before they are split. Tensors lie on the run's device."""

    prompts: Sequence[str]
    noise: Tensor  # [n, C, h, w] fp32
    target: Tensor  # [n, C, h, w] fp32
    cond: Conditioning
    student_cond: Conditioning
    guidance: tuple[Tensor, ...]  # (scales [n],), empty where `cond` holds them
    clip_text: Tensor | None  # [n, D]
    clip_texts: Tensor | None  # [B, D] of the whole batch


class StepPreparation:
    """Turns a batch of pairs into the micro-batches and random numbers of one step on this process.

    - batch_size: rows of a step, over all ranks.
    - microbatches: number of micro-batches per step and process.
    - dropout: whether the student has dropout.
    - gan: discriminator settings; None in the regression stage.
    - encode: prompts -> conditioning.
    - encode_for_student: prompts -> token ids, for a student with its own text encoders. Other students take
      the result of `encode`.
    - embedded_guidance: whether the teacher's network has an input for the guidance scale. The scale is then
      part of the conditioning of student and discriminator.
    - noise_levels: number of noise levels in consistency distillation; 0 in other stages.
    """

    def __init__(
        self,
        *,
        seed: int,
        batch_size: int,
        microbatches: int,
        dropout: bool,
        gan: DiscriminatorConfig | None,
        regression: Regression,
        noise_augment: NoiseAugmentation,
        encode: TextCache,
        encode_for_student: Callable[[Sequence[str]], Conditioning] | None = None,
        device: torch.device,
        student: Student,
        embedded_guidance: bool = False,
        clip_guidance: ClipGuidance | None = None,
        noise_levels: int = 0,
    ) -> None:
        self.noise_levels = noise_levels
        self.clip_guidance, self.student = clip_guidance, student
        self.embedded_guidance = embedded_guidance
        self.seed, self.batch_size, self.microbatches = seed, batch_size, microbatches
        self.dropout, self.gan = dropout, gan
        self.regression, self.noise_augment = regression, noise_augment
        self.encode, self.device = encode, device
        self.encode_for_student = encode_for_student

    def __call__(self, batch: PairBatch, nimg: int) -> tuple[list[MicroBatch], StepRandomness]:
        """Prepare the step after `nimg` images. `batch`: this process's rows.

        All tensors are copied to the device here, before the first forward pass: a copy in the middle of a
        step would wait until the GPU has finished its queue.
        """
        # The conditioning: text or class, guidance scale, and the latents of a cascade's earlier stage.
        noise, target = (to_device(x, self.device).float() for x in (batch.noise, batch.latents))
        cond = self.encode(batch.prompts)
        guidance = guidance_scales(batch)
        if self.embedded_guidance:
            cond, guidance = cond.with_guidance(*guidance), ()
        if batch.condition is not None:
            cond = cond.with_prior(batch.condition)

        # An upsampler is conditioned on reduced latents; a generator that grows is compared at its own size.
        if (small_latents := self.student.small_latents(target)) is not None:
            cond = cond.with_prior(small_latents)
        target = self.student.limit_detail(target)
        student_cond = self.encode_for_student(batch.prompts) if self.encode_for_student else cond

        # Split this process's rows into micro-batches.
        count = len(batch.prompts)
        size = count // self.microbatches
        clip_text, clip_texts = self._clip_texts(batch.prompts, size)
        rows = _ProcessRows(
            prompts=batch.prompts,
            noise=noise,
            target=target,
            cond=cond,
            student_cond=student_cond,
            guidance=tuple(to_device(scale, self.device) for scale in guidance),
            clip_text=clip_text,
            clip_texts=clip_texts,
        )
        randomness = self.sample_step_randomness(_image_shape(noise), nimg)
        microbatches = [
            self._microbatch(rows, slice(start, start + size), randomness) for start in range(0, count, size)
        ]
        return microbatches, randomness

    def _clip_texts(self, prompts: Sequence[str], size: int) -> tuple[Tensor | None, Tensor | None]:
        """Encode prompts for CLIP guidance, `size` at a time, as unit vectors.

        Returns those of this process's prompts, and, for the contrastive loss, those of the whole batch.
        Either is None where it is not needed.
        """
        clip = self.clip_guidance
        if clip is None:
            return None, None
        parts = [clip.encode(prompts[start : start + size]) for start in range(0, len(prompts), size)]
        local = torch.cat(parts)
        return local, process_group.join_rows(local) if clip.contrastive else None

    def sample_step_randomness(self, shape: tuple[int, int, int], nimg: int) -> StepRandomness:
        """Sample the random numbers of the step after `nimg` images. shape: of a row's latents, (C, h, w).

        Each kind of number has its own stream, so switching one off does not change the others.
        """

        def rng_of(stream: StepStream) -> torch.Generator:
            return generator(self.seed, nimg, stream)

        # For the discriminator: crops and augmentations, time inputs, and rows of the penalty.
        size, gan = self.batch_size, self.gan
        levels, draws, penalized_rows = None, None, list[int]()
        if gan is not None:
            if count := DISCRIMINATORS[gan.discriminator].draws:
                draws = torch.randint(2**24, (3, size, count), generator=rng_of(StepStream.VIEWS))
            levels = self.noise_augment.levels(size, rng_of(StepStream.NOISE_LEVELS))
            if gan.active_penalty == "single":
                penalized_rows = sample_penalty_rows(size, gan.r1_rows, rng_of(StepStream.PENALTY_ROWS))

        # For consistency distillation: noise levels.
        consistency_levels = None
        if self.noise_levels:
            rng = rng_of(StepStream.CONSISTENCY_LEVELS)
            consistency_levels = torch.randint(1, self.noise_levels, (size,), generator=rng)
        return StepRandomness(
            transforms=self.regression.draw(size, shape, rng_of(StepStream.TRANSFORMS)),
            mix=torch.rand(size, generator=rng_of(StepStream.MIX)),
            levels=levels,
            draws=draws,
            penalized_rows=penalized_rows,
            clip_crops=torch.rand(size, 2, generator=rng_of(StepStream.GUIDANCE_CROPS)),
            consistency_levels=consistency_levels,
            nimg=nimg,
        )

    def _microbatch(self, local: _ProcessRows, part: slice, randomness: StepRandomness) -> MicroBatch:
        """Build the micro-batch of the rows `local[part]`."""
        gan, device, student = self.gan, self.device, self.student
        shape = _image_shape(local.noise)
        # Positions of the rows in the batch of all processes, and their numbers since the run began.
        prompts = list(local.prompts[part])
        first_row = process_group.rank() * len(local.prompts) + part.start
        batch_rows = slice(first_row, first_row + len(prompts))
        rows = range(randomness.nimg + batch_rows.start, randomness.nimg + batch_rows.stop)

        # Fraction of mismatched rows, and the perturbation of the approximate penalty.
        fraction, shares = (0.0, (1.0, 1.0, 1.0))
        r1_noise = None
        if gan is not None:
            fraction, shares = gan.mix_fraction, (gan.mix_x, gan.mix_c, gan.mix_z)
            if gan.active_penalty == "approx":
                r1_noise = row_noise(generator(self.seed, Stream.R1_NOISE).initial_seed(), rows, shape)

        # Noise of consistency distillation: new each time that an image is used.
        levels_of_rows, consistency_noise = randomness.consistency_levels, None
        if levels_of_rows is not None:
            consistency_noise = row_noise(
                generator(self.seed, Stream.CONSISTENCY_NOISE).initial_seed(), rows, shape
            )

        # Noise of a student that does not use that of the pairs.
        own_noise = None
        if student.own_noise:
            seed = generator(self.seed, Stream.GENERATOR_NOISE).initial_seed()
            own_noise = to_device(row_noise(seed, rows, student.noise_shape), device)

        # Select this micro-batch's part of the step's random numbers, and copy it to the device.
        mix_mode, mix_partner = sample_mismatches(prompts, fraction, randomness.mix[batch_rows], shares)
        transforms, levels = randomness.transforms, randomness.levels
        return MicroBatch(
            prompts=prompts,
            noise=local.noise[part],
            student_noise=local.noise[part] if own_noise is None else own_noise,
            target=local.target[part],
            cond=local.cond[part],
            student_cond=local.student_cond[part],
            guidance=tuple(scale[part] for scale in local.guidance),
            transforms=None if transforms is None else [select_transforms(t, batch_rows) for t in transforms],
            rows=rows,
            dropout_keys=to_device(row_keys(self.seed, rows) if self.dropout else None, device),
            mix_mode=to_device(mix_mode, device),
            mix_partner=to_device(mix_partner, device),
            t=to_device(None if levels is None else levels[batch_rows], device),
            augment_noise=(
                to_device(self.noise_augment.eps(rows, shape, 0), device),
                to_device(self.noise_augment.eps(rows, shape, 1), device),
            ),
            r1_noise=to_device(r1_noise, device),
            draws=(None,) * 3
            if randomness.draws is None
            else tuple(to_device(draws[batch_rows], device) for draws in randomness.draws),
            consistency_level=to_device(
                None if levels_of_rows is None else levels_of_rows[batch_rows], device
            ),
            consistency_noise=to_device(consistency_noise, device),
            clip_text=None if local.clip_text is None else local.clip_text[part],
            clip_texts=local.clip_texts,
            clip_crops=to_device(
                None if self.clip_guidance is None else randomness.clip_crops[batch_rows], device
            ),
        )


def _image_shape(images: Tensor) -> tuple[int, int, int]:
    """(C, h, w) of images [n, C, h, w]."""
    _, channels, height, width = images.shape
    return channels, height, width


def penalty_batches(
    microbatches: Sequence[MicroBatch], randomness: StepRandomness, penalty: Penalty
) -> list[tuple[DiscriminatorInput, DiscriminatorInput, float]]:
    """List the passes of a gradient penalty on this process: (real, fake, weight in the mean over processes).

    All processes have the same number of passes, because they gather sharded networks together. In the
    single-sample form a pass has one row; a process with fewer sampled rows than another repeats its first
    row with weight 0.
    """
    if penalty != "single":
        return [(m.d_real, m.d_fake, 1 / len(microbatches)) for m in microbatches]
    # Penalized rows of this process, as positions in its part of the batch.
    size = len(microbatches[0].prompts)
    local, world = size * len(microbatches), process_group.world_size()
    local_rows = [
        row - process_group.rank() * local
        for row in randomness.penalized_rows
        if row // local == process_group.rank()
    ]

    # Every process makes as many passes as the process with the most rows.
    passes = max(sum(row // local == rank for row in randomness.penalized_rows) for rank in range(world))
    weight = world / len(randomness.penalized_rows)
    weighted_rows = [(row, weight) for row in local_rows] + [(0, 0.0)] * (passes - len(local_rows))

    # Take single rows out of the micro-batches.
    batches = []
    for row, weight in weighted_rows:
        microbatch, position = microbatches[row // size], row % size
        batches.append((microbatch.d_real.row(position), microbatch.d_fake.row(position), weight))
    return batches
