"""Feature networks by name, and SqueezeNet. The other networks are in their own modules beside this one."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from d2g.core.errors import UserError
from d2g.vision.efficientnet import packaged_weights
from d2g.vision.weights import file_sha256, load_strict, weights_folder
from eval.images.resize import resize_clean
from eval.networks.base import ClipNet as ClipNet
from eval.networks.base import Device
from eval.networks.base import FeatureNet as FeatureNet
from eval.networks.clip import CLIP_PRESETS as CLIP_PRESETS
from eval.networks.clip import clip_tokenizer as clip_tokenizer
from eval.networks.clip import load_clip as load_clip
from eval.networks.clip import load_clip_features as load_clip_features
from eval.networks.clip import new_clip as new_clip
from eval.networks.clip import save_clip as save_clip
from eval.networks.dinov2 import load_dinov2
from eval.networks.dreamsim import load_dreamsim
from eval.networks.efficientnet import load_efficientnet_lite0
from eval.networks.inception import (
    FID_INCEPTION,
    load_inception,
    load_inception_tf,
    load_inception_torchvision,
)
from eval.networks.inception import INCEPTION_FILE as INCEPTION_FILE
from eval.networks.inception import INCEPTION_SHA256_PREFIX as INCEPTION_SHA256_PREFIX


def load_squeezenet(weights: str | Path | None = None, device: Device = "cpu") -> FeatureNet:
    """ImageNet SqueezeNet 1.0: features [B, 512], the spatial mean of the last fire module.

    Input is RGB minus (123, 117, 104) at 227 px. A small replacement where no Inception is available; its
    distances are no FID. Raises UserError without `weights`.
    """
    from torchvision.models import squeezenet1_0

    what = "a squeezenet1_0.safetensors with torchvision's keys"
    if weights is None:
        raise UserError(f"squeezenet has no weights of its own; give the path of {what}")
    net = squeezenet1_0(weights=None)
    load_strict(net, weights, what)
    net = net.to(device).eval().requires_grad_(False)
    mean = torch.tensor([123.0, 117.0, 104.0], device=device).view(3, 1, 1)

    def features(images: Tensor) -> Tensor:
        output: Tensor = net.features(resize_clean(images.to(device), 227) - mean)
        return output.mean((2, 3))

    return FeatureNet(name="squeezenet", dim=512, sha256=file_sha256(weights), function=features)


FEATURES: Mapping[str, Callable[[str | Path | None, Device], FeatureNet]] = MappingProxyType(
    {
        "inception": load_inception,
        "inception-tf": load_inception_tf,
        "torchvision-inception": load_inception_torchvision,
        "dinov2": load_dinov2,
        "clip": load_clip_features,
        "dreamsim": load_dreamsim,
        "squeezenet": load_squeezenet,
        "efficientnet-lite0": load_efficientnet_lite0,
    }
)
"""Loaders of feature networks by the names that protocols use: (weights, device) -> network. Without
weights, files in their usual place are loaded.
"""


def default_features() -> tuple[str, str] | None:
    """(name of the network where neither protocol nor user names one, the reason in words), None without any.

    FID's Inception if its weights are in their usual place, else EfficientNet-lite0 if its package is there.
    """
    if any((weights_folder() / name).is_file() for name in FID_INCEPTION.names):
        return "inception", f"its weights are in {weights_folder()}"
    if packaged_weights() is not None:
        return "efficientnet-lite0", f"Inception's weights are not in {weights_folder()}"
    return None
