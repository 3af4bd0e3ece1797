"""PixelLPIPS against the lpips package; local weights; latents through a decoder."""

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lpips
import pytest
import torch
from torch import Tensor
from torchvision.models import squeezenet1_1

from d2g.core.errors import SettingError, UserError
from d2g.diffusion import pretrained
from d2g.diffusion.latents import decode
from latent_lpips import ELatentLPIPS, PixelLPIPS


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=rng(seed)) * 2 - 1


@pytest.fixture(scope="module")
def metric() -> PixelLPIPS:
    torch.manual_seed(0)
    return PixelLPIPS("squeeze", pretrained=False)


def lpips_reference(metric: PixelLPIPS, net: str) -> Any:
    """The network of the lpips package with the same trunk weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    reference.net.load_state_dict(metric.trunk.state_dict())
    return reference.eval()


def test_distance_and_gradient_equal_the_lpips_package(metric: PixelLPIPS) -> None:
    a, b = pixels(2, 3, 64, 48).requires_grad_(), pixels(2, 3, 64, 48, seed=1)
    ours, theirs = metric(a, b), lpips_reference(metric, "squeeze")(a, b).flatten()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    slopes = [torch.autograd.grad(value.sum(), a)[0] for value in (ours, theirs)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-6)
    assert ours.min() > 0 and metric(b, b).tolist() == [0.0, 0.0]


def test_vgg_equals_the_lpips_package_also_at_32_pixels() -> None:
    torch.manual_seed(0)
    metric = PixelLPIPS(pretrained=False)
    a, b = pixels(2, 3, 32, 32), pixels(2, 3, 32, 32, seed=1)
    reference = lpips_reference(metric, "vgg")
    torch.testing.assert_close(metric(a, b), reference(a, b).flatten().detach(), rtol=1e-5, atol=1e-6)
    metric.resize = 64
    large = [torch.nn.functional.interpolate(x, (64, 64), mode="bilinear") for x in (a, b)]
    torch.testing.assert_close(metric(a, b), reference(*large).flatten().detach(), rtol=1e-5, atol=1e-6)


def test_interface_equals_latent_lpips(metric: PixelLPIPS) -> None:
    a, b = pixels(2, 3, 64, 64), pixels(2, 3, 64, 64, seed=1)
    assert metric.layers(a, b).shape == (2, 7)
    torch.testing.assert_close(metric.layers(a, b).sum(1), metric(a, b))
    where = metric(a, b, spatial=True)
    assert where.shape == (2, 64, 64) and where.min() >= 0
    assert not metric.train().training and not any(p.requires_grad for p in metric.parameters())
    loss = ELatentLPIPS(metric, "bgco", draws=2, ensemble=1.0)
    assert loss(a, b, generator=rng(1)).shape == (2,)
    with pytest.raises(UserError, match="compares inputs of one shape"):
        metric(a, b[:1])
    with pytest.raises(UserError, match=r"pixels of shape \(2, 4, 8, 8\), expected \[B, 3, H, W\]"):
        metric(torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8))


def test_latents_through_a_decoder(metric: PixelLPIPS, teacher: Path) -> None:
    """With a decoder, latents are compared through their decoded images, and gradients reach the latents."""
    vae = pretrained.load_vae(str(teacher))
    decoded = copy.copy(metric)
    decoded.decode = partial(decode, vae)
    a, b = (
        torch.randn(2, 4, 8, 8, generator=rng(1)).requires_grad_(),
        torch.randn(2, 4, 8, 8, generator=rng(2)),
    )
    distance = decoded(a, b)
    torch.testing.assert_close(distance, metric(decode(vae, a), decode(vae, b)))
    distance.sum().backward()
    assert a.grad is not None and a.grad.abs().max() > 0
    where = decoded(a, b, spatial=True)
    assert where.shape == (2, 8, 8)
    torch.testing.assert_close(where.mean((1, 2)), distance, rtol=0.2, atol=0)
    assert all(p.grad is None for p in vae.parameters())


def test_local_weights_of_torchvision(tmp_path: Path) -> None:
    torch.manual_seed(5)
    torch.save(squeezenet1_1().state_dict(), tmp_path / "trunk.pth")
    one, two = (PixelLPIPS("squeeze", tmp_path / "trunk.pth") for _ in range(2))
    a, b = pixels(1, 3, 64, 64), pixels(1, 3, 64, 64, seed=1)
    assert torch.equal(one(a, b), two(a, b))
    assert not torch.equal(one(a, b), PixelLPIPS("squeeze", pretrained=False)(a, b))
    with pytest.raises(UserError, match=r"trunk\.pth is not torchvision's state dict of alex"):
        PixelLPIPS("alex", tmp_path / "trunk.pth")


def test_invalid_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="'resnet' is unknown, expected one of vgg, alex, squeeze"):
        PixelLPIPS("resnet")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="resize is 0"):
        PixelLPIPS(pretrained=False, resize=0)
    with pytest.raises(UserError, match="no such file, expected torchvision's weights of squeeze"):
        PixelLPIPS("squeeze", tmp_path / "missing.pth")
    (tmp_path / "bad.pth").write_bytes(b"bad")
    with pytest.raises(UserError, match=r"bad\.pth is not torchvision's state dict of squeeze"):
        PixelLPIPS("squeeze", tmp_path / "bad.pth")
