"""InceptionV3 as FID and as torchvision define it. No other module imports torchvision's Inception blocks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2g.vision.weights import PublishedFile, file_sha256, find_weights, load_strict
from eval.images.resize import resize_clean, resize_tensorflow
from eval.networks.base import Device, FeatureNet

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256_PREFIX = "6726825d"

FID_INCEPTION = PublishedFile(
    names=(INCEPTION_FILE, "weights-inception-2015-12-05-6726825d.pth"),
    sha256=INCEPTION_SHA256_PREFIX,
    mib=91,
    source="release fid_weights of mseitzer/pytorch-fid or v0.2.0 of toshas/torch-fidelity on GitHub",
)
"""A port of TensorFlow's 2015-12-05 network (Apache-2.0), also used by torch-fidelity and torchmetrics."""

TORCHVISION_INCEPTION = PublishedFile(
    names=("inception_v3_google-0cc3c7bd.pth",),
    sha256="0cc3c7bd",
    mib=104,
    source="torchvision's inception_v3, IMAGENET1K_V1",
)
"""Trained by the same recipe, but a different network: its distances are no FID (BSD-3)."""


def fid_inception() -> nn.Module:
    """Build FID's network without weights: TensorFlow's 2015-12-05 InceptionV3 with 1008 classes.

    It differs from torchvision's: average pools do not count padding, and the last block uses max pooling.
    """
    from torchvision.models import inception as tv

    def chain(block: nn.Module, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = getattr(block, name)(x)
        return x

    def average(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def maximum(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, stride=1, padding=1)

    # Blocks of torchvision whose average pools do not count padding.
    class A(tv.InceptionA):  # type: ignore[misc]
        def _forward(self, x: Tensor) -> list[Tensor]:
            fives = chain(self, x, "branch5x5_1", "branch5x5_2")
            threes = chain(self, x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
            return [self.branch1x1(x), fives, threes, self.branch_pool(average(x))]

    class C(tv.InceptionC):  # type: ignore[misc]
        def _forward(self, x: Tensor) -> list[Tensor]:
            sevens = chain(self, x, *(f"branch7x7_{i}" for i in (1, 2, 3)))
            double = chain(self, x, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)))
            return [self.branch1x1(x), sevens, double, self.branch_pool(average(x))]

    class E(tv.InceptionE):  # type: ignore[misc]
        pool = staticmethod(average)

        def _forward(self, x: Tensor) -> list[Tensor]:
            three, double = self.branch3x3_1(x), chain(self, x, "branch3x3dbl_1", "branch3x3dbl_2")
            threes = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
            doubles = [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
            pooled = self.branch_pool(self.pool(x))
            return [self.branch1x1(x), torch.cat(threes, 1), torch.cat(doubles, 1), pooled]

    # The last block of TensorFlow's graph pools by maximum.
    class LastE(E):
        pool = staticmethod(maximum)

    # torchvision's network with these blocks in place.
    net: nn.Module = tv.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    net.Mixed_5b, net.Mixed_5c, net.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
    net.Mixed_6b, net.Mixed_6c, net.Mixed_6d, net.Mixed_6e = (
        C(768, 128),
        C(768, 160),
        C(768, 160),
        C(768, 192),
    )
    net.Mixed_7b, net.Mixed_7c = E(1280), LastE(2048)
    return net


def load_inception(weights: str | Path | None = None, device: Device = "cpu") -> FeatureNet:
    """FID features [B, 2048] with clean-fid's resize, and 1008 logits without bias for the Inception score.

    `weights`: pytorch-fid's file, as .pth or .safetensors; None: the file in torch.hub's folder.
    """
    return _load(fid_inception(), "inception", FID_INCEPTION, weights, device, _clean)


def load_inception_tf(weights: str | Path | None = None, device: Device = "cpu") -> FeatureNet:
    """`load_inception` with the resize of the TensorFlow graph, as in published CIFAR10 numbers."""
    return _load(fid_inception(), "inception-tf", FID_INCEPTION, weights, device, _tensorflow)


def load_inception_torchvision(weights: str | Path | None = None, device: Device = "cpu") -> FeatureNet:
    """torchvision's InceptionV3: features [B, 2048] and 1000 logits. Its Frechet distances are no FID."""
    from torchvision.models import Inception3

    net = Inception3(init_weights=False)
    return _load(net, "torchvision-inception", TORCHVISION_INCEPTION, weights, device, _plus_minus_one)


def _clean(images: Tensor) -> Tensor:
    return (resize_clean(images) - 128) / 128


def _tensorflow(images: Tensor) -> Tensor:
    return (resize_tensorflow(images) - 128) / 128


def _plus_minus_one(images: Tensor) -> Tensor:
    return resize_clean(images) / 127.5 - 1


def _load(
    net: Any,
    name: str,
    published: PublishedFile,
    weights: str | Path | None,
    device: Device,
    preprocess: Callable[[Tensor], Tensor],
) -> FeatureNet:
    file = find_weights(published, weights)
    load_strict(net, file, f"the Inception weights {published.names[0]}")
    head = net.fc.to(device).requires_grad_(False)
    # Features are the inputs of the classifier, which the Inception score applies to them.
    net.fc, net.AuxLogits = nn.Identity(), None
    net = net.to(device).eval().requires_grad_(False)
    # In TensorFlow's graph the Inception score takes the logits before the bias is added.
    bias = None if published is FID_INCEPTION else head.bias

    def features(images: Tensor) -> Tensor:
        output: Tensor = net(preprocess(images.to(device)))
        return output

    def logits(rows: Tensor) -> Tensor:
        return F.linear(rows.to(device, torch.float32), head.weight, bias)

    return FeatureNet(name=name, dim=2048, sha256=file_sha256(file), function=features, classifier=logits)
