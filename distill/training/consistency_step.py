"""The student's update in consistency distillation (Song et al. 2023, Algorithm 2; method.md "Consistency
distillation")."""

from collections.abc import Sequence

import torch

from distill.models.row_dropout import set_dropout_keys
from distill.training.microbatch import MicroBatch, StepRandomness
from distill.training.step import LossTerms, StepContext, one_or_nan, update_network


def consistency_step(
    context: StepContext, microbatches: Sequence[MicroBatch], randomness: StepRandomness
) -> LossTerms:
    """Make the student agree at neighboring noise levels of the teacher's trajectories; returns the loss
    terms. What it needs of the step's random numbers lies in the micro-batches."""
    state, consistency, terms = context.state, context.consistency, LossTerms(len(microbatches))
    assert consistency is not None
    for number, microbatch in enumerate(microbatches):
        student, level = state.student, microbatch.consistency_level
        assert level is not None and microbatch.consistency_noise is not None
        if microbatch.dropout_keys is not None:  # the same masks for the student and its target
            set_dropout_keys(student.module, microbatch.dropout_keys)
        with student.no_sync(number < len(microbatches) - 1):
            # The image with noise, and one step of the teacher towards it.
            sigma = consistency.sigmas[level]
            noisy = microbatch.target + sigma.view(-1, 1, 1, 1) * microbatch.consistency_noise
            with torch.no_grad(), context.autocast():
                earlier = consistency.previous(noisy, level, microbatch.cond)
                target = student(earlier, microbatch.cond, None, consistency.sigmas[level - 1])
            # The student comes last: recomputation in its backward pass reads its time input again. It has an
            # autocast context of its own: with torch 2.9 it would take the target's weights, which were
            # cast without a gradient.
            with context.autocast():
                generated = student(noisy, microbatch.cond, None, sigma)
            microbatch.generated = generated
            loss, values = context.regression(generated, target, microbatch.transforms)
            terms.add({**values, "loss/g": loss})
            (loss / len(microbatches)).backward(one_or_nan(loss))
    update_network(context, "grad/g", terms)
    state.ema.update(state.student.module, state.nimg + context.batch_size)
    return terms
