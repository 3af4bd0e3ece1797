"""Gradient penalties of the discriminator, with attention that has a second derivative.

Forms: R1 of one real row (method.md "Single-sample R1") or of all, R1 and R2 (R3GAN), and APT's
approximation, which needs no second derivative.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from d2g.diffusion.conditioning import Conditioning
from distill.config.components import DiscriminatorConfig, Reduction
from distill.losses.adversarial import Logits, reduced

DiscriminatorFn = Callable[[Tensor, Tensor, Conditioning, Tensor | None], dict[str, Tensor]]
"""A Discriminator, or a wrapper of one: (x, noise, text, t) -> logits per head."""


@dataclass(frozen=True)
class DiscriminatorInput:
    """What D sees: scaled latents and noise [B, C, h, w], conditioning, and time [B] (None: D's constant)."""

    latents: Tensor
    noise: Tensor
    cond: Conditioning
    t: Tensor | None = None

    def row(self, number: int) -> "DiscriminatorInput":
        """One row, as a batch of one."""
        one = slice(number, number + 1)
        t = None if self.t is None else self.t[one]
        return DiscriminatorInput(self.latents[one], self.noise[one], self.cond[one], t)


def drawn_rows(rows: int, count: int, generator: torch.Generator) -> list[int]:
    """The rows that single-sample R1 falls on: one from each of `count` equal parts of a batch of `rows`, so
    that no process has many more than another. `count` divides `rows`.
    """
    part = rows // count
    return (part * torch.arange(count) + torch.randint(part, (count,), generator=generator)).tolist()


def penalty(
    config: DiscriminatorConfig,
    discriminator: DiscriminatorFn,
    real: DiscriminatorInput,
    fake: DiscriminatorInput,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a step adds to D's loss where a penalty of second order is due, and its unweighted parts for the
    log. The weight is gamma / 2 x interval (StyleGAN2's lazy regularisation; method.md "Single-sample R1").
    Of the single-sample form the rows are those of `drawn_rows`, one at a time.
    """
    assert config.active_penalty in ("single", "full", "r1r2")
    lazy = 0.5 * config.r1_gamma * config.r1_interval
    parts = {"loss/r1": _of(discriminator, real, config.r1_reduction)}
    if config.active_penalty == "r1r2":
        parts["loss/r2"] = _of(discriminator, fake, config.r1_reduction)
    return lazy * torch.stack(list(parts.values())).sum(), parts


def _of(discriminator: DiscriminatorFn, batch: DiscriminatorInput, reduction: Reduction) -> Tensor:
    return r1_penalty(discriminator, batch.latents, batch.noise, batch.cond, batch.t, reduction)


def r1_penalty(
    discriminator: DiscriminatorFn,
    x: Tensor,
    noise: Tensor,
    text: Conditioning,
    t: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """||grad_x s||^2 with s = sum over heads of the logits' mean, or sum, over positions (method.md
    "Single-sample R1"), mean over the rows given, fp32. Real rows give R1, fake ones R2.

    x, noise: [B, C, h, w], text of B rows; B = 1 for the paper's single-sample form. The gradient also flows
    through D's resized copies of x; noise and text are constants. Flash and memory-efficient attention have
    no second derivative, so the forward runs with the math kernel (method.md "Second derivative of
    attention"), outside autocast. float64 stays float64.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = x.detach().to(dtype).requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(x.device.type, enabled=False):
        logits = discriminator(x, noise.detach().to(dtype), text.detach().to(dtype), t)
        over = (1, 2, 3)
        heads = [v.sum(over) if reduction == "sum" else v.mean(over) for v in logits.values()]
        (gradient,) = torch.autograd.grad(torch.stack(heads).sum(), x, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def approximation(
    config: DiscriminatorConfig,
    discriminator: DiscriminatorFn,
    real: DiscriminatorInput,
    logits: Logits,
    eps: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """APT's term of D's loss, and it unweighted for the log. logits: D's of `real`; eps [B, C, h, w] ~
    N(0, 1)."""
    logits_moved = discriminator(
        real.latents + config.approx_sigma * eps.to(real.latents), real.noise, real.cond, real.t
    )
    value = approximate_r1(logits, logits_moved, config.head_reduction)
    return config.approx_weight * value, {"loss/r1_approx": value}


def approximate_r1(clean: Logits, logits_moved: Logits, reduction: Reduction = "mean") -> Tensor:
    """(D(x) - D(x + N(0, sigma^2)))^2, mean over rows and positions, then over heads (APT 3.3). Its
    expectation for small sigma is sigma^2 times the squared gradient norm of a logit."""
    return reduced([(clean[h].float() - logits_moved[h].float()).square().mean() for h in clean], reduction)
