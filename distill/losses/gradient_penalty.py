"""Gradient penalties of the discriminator.

Available forms: R1 on sampled single real rows (method.md "Single-sample R1"), R1 on all real rows, R1 + R2
(R3GAN), and the approximation of APT, which needs no second derivative.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from d2g.diffusion.conditioning import Conditioning
from distill.config.discriminator import DiscriminatorConfig
from distill.config.regression import Reduction
from distill.losses.adversarial import Logits, by_discriminator, weighted_sum

DiscriminatorFn = Callable[..., dict[str, Tensor]]
"""A discriminator, possibly wrapped: (*DiscriminatorInput.args) -> logits [B, 1, h_s, w_s] by head."""


@dataclass(frozen=True)
class DiscriminatorInput:
    """Inputs of the discriminator for B rows: scaled latents and noise [B, C, h, w], and the conditioning.

    t [B]: the time input; with None, D uses its constant timestep. draws [B, n]: random integers that choose
    crop and augmentation, for discriminators on pixels (`DiscriminatorKind.draws`).
    """

    latents: Tensor
    noise: Tensor
    cond: Conditioning
    t: Tensor | None = None
    draws: Tensor | None = None

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments of the discriminator's forward pass."""
        return (
            *(self.latents, self.noise, self.cond, self.t),
            *(() if self.draws is None else (self.draws,)),
        )

    def row(self, number: int) -> "DiscriminatorInput":
        """Return row `number` as a batch of size one."""
        rows = slice(number, number + 1)
        t, draws = (None if x is None else x[rows] for x in (self.t, self.draws))
        return DiscriminatorInput(self.latents[rows], self.noise[rows], self.cond[rows], t, draws)


def sample_penalty_rows(rows: int, count: int, generator: torch.Generator) -> list[int]:
    """Sample the rows on which single-sample R1 is computed: `count` numbers in [0, rows), ascending.

    The batch of `rows` rows is cut into `count` equal parts and one row is sampled from each, so that the
    penalty is balanced over ranks. `count` must divide `rows`.
    """
    size = rows // count
    return (size * torch.arange(count) + torch.randint(size, (count,), generator=generator)).tolist()


def exact_penalty(
    config: DiscriminatorConfig,
    discriminator: DiscriminatorFn,
    real: DiscriminatorInput,
    fake: DiscriminatorInput,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute R1, or R1 + R2, with second derivatives: (weighted term of D's loss, unweighted terms to log).

    All are scalars. The weight is gamma / 2 * interval (lazy regularization of StyleGAN2; method.md
    "Single-sample R1"). For the single-sample form, pass one row of `sample_penalty_rows` at a time.
    """
    assert config.active_penalty in ("single", "full", "r1r2")
    lazy = 0.5 * config.r1_gamma * config.r1_interval
    terms = {"loss/r1": _squared_gradient_norm(discriminator, real, config.r1_reduction)}
    if config.active_penalty == "r1r2":
        terms["loss/r2"] = _squared_gradient_norm(discriminator, fake, config.r1_reduction)
    return lazy * torch.stack(list(terms.values())).sum(), terms


def _squared_gradient_norm(
    discriminator: DiscriminatorFn, batch: DiscriminatorInput, reduction: Reduction
) -> Tensor:
    return r1_penalty(
        discriminator, batch.latents, batch.noise, batch.cond, batch.t, reduction, draws=batch.draws
    )


def r1_penalty(
    discriminator: DiscriminatorFn,
    x: Tensor,
    noise: Tensor,
    text: Conditioning,
    t: Tensor | None = None,
    reduction: Reduction = "mean",
    draws: Tensor | None = None,
) -> Tensor:
    """Compute ||grad_x s||^2, averaged over rows (method.md "Single-sample R1").

    The score s of a row is the sum over heads of the mean or sum (`reduction`) of the logits over positions.
    On real rows this is R1, on fake rows R2. x and noise are [B, C, h, w], text holds B rows, t is [B] or
    None, draws [B, n] or None; the single-sample form of the paper has B = 1. Returns a scalar in fp32, or in
    float64 for a float64 `x`.

    Of two discriminators, each has its own score, and their penalties are added. The gradient also flows
    through the resized copies of x inside D; noise and text are constants. Call this function, and the
    backward pass of its result, in the context `d2g.core.precision.exact_fp32`.
    """
    # Flash and memory-efficient attention have no second derivative: use the math kernel, without autocast
    # (pytorch.md "Second derivative of attention").
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = x.detach().to(dtype).requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(x.device.type, enabled=False):
        inputs = DiscriminatorInput(x, noise.detach().to(dtype), text.detach().to(dtype), t, draws)
        logits = discriminator(*inputs.args)
        # The score of each row, by head.
        dims = (1, 2, 3)
        scores = {h: v.sum(dims) if reduction == "sum" else v.mean(dims) for h, v in logits.items()}
        # Rows are independent, so the gradient of the sum holds the gradient of each row.
        norms = []
        for head_scores in by_discriminator(scores).values():
            (gradient,) = torch.autograd.grad(torch.stack(head_scores).sum(), x, create_graph=True)
            norms.append(gradient.square().sum(dim=dims).mean())
    return norms[0] if len(norms) == 1 else torch.stack(norms).sum()


def approximate_penalty(
    config: DiscriminatorConfig,
    discriminator: DiscriminatorFn,
    real: DiscriminatorInput,
    logits: Logits,
    eps: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the approximate R1 of APT: (weighted term of D's loss, unweighted value to log), scalars.

    logits: D's logits on `real`. eps [B, C, h, w] ~ N(0, 1): the perturbation, before `approx_sigma` scales
    it.
    """
    perturbed = replace(real, latents=real.latents + config.approx_sigma * eps.to(real.latents))
    perturbed_logits = discriminator(*perturbed.args)
    value = approximate_r1(logits, perturbed_logits, config.head_reduction)
    return config.approx_weight * value, {"loss/r1_approx": value}


def approximate_r1(clean: Logits, perturbed: Logits, reduction: Reduction = "mean") -> Tensor:
    """Compute (D(x) - D(x + N(0, sigma^2)))^2, mean over rows and positions, reduced over heads.

    `clean` and `perturbed` are the logits of x and of x with noise. For small sigma the expectation is
    sigma^2 times the squared gradient norm of a logit. Source: APT, section 3.3.
    """
    return weighted_sum(
        {h: (clean[h].float() - perturbed[h].float()).square().mean() for h in clean}, reduction
    )
