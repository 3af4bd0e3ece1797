"""LPIPS between images (Zhang et al. 2018), with the trunk of torchvision."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from d2g.core.config import pick
from d2g.diffusion.latents import from_uint8
from d2g.vision.weights import PublishedFile, find_weights
from eval.networks.base import Device
from latent_lpips.lpips import PixelLPIPS

TRUNKS: Mapping[str, PublishedFile] = MappingProxyType(
    {
        "alex": PublishedFile(
            names=("alexnet-owt-7be5be79.pth",),
            sha256="7be5be79",
            mib=233,
            source="torchvision's alexnet, IMAGENET1K_V1",
        ),
        "vgg": PublishedFile(
            names=("vgg16-397923af.pth",),
            sha256="397923af",
            mib=528,
            source="torchvision's vgg16, IMAGENET1K_V1",
        ),
    }
)
"""Trunks (BSD-3) by their names in the package lpips, which brings the linear heads (BSD-2)."""


def load_pixel_lpips(
    net: Literal["alex", "vgg"] = "alex", trunk: str | Path | None = None, device: Device = "cpu"
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return LPIPS v0.1: (uint8 images [B, 3, H, W], as many others) -> distances [B], 0 when equal.

    `net`: alex (the authors' choice for evaluation) or vgg. `trunk`: its weight file with torchvision's keys;
    None: the file in torch.hub's folder. Raises UserError when the file is missing or of another network.
    """
    metric = PixelLPIPS(net, find_weights(pick(TRUNKS, net, "LPIPS network"), trunk)).to(device).eval()

    @torch.no_grad()
    def distance(images: Tensor, targets: Tensor) -> Tensor:
        values: Tensor = metric(from_uint8(images.to(device)), from_uint8(targets.to(device)))
        return values.double().cpu()

    return distance
