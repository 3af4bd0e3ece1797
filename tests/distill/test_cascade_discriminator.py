"""distill.models.cascade_discriminator.ResponseNorm: diffusers' norm, and its second derivative at zero."""

import torch
from diffusers.models.unets.unet_stable_cascade import GlobalResponseNorm
from torch import nn

from distill.models.cascade_discriminator import ResponseNorm, replace_response_norms


def test_response_norm_is_diffusers_with_a_second_derivative_at_zero() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 3, 5, generator=rng)
    x[..., 1] = 0  # a channel that GELU has cut off everywhere
    network = nn.Sequential(GlobalResponseNorm(5))
    for parameter in network.parameters():
        parameter.data.normal_(generator=rng)
    expected, names = network(x), list(network.state_dict())
    weights = list(network.parameters())
    replace_response_norms(network)
    assert isinstance(network[0], ResponseNorm) and list(network.state_dict()) == names
    assert all(a is b for a, b in zip(weights, network.parameters(), strict=True))
    torch.testing.assert_close(network(x), expected, rtol=1e-6, atol=1e-6)
    # R1: the gradient of the squared gradient with respect to x.
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert gradient.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in weights)
