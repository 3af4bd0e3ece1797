"""One training step of either stage: the method of Diffusion2GAN.

The random numbers and the rows of a step are prepared in distill/training/microbatch.py, so that nothing here
depends on the number of processes, micro-batches or restarts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from d2g.core.precision import exact_fp32
from distill.config.discriminator import DiscriminatorConfig
from distill.config.optim import OptimConfig
from distill.losses.adversarial import discriminator_loss, generator_loss, mix_and_match
from distill.losses.clip_guidance import ClipGuidance
from distill.losses.gradient_penalty import DiscriminatorInput, approximation, penalty
from distill.losses.noise_augmentation import NoiseAugmentation
from distill.losses.regression.regression import Regression
from distill.models.consistency import ConsistencyTarget
from distill.models.row_dropout import set_dropout_keys
from distill.models.student import Student
from distill.training.logit_stats import LogitStats
from distill.training.microbatch import MicroBatch, StepRandomness, penalty_batches
from distill.training.optim import learning_rate, update
from distill.training.real_rows import RealRows
from distill.training.state import State


class LossTerms(Mapping[str, Tensor]):
    """Unweighted loss terms of a step by name, as means over its micro-batches, and gradient norms."""

    def __init__(self, microbatches: int) -> None:
        self.microbatches = microbatches
        self._values: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def add(self, terms: Mapping[str, Tensor], weight: float | None = None) -> None:
        """Add terms of one pass. `weight`: of the pass in the mean, 1 / microbatches unless given."""
        for name, value in terms.items():
            share = value.detach().float()
            share = share / self.microbatches if weight is None else weight * share
            self._values[name] = self._values.get(name, 0) + share

    def set(self, name: str, value: Tensor) -> None:
        """Set a value that belongs to the whole step."""
        self._values[name] = value


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """The objects and settings that a step needs.

    images: the length of the run. own_generator_passes: whether the student is evaluated once for each
    update. stop_updates(name, gradient_norm, terms): 1 on the device where an update must not happen.
    waiting: counts time that is spent on waiting for data.
    """

    state: State
    regression: Regression
    noise_augment: NoiseAugmentation
    mix_in_real_images: RealRows
    gan: DiscriminatorConfig
    clip_guidance: ClipGuidance | None
    clip_weight: float
    consistency: ConsistencyTarget | None
    student_optim: OptimConfig
    batch_size: int
    images: int
    own_generator_passes: bool
    logit_stats: LogitStats
    autocast: Callable[[], AbstractContextManager[None]]
    waiting: Callable[[], AbstractContextManager[None]]
    stop_updates: Callable[[str, Tensor, LossTerms], Tensor]


def train_step(
    context: StepContext, microbatches: Sequence[MicroBatch], randomness: StepRandomness
) -> LossTerms:
    """Update D (second stage) and the student on the rows of one batch; returns the loss terms.

    The student is updated in every step, or in every `gan.d_steps_per_g_step`-th one.
    """
    state, gan = context.state, context.gan
    terms = LossTerms(len(microbatches))
    update_generator = state.discriminator is None or (state.steps + 1) % gan.d_steps_per_g_step == 0
    student: Student = state.student.module  # type: ignore[assignment]
    student.begin_step()
    # One forward pass serves both updates, unless gradients are accumulated or each is to have its own.
    reuse_student_pass = len(microbatches) == 1 and update_generator
    reuse_student_pass &= state.discriminator is None or not context.own_generator_passes

    # Generate from noise and conditioning in one step.
    if state.discriminator is not None or reuse_student_pass:
        for microbatch in microbatches:
            with torch.set_grad_enabled(reuse_student_pass):
                microbatch.generated = generate(context, microbatch)

    if state.discriminator is not None:
        discriminator_step(context, microbatches, randomness, terms)
    if update_generator:
        generator_step(context, microbatches, terms, reuse_student_pass)
    return terms


def generate(context: StepContext, microbatch: MicroBatch) -> Tensor:
    """The student's latents [b, C, h, w] for the noise and the conditioning of a micro-batch."""
    student = context.state.student
    if microbatch.dropout_keys is not None:
        set_dropout_keys(student.module, microbatch.dropout_keys)
    with context.autocast():
        latents: Tensor = student(microbatch.student_noise, microbatch.student_cond, *microbatch.guidance)
    return latents


def discriminator_step(
    context: StepContext,
    microbatches: Sequence[MicroBatch],
    randomness: StepRandomness,
    terms: LossTerms,
) -> None:
    """Update D to tell the teacher's latents from the student's, given noise and text (method.md "GAN
    losses")."""
    state, gan, discriminator = context.state, context.gan, context.state.discriminator
    assert discriminator is not None and state.optim_d is not None
    discriminator.module.requires_grad_(True)
    for microbatch in microbatches:
        set_discriminator_inputs(context, microbatch)

    if gan.active_penalty not in ("none", "approx") and state.steps % gan.penalty_interval == 0:
        penalize_gradients(context, microbatches, randomness, terms)

    # The adversarial loss, and the approximated penalty, which needs no second derivative.
    for number, microbatch in enumerate(microbatches):
        with discriminator.no_sync(number < len(microbatches) - 1):
            with context.autocast():
                real, fake = microbatch.d_real, microbatch.d_fake
                logits_real, logits_fake = discriminator(*real.args), discriminator(*fake.args)
                loss = discriminator_loss(
                    logits_real, logits_fake, gan.loss, gan.head_reduction, gan.part_weights
                )
                terms.add({"loss/d": loss})
                context.logit_stats.add(number, real=logits_real, fake=logits_fake)
                if microbatch.r1_noise is not None:
                    approximate, values = approximation(
                        gan, discriminator, real, logits_real, microbatch.r1_noise
                    )
                    loss = loss + approximate
                    terms.add(values)
            (loss / len(microbatches)).backward(one_or_nan(loss))

    update_network(context, "grad/d", terms)
    discriminator.module.requires_grad_(False)


def penalize_gradients(
    context: StepContext, microbatches: Sequence[MicroBatch], randomness: StepRandomness, terms: LossTerms
) -> None:
    """Backward pass of the exact gradient penalty. It has forward passes of its own, which are differentiated
    twice (method.md "Single-sample R1")."""
    gan, discriminator = context.gan, context.state.discriminator
    assert discriminator is not None
    with discriminator.bare_module() as bare_discriminator, exact_fp32(microbatches[0].noise.device):
        for real, fake, weight in penalty_batches(microbatches, randomness, gan.active_penalty):
            loss, values = penalty(gan, bare_discriminator, real, fake)
            loss = weight * loss
            loss.backward(one_or_nan(loss))
            terms.add(values, weight)


def set_discriminator_inputs(context: StepContext, microbatch: MicroBatch) -> None:
    """What D sees of a micro-batch: real rows, some of them photographs if configured, and generated rows,
    some of them replaced by mismatched real ones (method.md "Mix-and-match augmentation")."""
    latents, noise, cond = mix_and_match(
        microbatch.generated.detach(),
        microbatch.target,
        microbatch.noise,
        microbatch.cond,
        microbatch.mix_mode,
        microbatch.mix_partner,
    )
    draws_real, draws_fake, _ = microbatch.draws
    real = DiscriminatorInput(microbatch.target, microbatch.noise, microbatch.cond, microbatch.t, draws_real)
    with context.waiting():
        real = context.mix_in_real_images(real, microbatch.rows)
    noise_real, noise_fake = microbatch.augment_noise
    augment = context.noise_augment
    microbatch.d_real = replace(real, latents=augment(real.latents, microbatch.t, noise_real))
    latents = augment(latents, microbatch.t, noise_fake)
    microbatch.d_fake = DiscriminatorInput(latents, noise, cond, microbatch.t, draws_fake)


def generator_step(
    context: StepContext, microbatches: Sequence[MicroBatch], terms: LossTerms, reuse_student_pass: bool
) -> None:
    """Update the student: regression to the teacher's latents, plus the adversarial loss of D on the same
    latents (method.md "GAN losses"), and guidance by CLIP if it has a weight."""
    state, gan, discriminator = context.state, context.gan, context.state.discriminator
    for number, microbatch in enumerate(microbatches):
        with state.student.no_sync(number < len(microbatches) - 1):
            if not reuse_student_pass:
                microbatch.generated = generate(context, microbatch)
            # Losses of the latents: regression, the adversarial loss, guidance by CLIP.
            latents = microbatch.generated.detach().requires_grad_()
            loss, values = context.regression(latents, microbatch.target, microbatch.transforms)
            if discriminator is not None:
                values["loss/g_gan"] = adversarial_loss(context, number, microbatch, latents)
                loss = loss + gan.weight * values["loss/g_gan"]
            if context.clip_guidance is not None:
                with context.autocast():
                    values["loss/clip"] = context.clip_guidance(
                        latents, microbatch.clip_text, microbatch.clip_crops, microbatch.clip_texts
                    )
                loss = loss + context.clip_weight * values["loss/clip"]
            terms.add({**values, "loss/g": loss})
            # Backward in two parts: D's graph is freed before the student's backward pass begins.
            (grad_latents,) = torch.autograd.grad(loss, latents, one_or_nan(loss))
            microbatch.generated.backward(grad_latents / len(microbatches))
    update_network(context, "grad/g", terms)
    state.student.module.after_update(state.steps)  # type: ignore[operator]
    state.ema.update(state.student.module, state.nimg + context.batch_size)


def adversarial_loss(context: StepContext, number: int, microbatch: MicroBatch, latents: Tensor) -> Tensor:
    """The student's adversarial loss on its latents [b, C, h, w], by a frozen D."""
    gan, discriminator = context.gan, context.state.discriminator
    assert discriminator is not None
    with context.autocast():
        augmented = context.noise_augment(latents, microbatch.t, microbatch.augment_noise[1])
        inputs = DiscriminatorInput(
            augmented, microbatch.noise, microbatch.cond, microbatch.t, microbatch.draws[2]
        )
        logits_fake = discriminator.forward_frozen(*inputs.args)
        logits_real = None
        if gan.loss == "rpgan":  # compares with the real rows
            with torch.no_grad():
                logits_real = discriminator.forward_frozen(*microbatch.d_real.args)
    context.logit_stats.add(number, student=logits_fake)
    return generator_loss(logits_fake, gan.loss, gan.head_reduction, logits_real, gan.part_weights)


def one_or_nan(loss: Tensor) -> Tensor:
    """The gradient of a loss with respect to itself: 1, or NaN if the loss is not finite.

    A loss can overflow where its gradient does not. NaN reaches the gradient norm, which is the same on every
    rank, so that all ranks stop without an exchange of their losses.
    """
    return loss.detach() * 0 + 1


def update_network(context: StepContext, name: str, terms: LossTerms) -> None:
    """One optimizer step of D ("grad/d") or of the student ("grad/g"), unless a loss or gradient since the
    start of the run was not finite."""
    state = context.state
    if name == "grad/d":
        assert state.optim_d is not None and state.discriminator is not None
        optim, network, config = state.optim_d, state.discriminator, context.gan.optim
    else:
        optim, network, config = state.optim_g, state.student, context.student_optim
    lr = learning_rate(state.nimg, config, context.batch_size, context.images)
    norm = update(optim, network, config, lr, lambda norm: context.stop_updates(name, norm, terms))
    terms.set(name, norm)
