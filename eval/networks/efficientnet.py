"""EfficientNet-lite0 with ImageNet weights: features where no Inception weights are."""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from d2g.vision.efficientnet import LITE0_SIZE, open_lite0
from d2g.vision.weights import file_sha256
from eval.images.resize import resize_clean
from eval.networks.base import Device, FeatureNet


def load_efficientnet_lite0(weights: str | Path | None = None, device: Device = "cpu") -> FeatureNet:
    """EfficientNet-lite0 (Tan & Le 2019): pooled features [B, 1280] and the logits of 1,000 ImageNet classes.

    Images are resized to 224 px with clean-fid's filter and scaled to [-1, 1]. `weights`: the package's file;
    None: that of the installed package. Its Frechet distances are no FID. Raises UserError without weights.
    """
    net, file = open_lite0(weights)
    head = net.classifier.to(device).requires_grad_(False)
    net.classifier = nn.Identity()
    net = net.to(device).eval().requires_grad_(False)

    def features(images: Tensor) -> Tensor:
        pooled: Tensor = net(resize_clean(images.to(device), LITE0_SIZE) / 127.5 - 1)
        return pooled

    def logits(rows: Tensor) -> Tensor:
        return F.linear(rows.to(device).float(), head.weight, head.bias)

    return FeatureNet(
        name="efficientnet-lite0",
        dim=head.in_features,
        sha256=file_sha256(file),
        function=features,
        classifier=logits,
    )
