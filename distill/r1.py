"""Single-sample R1: the gradient penalty on one real row, with attention that has a second derivative."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.discriminator import Discriminator


def r1_penalty(discriminator: Discriminator, real: Tensor, noise: Tensor, text: Tensor) -> Tensor:
    """||grad_x s||^2 with s = sum over heads of the mean logit (method.md 4.3), mean over the rows given,
    fp32.

    real, noise: [B, C, h, w], text: [B, L, D]; B = 1 for the paper's single-sample form. The gradient also
    flows through D's resized copies of x; noise and text are constants. Flash and memory-efficient attention
    have no second derivative, so the forward runs with the math kernel (method.md 10.1), outside autocast.
    float64 stays float64.
    """
    dtype = torch.promote_types(real.dtype, torch.float32)
    x = real.detach().to(dtype).requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(x.device.type, enabled=False):
        logits = discriminator(x, noise.detach().to(dtype), text.detach().to(dtype))
        score = torch.stack([head.mean(dim=(1, 2, 3)) for head in logits.values()]).sum()
        (gradient,) = torch.autograd.grad(score, x, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()
