"""Frozen image networks behind one interface: pixels in, feature maps at several depths out.

Vision transformers of transformers (DINO, DINOv2, DINOv3, DeiT, CLIP), EfficientNet-lite0, SqueezeNet 1.1 and
VGG16-BN.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2g.core.errors import SettingError, UserError, naming
from d2g.vision.efficientnet import new_lite0, open_lite0
from d2g.vision.normalization import HALF, IMAGENET, OPENAI
from d2g.vision.transformers_vision import load_vision_transformer
from d2g.vision.weights import fill_parameters, read_state

LITE0, SQUEEZENET, VGG16_BN = "efficientnet-lite0", "squeezenet:", "vgg16_bn:"


class FeatureNetwork(nn.Module, ABC):
    """A frozen network whose features are taken after some of its blocks.

    depths: numbers of these blocks, counted from 1. widths: channels after each. size_unit: image sides must
    be multiples of it. statistics: mean and standard deviation of RGB in [0, 1], for normalization.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        size_unit: int,
        statistics: tuple[tuple[float, ...], tuple[float, ...]],
    ) -> None:
        super().__init__()
        self.depths, self.widths, self.size_unit = list(depths), list(widths), size_unit
        self.statistics = statistics
        # As buffers, because a copy from the CPU in each step would wait for the GPU.
        for name, values in zip(("mean", "deviation"), statistics, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    @abstractmethod
    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Normalized pixels [B, 3, S, S] -> a feature map [B, C_d, h_d, w_d] for each of `depths`."""

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Pixels [B, 3, S, S] in [-1, 1] -> a feature map [B, C_d, h_d, w_d] for each of `depths`."""
        mean, deviation = self.mean.to(pixels.dtype), self.deviation.to(pixels.dtype)
        return self.maps((pixels / 2 + 0.5 - mean) / deviation)


class VisionTransformer(FeatureNetwork):
    """Patch tokens of a vision transformer of transformers, as maps, without class and register tokens."""

    def __init__(self, model: Any, heads: int, name: str) -> None:
        config = model.config
        depths = equally_spaced(config.num_hidden_layers, heads, name)
        clip = config.model_type.startswith("clip")
        super().__init__(
            depths, [config.hidden_size] * len(depths), config.patch_size, OPENAI if clip else IMAGENET
        )
        self.model = model
        # DINOv2 and DINOv3 take any image size; others interpolate their position embeddings on request.
        any_size = config.model_type.startswith("dino")
        self.options = {} if any_size else {"interpolate_pos_encoding": True}

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """The patch tokens [B, width, S / patch, S / patch] after each of `depths`."""
        states = self.model(pixel_values=pixels, output_hidden_states=True, **self.options).hidden_states
        height, width = (side // self.size_unit for side in pixels.shape[2:])
        tokens = (states[depth][:, -height * width :] for depth in self.depths)
        return [patches.transpose(1, 2).unflatten(2, (height, width)) for patches in tokens]


class ConvolutionalNetwork(FeatureNetwork):
    """Outputs of the blocks of a convolutional network: of `stem` first, then of each of `blocks`."""

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[nn.Module],
        widths: Sequence[int],
        heads: int,
        name: str,
        statistics: tuple[tuple[float, ...], tuple[float, ...]],
    ) -> None:
        depths = equally_spaced(len(blocks), heads, name)
        super().__init__(depths, [widths[depth - 1] for depth in depths], 1, statistics)
        self.stem, self.blocks = stem, nn.ModuleList(blocks[: depths[-1]])

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Normalized pixels [B, 3, S, S] -> the output [B, C_d, h_d, w_d] of each block in `depths`."""
        features, maps = self.stem(pixels), []
        for depth, block in enumerate(self.blocks, 1):
            features = block(features)
            if depth in self.depths:
                maps.append(features)
        return maps


def weights_path(name: str) -> str:
    """The file or folder that a name of `gan.feature_networks` refers to, or the name itself."""
    return name.removeprefix(SQUEEZENET).removeprefix(VGG16_BN)


def check_weights_file(name: str) -> None:
    """Raise UserError for squeezenet:FILE or vgg16_bn:FILE without the file, before anything is loaded."""
    file = weights_path(name)
    if file != name and not Path(file).is_file():
        raise UserError(
            f"gan.feature_networks: {file}: no weights there; put torchvision's weights at that path or give "
            "its path"
        )


def equally_spaced(blocks: int, heads: int, name: str) -> list[int]:
    """Numbers of the blocks, counted from 1, after which heads read: equally spaced, up to the last block.

    `name`: the network, for the error. Raises SettingError for more heads than blocks.
    """
    if heads > blocks:
        raise SettingError(
            f"gan.token_heads is {heads}, but {name} has {blocks} blocks; expected 1 to {blocks}"
        )
    return [round(blocks * (number + 1) / heads) for number in range(heads)]


def open_feature_network(name: str, heads: int, on_meta: bool = False) -> FeatureNetwork:
    """Open a network of `gan.feature_networks` by name, in eval mode and frozen.

    heads: number of feature maps. on_meta: build it without weights, from its config. Raises UserError where
    weights or config are missing, SettingError for more heads than blocks.
    """
    with naming("gan.feature_networks"):
        if name == LITE0:
            network = _lite0(heads, on_meta)
        elif name.startswith(SQUEEZENET):
            network = _squeezenet(name.removeprefix(SQUEEZENET), heads, on_meta)
        elif name.startswith(VGG16_BN):
            network = _vgg16_bn(name.removeprefix(VGG16_BN), heads, on_meta)
        else:
            network = VisionTransformer(load_vision_transformer(name, on_meta), heads, name)
    return network.eval().requires_grad_(False)


def _lite0(heads: int, on_meta: bool) -> FeatureNetwork:
    """EfficientNet-lite0 in its seven stages; the package's weights expect RGB in [-1, 1]."""
    if on_meta:
        with torch.device("meta"):
            net = new_lite0()
    else:
        net, _ = open_lite0()
    # In the first stage the last convolution is conv_pw, in the others conv_pwl.
    last_blocks = [stage[-1] for stage in net.blocks]
    widths = [
        (block.conv_pwl if hasattr(block, "conv_pwl") else block.conv_pw).out_channels
        for block in last_blocks
    ]
    stem = nn.Sequential(net.conv_stem, net.bn1)
    return ConvolutionalNetwork(stem, list(net.blocks), widths, heads, LITE0, HALF)


def _squeezenet(file: str, heads: int, on_meta: bool) -> FeatureNetwork:
    """SqueezeNet 1.1 in its eight fire modules, with the pooling before them."""
    from torchvision.models import squeezenet1_1

    with torch.device("meta" if on_meta else "cpu"):
        net = squeezenet1_1(weights=None)
    if not on_meta:
        what = "torchvision's weights of squeezenet1_1"
        fill_parameters(net, read_state(file, what), file, what)
    # Pooling belongs to the fire module that follows it.
    blocks: list[nn.Module] = []
    layers: list[nn.Module] = []
    for layer in net.features[2:]:
        layers.append(layer)
        if type(layer).__name__ == "Fire":
            blocks.append(nn.Sequential(*layers))
            layers = []
    widths = [2 * block[-1].expand1x1.out_channels for block in blocks]  # type: ignore[index]
    return ConvolutionalNetwork(net.features[:2], blocks, widths, heads, "squeezenet", IMAGENET)


def _vgg16_bn(file: str, heads: int, on_meta: bool) -> FeatureNetwork:
    """VGG16-BN in its five blocks of convolutions, each but the first with the pooling before it."""
    from torchvision.models import vgg16_bn

    with torch.device("meta" if on_meta else "cpu"):
        net = vgg16_bn(weights=None)
    if not on_meta:
        what = "torchvision's weights of vgg16_bn"
        fill_parameters(net, read_state(file, what), file, what)

    # A block ends before each pooling, which belongs to the next block.
    blocks: list[nn.Module] = []
    layers: list[nn.Module] = []
    for layer in net.features:
        if isinstance(layer, nn.MaxPool2d):
            blocks.append(nn.Sequential(*layers))
            layers = []
        layers.append(layer)
    return ConvolutionalNetwork(nn.Identity(), blocks, [64, 128, 256, 512, 512], heads, "vgg16_bn", IMAGENET)
