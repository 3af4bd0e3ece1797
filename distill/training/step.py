"""One training step of either stage: the method of Diffusion2GAN.

Symbols: G is the student, D the discriminator. A row is one pair: noise, conditioning and the teacher's
latents. The rows and random numbers of a step are prepared in distill/training/microbatch.py, so nothing here
depends on the number of processes, micro-batches or restarts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from d2g.core.distributed import process_group
from d2g.core.precision import exact_fp32
from distill.config.discriminator import DiscriminatorConfig
from distill.config.optim import OptimConfig
from distill.losses.adversarial import discriminator_loss, generator_loss, mix_and_match
from distill.losses.clip_guidance import ClipGuidance
from distill.losses.gradient_penalty import DiscriminatorInput, approximate_penalty, exact_penalty
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
    """Unweighted loss terms and gradient norms of one step, by the names of stats.jsonl.

    Each value is a scalar tensor on the device. Loss terms are means over the step's micro-batches.
    """

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
        """Add the loss terms of one forward pass, which are means over its rows.

        `weight`: weight of this pass in the step's mean; the default is 1 / microbatches.
        """
        for name, value in terms.items():
            share = value.detach().float()
            share = share / self.microbatches if weight is None else weight * share
            self._values[name] = self._values.get(name, 0) + share

    def set(self, name: str, value: Tensor) -> None:
        """Set a value that belongs to the whole step."""
        self._values[name] = value


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """The objects and settings that a step needs."""

    state: State
    regression: Regression
    noise_augment: NoiseAugmentation
    mix_in_real_images: RealRows
    gan: DiscriminatorConfig
    """Settings of the discriminator and its losses."""
    clip_guidance: ClipGuidance | None
    clip_weight: float
    consistency: ConsistencyTarget | None
    """Of stage cd alone."""
    student_optim: OptimConfig
    batch_size: int
    """Rows of a step, over all ranks."""
    images: int
    """Training images of the whole run, which the learning rate schedule needs."""
    own_generator_passes: bool
    """Whether the student is evaluated separately for each update, instead of once for both."""
    logit_stats: LogitStats
    autocast: Callable[[], AbstractContextManager[None]]
    """Context of forward passes."""
    waiting: Callable[[], AbstractContextManager[None]]
    """Context that measures the time spent waiting for data."""
    stop_updates: Callable[[str, Tensor, LossTerms], Tensor]
    """(name of the gradient, its norm, loss terms) -> fp32 scalar on the device: 1 if the optimizer must skip
    the update, else 0."""


def train_step(
    context: StepContext, microbatches: Sequence[MicroBatch], randomness: StepRandomness
) -> LossTerms:
    """Update D (in the GAN stage), then the student, on the rows of one batch. Returns the loss terms.

    D is updated in every step, the student in every `gan.d_steps_per_g_step`-th. Call it on every rank.
    """
    state, gan = context.state, context.gan
    terms = LossTerms(len(microbatches))
    update_generator = state.discriminator is None or (state.steps + 1) % gan.d_steps_per_g_step == 0
    student: Student = state.student.module  # type: ignore[assignment]
    student.begin_step()

    # Both updates share one forward pass of the student, unless own_generator_passes is set. Gradient
    # accumulation also rules it out: the graphs of all micro-batches would be in memory during D's update.
    reuse_student_pass = len(microbatches) == 1 and update_generator
    reuse_student_pass &= state.discriminator is None or not context.own_generator_passes

    # Generate latents from noise and conditioning in one step.
    if state.discriminator is not None or reuse_student_pass:
        for microbatch in microbatches:
            with torch.set_grad_enabled(reuse_student_pass):
                microbatch.generated = generate(context, microbatch)

    # Update D on these latents, then the student against the updated D.
    if state.discriminator is not None:
        discriminator_step(context, microbatches, randomness, terms)
    if update_generator:
        generator_step(context, microbatches, terms, reuse_student_pass)
    return terms


def generate(context: StepContext, microbatch: MicroBatch) -> Tensor:
    """Evaluate the student once: noise and conditioning of a micro-batch -> scaled latents [b, C, h, w]."""
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
    """Update D to distinguish the teacher's latents from the student's, given noise and text.

    Source: method.md "GAN losses". Sets `d_real` and `d_fake` of the micro-batches.
    """
    state, gan, discriminator = context.state, context.gan, context.state.discriminator
    assert discriminator is not None and state.optim_d is not None
    discriminator.module.requires_grad_(True)
    for microbatch in microbatches:
        set_discriminator_inputs(context, microbatch)

    # R1 is lazy: it is computed in every `penalty_interval`-th step only, and weighted by the interval.
    if gan.active_penalty not in ("none", "approx") and state.steps % gan.penalty_interval == 0:
        penalize_gradients(context, microbatches, randomness, terms)

    # The adversarial loss. The approximate penalty needs no second derivative, so it shares this pass.
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
                    weighted_penalty, values = approximate_penalty(
                        gan, discriminator, real, logits_real, microbatch.r1_noise
                    )
                    loss = loss + weighted_penalty
                    terms.add(values)
            (loss / len(microbatches)).backward(one_or_nan(loss))

    # One optimizer step. D stays frozen until the next D step, also while G's loss goes through it.
    update_network(context, "grad/d", terms)
    discriminator.module.requires_grad_(False)


def penalize_gradients(
    context: StepContext, microbatches: Sequence[MicroBatch], randomness: StepRandomness, terms: LossTerms
) -> None:
    """Add the gradient of the exact penalty (R1, or R1 + R2) to D's gradients (method.md "Single-sample R1").

    The penalty needs second derivatives, so it has forward passes of its own, in fp32 and on the bare module:
    DDP averages one backward pass per step, and FSDP2 frees weights that the second derivative needs.
    """
    gan, discriminator = context.gan, context.state.discriminator
    assert discriminator is not None
    with discriminator.bare_module() as bare_discriminator, exact_fp32(microbatches[0].noise.device):
        for real, fake, weight in penalty_batches(microbatches, randomness, gan.active_penalty):
            loss, values = exact_penalty(gan, bare_discriminator, real, fake)
            loss = weight * loss
            loss.backward(one_or_nan(loss))
            terms.add(values, weight)


def set_discriminator_inputs(context: StepContext, microbatch: MicroBatch) -> None:
    """Set the inputs `d_real` and `d_fake` of D for a micro-batch.

    Real rows are the teacher's latents; `gan.real` replaces some of them by photographs. Fake rows are the
    student's latents; mix-and-match replaces some of them by real latents with mismatched conditions
    (method.md "Mix-and-match augmentation").
    """
    # Replace some fake rows by mismatched real ones.
    latents, noise, cond = mix_and_match(
        microbatch.generated.detach(),
        microbatch.target,
        microbatch.noise,
        microbatch.cond,
        microbatch.mix_mode,
        microbatch.mix_partner,
    )
    # Replace some real rows by photographs.
    draws_real, draws_fake, _ = microbatch.draws
    real = DiscriminatorInput(microbatch.target, microbatch.noise, microbatch.cond, microbatch.t, draws_real)
    with context.waiting():
        real = context.mix_in_real_images(real, microbatch.rows)
    # Add noise to both, if gan.noise_augment is set.
    noise_real, noise_fake = microbatch.augment_noise
    augment = context.noise_augment
    microbatch.d_real = replace(real, latents=augment(real.latents, microbatch.t, noise_real))
    latents = augment(latents, microbatch.t, noise_fake)
    microbatch.d_fake = DiscriminatorInput(latents, noise, cond, microbatch.t, draws_fake)


def generator_step(
    context: StepContext, microbatches: Sequence[MicroBatch], terms: LossTerms, reuse_student_pass: bool
) -> None:
    """Update the student and its moving average on a weighted sum of losses of its latents.

    The losses: regression to the teacher's latents, in the GAN stage the adversarial loss of the frozen D
    (method.md "GAN losses"), and CLIP guidance if it has a weight.
    """
    state, gan = context.state, context.gan
    gradients: Sequence[Tensor] = ()
    if gan.adaptive_weight and state.discriminator is not None:
        gradients = adaptively_weighted_gradients(context, microbatches, terms)
    for number, microbatch in enumerate(microbatches):
        with state.student.no_sync(number < len(microbatches) - 1):
            if not reuse_student_pass:
                microbatch.generated = generate(context, microbatch)

            # Backward in two parts: D's graph is freed before the student's backward pass begins.
            gradient = (
                gradients[number] if gradients else weighted_gradient(context, number, microbatch, terms)
            )
            microbatch.generated.backward(gradient / len(microbatches))

    # Optimizer step, then the moving average.
    update_network(context, "grad/g", terms)
    state.student.module.after_update(state.steps)  # type: ignore[operator]
    state.ema.update(state.student.module, state.nimg + context.batch_size)


def student_losses(
    context: StepContext, number: int, microbatch: MicroBatch, latents: Tensor
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Compute the student's losses of its latents [b, C, h, w].

    Returns (the weighted sum of regression and CLIP guidance, the GAN loss without its weight or None in the
    regression stage, all unweighted losses by name). `number`: position of the micro-batch in the step.
    """
    loss, values = context.regression(latents, microbatch.target, microbatch.transforms)
    gan_loss = None
    if context.state.discriminator is not None:
        gan_loss = values["loss/g_gan"] = adversarial_loss(context, number, microbatch, latents)
    if context.clip_guidance is not None:
        with context.autocast():
            values["loss/clip"] = context.clip_guidance(
                latents, microbatch.clip_text, microbatch.clip_crops, microbatch.clip_texts
            )
        loss = loss + context.clip_weight * values["loss/clip"]
    return loss, gan_loss, values


def weighted_gradient(context: StepContext, number: int, microbatch: MicroBatch, terms: LossTerms) -> Tensor:
    """Compute the gradient [b, C, h, w] of the weighted sum of losses with respect to the student's latents.

    Detached latents end the graphs of the losses before the student.
    """
    latents = microbatch.generated.detach().requires_grad_()
    loss, gan_loss, values = student_losses(context, number, microbatch, latents)
    if gan_loss is not None:
        loss = loss + context.gan.weight * gan_loss
    terms.add({**values, "loss/g": loss})
    (gradient,) = torch.autograd.grad(loss, latents, one_or_nan(loss))
    return gradient


def adaptively_weighted_gradients(
    context: StepContext, microbatches: Sequence[MicroBatch], terms: LossTerms
) -> list[Tensor]:
    """Compute the gradients of each micro-batch's losses, with an adaptive weight of the GAN loss.

    The weight is `gan.weight` |grad L| / (|grad L_GAN| + 1e-6), where L are the other losses (Esser et al.
    2021, eq. 7, which takes the gradients of the last layer; here they are those of the student's latents).
    The norms are over all rows of the step, so the losses come before the student's passes with gradients.
    `terms` receives the weight as `gan/weight`.
    """
    losses, gradients = [], []
    for number, microbatch in enumerate(microbatches):
        latents = microbatch.generated.detach().requires_grad_()
        loss, gan_loss, values = student_losses(context, number, microbatch, latents)
        assert gan_loss is not None
        terms.add(values)
        losses.append((loss.detach(), gan_loss.detach()))
        gradients.append([torch.autograd.grad(x, latents, one_or_nan(x))[0] for x in (loss, gan_loss)])

    # The norms of the gradients of the means over all rows of the step, of all processes.
    squares = [torch.stack([grad.float().square().sum() for grad in both]) for both in gradients]
    parts = len(microbatches) * process_group.world_size()
    norm, gan_norm = process_group.sum_in_order(torch.stack(squares).sum(0)).sqrt() / parts
    weight = context.gan.weight * norm / (gan_norm + 1e-6)
    terms.set("gan/weight", weight)
    terms.add({"loss/g": torch.stack([loss + weight * gan_loss for loss, gan_loss in losses]).mean()}, 1.0)
    return [gradient + weight * gan_gradient for gradient, gan_gradient in gradients]


def adversarial_loss(context: StepContext, number: int, microbatch: MicroBatch, latents: Tensor) -> Tensor:
    """Compute the student's adversarial loss on its latents [b, C, h, w] with a frozen D: a scalar in fp32.

    `number`: position of the micro-batch in the step, for the logit statistics.
    """
    gan, discriminator = context.gan, context.state.discriminator
    assert discriminator is not None
    with context.autocast():
        augmented = context.noise_augment(latents, microbatch.t, microbatch.augment_noise[1])
        inputs = DiscriminatorInput(
            augmented, microbatch.noise, microbatch.cond, microbatch.t, microbatch.draws[2]
        )
        logits_fake = discriminator.forward_frozen(*inputs.args)
        logits_real = None
        if gan.loss == "rpgan":  # a relativistic loss compares with the logits of the real rows
            with torch.no_grad():
                logits_real = discriminator.forward_frozen(*microbatch.d_real.args)
    context.logit_stats.add(number, student=logits_fake)
    return generator_loss(logits_fake, gan.loss, gan.head_reduction, logits_real, gan.part_weights)


def one_or_nan(loss: Tensor) -> Tensor:
    """Return the initial gradient of a backward pass: 1, or NaN if the loss is not finite.

    A loss can overflow while its gradient stays finite. The NaN reaches the gradient norm, which is equal on
    all ranks, so all ranks stop without exchanging their losses.
    """
    return loss.detach() * 0 + 1


def update_network(context: StepContext, name: str, terms: LossTerms) -> None:
    """Take one optimizer step of D (`name` "grad/d") or of the student ("grad/g").

    The step is skipped if a loss or gradient of this step, or of an earlier one, was not finite. `terms`
    receives the gradient norm under `name`.
    """
    state = context.state
    if name == "grad/d":
        assert state.optim_d is not None and state.discriminator is not None
        optim, network, config = state.optim_d, state.discriminator, context.gan.optim
    else:
        optim, network, config = state.optim_g, state.student, context.student_optim
    lr = learning_rate(state.nimg, config, context.batch_size, context.images)
    norm = update(optim, network, config, lr, lambda norm: context.stop_updates(name, norm, terms))
    terms.set(name, norm)
