"""The random numbers and rows of one step: the same for any number of processes and micro-batches.

Random numbers are drawn for the whole batch, from (seed, images seen), and each process takes those of its
rows; or for each row, from (seed, number of the row).
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
from pairgen.store.concat import scales
from pairgen.store.hdf5 import PairBatch


@dataclass(frozen=True)
class StepRandomness:
    """The random numbers of one step, for the batch of B rows over all processes."""

    transforms: Transforms  # of the regression loss
    mix: Tensor  # [B] in (0, 1): which rows are mismatched, and how
    levels: Tensor | None  # [B] D's time inputs; None: its constant
    draws: Tensor | None  # [3, B, D] integers of real, fake and the student's rows, for kinds that take them
    penalized_rows: list[int]  # rows for single-sample R1, drawn in every step, due or not; else empty
    clip_crops: Tensor  # [B, 2] in [0, 1): crops of the student's images that CLIP sees
    consistency_levels: Tensor | None  # [B] numbers of noise levels, 1 to N - 1
    nimg: int  # number of the first row since the run began


@dataclass
class MicroBatch:
    """b rows that pass through the networks together, and what a step computes of them."""

    prompts: list[str]
    noise: Tensor  # [b, C, h, w] fp32, of the pairs: what D is conditioned on
    student_noise: Tensor  # [b, *noise_shape] fp32, of the pairs or the student's own: what it draws from
    target: Tensor  # [b, C, h, w] fp32, the teacher's latents
    cond: Conditioning
    student_cond: Conditioning  # `cond`, or the token ids of a student with text encoders of its own
    guidance: tuple[Tensor, ...]  # (scales [b],) for a student with an added guidance input
    transforms: Transforms
    rows: range  # numbers of the rows since the run began
    dropout_keys: Tensor | None  # [b] of the student's dropout
    # Of the second stage:
    mix_mode: Tensor  # [b] how each fake row is mismatched, 0: not
    mix_partner: Tensor  # [b] the row that it is mismatched with
    t: Tensor | None  # [b] D's time inputs
    augment_noise: tuple[Tensor | None, Tensor | None]  # added before D to the real and to the fake rows
    r1_noise: Tensor | None  # of the approximated R1
    draws: tuple[Tensor | None, ...] = (None,) * 3  # [b, D] of real, fake and the student's rows
    clip_text: Tensor | None = None  # [b, D] unit vectors of the prompts, for guidance by CLIP
    clip_texts: Tensor | None = None  # [B, D] those of the whole batch, for the contrastive form
    clip_crops: Tensor | None = None  # [b, 2] in [0, 1)
    consistency_level: Tensor | None = None  # [b] number of the noise level, 1 to N - 1
    consistency_noise: Tensor | None = None  # [b, C, h, w] of unit variance
    generated: Tensor = field(init=False)  # [b, C, h, w] the student's latents
    d_real: DiscriminatorInput = field(init=False)
    d_fake: DiscriminatorInput = field(init=False)


class StepPreparation:
    """Turns a batch of pairs into the micro-batches and random numbers of one step on this process.

    `gan` is None in the regression stage. `microbatches`: per step and process. `dropout`: whether the
    student has dropout. `student`: says what noise it takes, and what it sees of a row's latents.
    `encode_for_student`: gives the input of a student with text encoders of its own; other students take
    what `encode` gives. `embedded_guidance`: whether the teacher's network takes the guidance scale as an
    input, which is part of the conditioning then, for student and discriminator. `noise_levels`: number of
    them in consistency distillation, 0 in other stages.
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
        """The step at `nimg` images. Everything that it needs from the CPU is copied here, before its first
        forward pass: a copy in the middle of a step would wait until the GPU has finished its queue.
        """
        shape = (batch.noise.shape[1], batch.noise.shape[2], batch.noise.shape[3])
        randomness = self.sample_step_randomness(shape, nimg)
        noise, target = (to_device(x, self.device).float() for x in (batch.noise, batch.latents))
        cond = self.encode(batch.prompts)
        if self.embedded_guidance:
            cond = cond.with_guidance(*scales(batch))
        if batch.condition is not None:
            cond = cond.with_prior(batch.condition)
        # A student of its own kind sees its own part of a row's latents.
        if (small := self.student.prior_of(target)) is not None:
            cond = cond.with_prior(small)
        target = self.student.real_view(target)
        student_cond = self.encode_for_student(batch.prompts) if self.encode_for_student else cond
        rows = len(batch.prompts)
        size, first = rows // self.microbatches, process_group.rank() * rows
        clip_text, clip_texts = self._clip_texts(batch.prompts, size)
        microbatches = [
            self._microbatch(
                batch,
                noise,
                target,
                cond,
                student_cond,
                slice(start, start + size),
                first + start,
                shape,
                randomness,
                None if clip_text is None else clip_text[start : start + size],
                clip_texts,
            )
            for start in range(0, rows, size)
        ]
        return microbatches, randomness

    def _clip_texts(self, prompts: Sequence[str], size: int) -> tuple[Tensor | None, Tensor | None]:
        """Unit vectors for guidance by CLIP, encoded in parts of `size`: of this process's prompts, and for
        the contrastive form of the whole batch; None where they are not needed."""
        guide = self.clip_guidance
        if guide is None:
            return None, None
        parts = [guide.encode(prompts[start : start + size]) for start in range(0, len(prompts), size)]
        own = torch.cat(parts)
        return own, process_group.join_rows(own) if guide.contrastive else None

    def sample_step_randomness(self, shape: tuple[int, int, int], nimg: int) -> StepRandomness:
        """The random numbers of the step at `nimg` images. Each kind has its own stream: switching one off
        does not change the others.
        """

        def stream(kind: StepStream) -> torch.Generator:
            return generator(self.seed, nimg, kind)

        size, gan = self.batch_size, self.gan
        levels, draws, penalized_rows = None, None, list[int]()
        if gan is not None:
            if count := DISCRIMINATORS[gan.discriminator].draws:
                draws = torch.randint(2**24, (3, size, count), generator=stream(StepStream.VIEWS))
            levels = self.noise_augment.levels(size, stream(StepStream.NOISE_LEVELS))
            if gan.active_penalty == "single":
                penalized_rows = sample_penalty_rows(size, gan.r1_rows, stream(StepStream.PENALTY_ROWS))
        consistency_levels = None
        if self.noise_levels:
            rng = stream(StepStream.CONSISTENCY_LEVELS)
            consistency_levels = torch.randint(1, self.noise_levels, (size,), generator=rng)
        return StepRandomness(
            transforms=self.regression.draw(size, shape, stream(StepStream.TRANSFORMS)),
            mix=torch.rand(size, generator=stream(StepStream.MIX)),
            levels=levels,
            draws=draws,
            penalized_rows=penalized_rows,
            clip_crops=torch.rand(size, 2, generator=stream(StepStream.GUIDANCE_CROPS)),
            consistency_levels=consistency_levels,
            nimg=nimg,
        )

    def _microbatch(
        self,
        batch: PairBatch,
        noise: Tensor,
        target: Tensor,
        cond: Conditioning,
        student_cond: Conditioning,
        local_rows: slice,
        first: int,
        shape: tuple[int, int, int],
        randomness: StepRandomness,
        clip_text: Tensor | None,
        clip_texts: Tensor | None,
    ) -> MicroBatch:
        """Some of this process's rows; `first`: number of the first one in the whole batch."""
        gan, device, student = self.gan, self.device, self.student
        # Numbers of the rows: within the batch, and since the start of the run.
        prompts = list(batch.prompts[local_rows])
        batch_rows = slice(first, first + len(prompts))
        rows = range(randomness.nimg + batch_rows.start, randomness.nimg + batch_rows.stop)
        # Mismatched rows, and the noise of the approximated penalty.
        fraction, shares = (0.0, (1.0, 1.0, 1.0))
        r1_noise = None
        if gan is not None:
            fraction, shares = gan.mix_fraction, (gan.mix_x, gan.mix_c, gan.mix_z)
            if gan.active_penalty == "approx":
                r1_noise = row_noise(generator(self.seed, Stream.R1_NOISE).initial_seed(), rows, shape)
        # Noise of consistency distillation: new for each visit of an image.
        levels_of_rows, consistency_noise = randomness.consistency_levels, None
        if levels_of_rows is not None:
            consistency_noise = row_noise(
                generator(self.seed, Stream.CONSISTENCY_NOISE).initial_seed(), rows, shape
            )
        own_noise = None
        if student.own_noise:
            seed = generator(self.seed, Stream.GENERATOR_NOISE).initial_seed()
            own_noise = to_device(row_noise(seed, rows, student.noise_shape), device)
        # Take this micro-batch's part of the random numbers, and copy it to the device.
        mix_mode, mix_partner = sample_mismatches(prompts, fraction, randomness.mix[batch_rows], shares)
        transforms, levels = randomness.transforms, randomness.levels
        return MicroBatch(
            prompts=prompts,
            noise=noise[local_rows],
            student_noise=noise[local_rows] if own_noise is None else own_noise,
            target=target[local_rows],
            cond=cond[local_rows],
            student_cond=student_cond[local_rows],
            guidance=()
            if self.embedded_guidance
            else tuple(to_device(t[local_rows], device) for t in scales(batch)),
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
            clip_text=clip_text,
            clip_texts=clip_texts,
            clip_crops=to_device(
                None if self.clip_guidance is None else randomness.clip_crops[batch_rows], device
            ),
        )


def penalty_batches(
    microbatches: Sequence[MicroBatch], randomness: StepRandomness, penalty: Penalty
) -> list[tuple[DiscriminatorInput, DiscriminatorInput, float]]:
    """(real, fake, weight in the mean over processes) of each pass of a gradient penalty on this process. All
    processes have the same number of passes, because sharded networks are gathered by all together.

    A pass of the single-sample form is one row. A process with fewer drawn rows than another one repeats its
    first row with weight 0.
    """
    if penalty != "single":
        return [(m.d_real, m.d_fake, 1 / len(microbatches)) for m in microbatches]
    # Which of the penalized rows lie on this process, as positions in its part of the batch.
    size = len(microbatches[0].prompts)
    local, world = size * len(microbatches), process_group.world_size()
    local_rows = [
        row - process_group.rank() * local
        for row in randomness.penalized_rows
        if row // local == process_group.rank()
    ]
    # Every process takes part in as many passes as the process with most rows.
    passes = max(sum(row // local == rank for row in randomness.penalized_rows) for rank in range(world))
    weight = world / len(randomness.penalized_rows)
    rows = [(row, weight) for row in local_rows] + [(0, 0.0)] * (passes - len(local_rows))
    batches = []
    for row, weight in rows:
        microbatch, position = microbatches[row // size], row % size
        batches.append((microbatch.d_real.row(position), microbatch.d_fake.row(position), weight))
    return batches
