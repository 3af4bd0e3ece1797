"""Optional terms of an autoencoder's loss: distance of ImageNet features, and a discriminator of patches.

As in VQGAN (Esser et al. 2021, section 3.1) and the autoencoders of LDM (Rombach et al. 2022, appendix G).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2g.core.distributed import process_group
from d2g.core.transfer import device_of
from d2g.diffusion.latents import from_uint8
from distill.losses.adversarial import discriminator_loss, generator_loss
from distill.models.feature_networks import LITE0, FeatureNetwork, open_feature_network
from teacher_training.config import AutoencoderConfig
from teacher_training.loop import TrainedDiscriminator

DEPTHS = 5
"""Depths at which the feature network is read, as many as LPIPS reads of VGG."""
LARGEST_WEIGHT = 1e4
"""Limit of the adaptive weight, as in VQGAN."""


class FeatureDistance(nn.Module):
    """LPIPS' distance of a frozen network's feature maps (Zhang et al. 2018, eq. 1), unweighted."""

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor, others: Tensor) -> Tensor:
        """Two batches [B, 3, S, S] in [-1, 1] -> distances [B] from 0, for equal pictures, to 4."""
        with torch.no_grad():
            references = self.network(pixels)
        terms = []
        for a, b in zip(references, self.network(others), strict=True):
            # Squared distance of the unit vectors at each place, then the mean over places.
            squares = (F.normalize(a, dim=1, eps=1e-8) - F.normalize(b, dim=1, eps=1e-8)).square()
            terms.append(squares.sum(1).mean((1, 2)))
        return torch.stack(terms).mean(0)


def open_perceptual(config: AutoencoderConfig, device: torch.device | str = "cpu") -> FeatureDistance | None:
    """The distance that the settings ask for, or None. Raises UserError where the weights are missing."""
    if not config.perceptual_weight:
        return None
    return FeatureDistance(open_feature_network(LITE0, DEPTHS)).to(device)


@torch.no_grad()
def mean_feature_distance(distance: FeatureDistance, images: Tensor, others: Tensor) -> float:
    """The mean distance of two uint8 batches [N, 3, S, S]."""
    device = device_of(distance)
    pixels = (
        [from_uint8(part.to(device)) for part in batch]
        for batch in zip(images.split(64), others.split(64), strict=True)
    )
    return torch.cat([distance(a, b) for a, b in pixels]).mean().item()


def patch_discriminator(width: int = 32) -> nn.Sequential:
    """A small PatchGAN (Isola et al. 2017): pixels [B, 3, S, S] -> a logit for each patch [B, 1, S/4, S/4].

    A patch has 26 pixels. Normalization is by groups, not by the batch as in VQGAN, so that a row's logits do
    not depend on the other rows and ranks.
    """
    return nn.Sequential(
        nn.Conv2d(3, width, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
        nn.GroupNorm(8, 2 * width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 4 * width, 3, padding=1),
        nn.GroupNorm(8, 4 * width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(4 * width, 1, 3, padding=1),
    )


def adaptive_weight(rec: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """|gradient of `rec`| / |gradient of `adversarial`| at the last layer (Esser et al. 2021, eq. 7).

    At most 1e4, without a gradient of its own. The gradients are means over ranks.
    """
    norms = [
        process_group.all_mean(torch.autograd.grad(loss, last_layer, retain_graph=True)[0]).norm()
        for loss in (rec, adversarial)
    ]
    weight: Tensor = (norms[0] / (norms[1] + 1e-6)).clamp(max=LARGEST_WEIGHT)
    return weight


class PatchDiscriminator(TrainedDiscriminator):
    """The discriminator of an autoencoder's reconstructions, with hinge losses (Lim and Ye 2017)."""

    def __init__(self, vae: Any, config: AutoencoderConfig) -> None:
        super().__init__("discriminator", patch_discriminator().to(device_of(vae)), config.adversarial_lr)
        self.last_layer: Tensor = vae.decoder.conv_out.weight
        self.weight, self.starts_at = config.adversarial_weight, config.adversarial_from
        self.active = False
        self._rows: tuple[Tensor, Tensor] | None = None

    def begin(self, nimg: int) -> None:
        """It learns, and its term counts, from `adversarial_start` on."""
        self.active, self._rows = nimg >= self.starts_at, None

    def term(self, rec: Tensor, pixels: Tensor, decoded: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted term of the autoencoder's loss, and values for the log. Both batches: [B, 3, S, S].

        `rec`: the other errors of `decoded`, which the weight of the term follows.
        """
        # The autoencoder's gradient passes through the discriminator, and leaves none there.
        self.module.requires_grad_(False)
        fake = generator_loss({"patches": self.module(decoded)}, "hinge")
        self.module.requires_grad_(True)
        self._rows = (pixels, decoded.detach())
        weight = adaptive_weight(rec, fake, self.last_layer)
        return self.weight * weight * fake, {"loss/adversarial": fake, "adversarial/weight": weight}

    def loss(self) -> Tensor | None:
        """The hinge loss on the rows of the last `term`."""
        if self._rows is None:
            return None
        real, fake = (self.module(rows) for rows in self._rows)
        return discriminator_loss({"patches": real}, {"patches": fake}, "hinge")


def open_discriminator(vae: Any, config: AutoencoderConfig) -> PatchDiscriminator | None:
    """The discriminator that the settings ask for, with fresh weights, or None."""
    return PatchDiscriminator(vae, config) if config.adversarial_weight else None
