"""DINOv2 features for FD-DINOv2 (Stein et al. 2023)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2g.core.errors import UserError
from d2g.vision import transformers_vision
from d2g.vision.normalization import IMAGENET
from eval.images.resize import prepare_batch
from eval.networks.base import Device, FeatureNet, normalize_channels, parameters_sha256

DINOV2_SIZE = 224
DINOV2 = "facebook/dinov2-large"
"""ViT-L/14, the choice of Stein et al. (Apache-2.0, Meta)."""


def load_dinov2(weights: str | Path | None = None, device: Device = "cpu") -> FeatureNet:
    """DINOv2 features: the class token after the last norm, [B, 1024] for ViT-L/14, as in dgm-eval.

    `weights`: a folder or hub id in transformers' format; None: DINOV2. Images are resized to 224 px without
    cropping, with PIL's bicubic filter. Raises UserError when the model is missing, or when its patch size
    does not divide 224.
    """
    name = str(weights or DINOV2)
    model = transformers_vision.load_dinov2_model(name)
    patch = model.config.patch_size
    if DINOV2_SIZE % patch:
        raise UserError(
            f"{name} has patches of {patch} px, expected a divisor of {DINOV2_SIZE}; give a ViT/14"
        )
    # Position embeddings of 224 px, resized once; the digest is of the published weights.
    sha256 = parameters_sha256(model)
    positions = interpolated(model.embeddings.position_embeddings.detach(), DINOV2_SIZE // patch)
    model.embeddings.position_embeddings = nn.Parameter(positions, requires_grad=False)
    model = model.to(device)

    def features(images: Tensor) -> Tensor:
        pixels = normalize_channels(
            prepare_batch(images.to(device), f"squash{DINOV2_SIZE}-bicubic"), IMAGENET
        )
        token: Tensor = model(pixel_values=pixels).last_hidden_state[:, 0]
        return token

    return FeatureNet(name="dinov2", dim=model.config.hidden_size, sha256=sha256, function=features)


def interpolated(positions: Tensor, side: int) -> Tensor:
    """Position embeddings [1, 1 + M^2, D] for side x side patches: [1, 1 + side^2, D].

    As in Meta's code, which adds 0.1 to the side before it divides. transformers does not, so its features
    differ.
    """
    grid = round((positions.shape[1] - 1) ** 0.5)
    if grid == side:
        return positions
    patches = positions[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    scale = (side + 0.1) / grid
    patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2)], 1)
