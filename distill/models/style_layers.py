"""Layers of style-based generators: mapping, styles, modulated convolutions, and a synthesis network.

Written from the papers. StyleGAN2 is arXiv 1912.04958, StyleGAN3 arXiv 2106.12423, StyleGAN-T arXiv
2301.09515, GigaGAN arXiv 2303.05511. Unspecified choices: method.md "GANs with styles as students".

Each layer has a method `initialize(rng)`, which samples its initial weights; see the function `initialize`.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAKY_SLOPE = 0.2
"""Negative slope of the leaky ReLUs."""
ACTIVATION_GAIN = math.sqrt(2)
"""Keeps the second moment of a leaky ReLU's output near that of its input."""
LAYER_SCALE = 1e-5
"""Initial scale of a residual convolution's contribution (StyleGAN-T, section 3.1)."""
MAPPING_LR = 0.01
"""Learning rate of the mapping network relative to the rest (StyleGAN, appendix C)."""
BANDWIDTH = 2.0
"""Largest frequency of the Fourier input, in periods over the 4 x 4 grid: the grid's Nyquist frequency."""


class EqualizedLinear(nn.Module):
    """A linear layer with equalized learning rate: N(0, 1) weights, scaled by 1 / sqrt(fan-in) when used.

    bias: initial value of the bias. lr: learning rate relative to other layers.
    """

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0, lr: float = 1.0) -> None:
        super().__init__()
        self.initial_bias, self.lr = bias, lr
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    @torch.no_grad()
    def initialize(self, rng: torch.Generator) -> None:
        """Draw the initial weights."""
        self.weight.normal_(generator=rng).div_(self.lr)
        self.bias.fill_(self.initial_bias / self.lr)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        return F.linear(x, self.weight * (self.lr * self.weight.shape[1] ** -0.5), self.bias * self.lr)


class EqualizedConv(nn.Module):
    """A convolution with equalized learning rate, [B, C_in, h, w] -> [B, C_out, h, w]."""

    def __init__(self, inputs: int, outputs: int, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, side, side))
        self.bias = nn.Parameter(torch.empty(outputs))

    @torch.no_grad()
    def initialize(self, rng: torch.Generator) -> None:
        """Draw the initial weights."""
        self.weight.normal_(generator=rng)
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, h, w] -> [B, C_out, h, w]."""
        gain = self.weight[0].numel() ** -0.5
        return F.conv2d(x, self.weight * gain, self.bias, padding=self.weight.shape[-1] // 2)


def normalize_second_moment(x: Tensor) -> Tensor:
    """Divide each row [B, D] by its root mean square."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class MappingNetwork(nn.Module):
    """f(z): z is normalized and passes through `layers` linear layers with leaky ReLU.

    `mean` [outputs] is the tracked mean of f, used for truncation (StyleGAN-T, section 3.3).
    """

    mean: Tensor

    def __init__(self, inputs: int, outputs: int, layers: int) -> None:
        super().__init__()
        widths = [inputs, *[outputs] * layers]
        self.layers = nn.ModuleList(EqualizedLinear(a, b, lr=MAPPING_LR) for a, b in pairwise(widths))
        self.register_buffer("mean", torch.zeros(outputs))

    @torch.no_grad()
    def initialize(self, rng: torch.Generator) -> None:
        """Set the tracked mean to zero."""
        self.mean.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, inputs] -> f(x) [B, outputs]."""
        x = normalize_second_moment(x)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), LEAKY_SLOPE) * ACTIVATION_GAIN
        return x


class Style(nn.Module):
    """The style of a layer, [B, D] -> [B, C]: an affine map of w (StyleGAN2) whose bias starts at 1."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.affine = EqualizedLinear(width, channels, bias=1.0)

    def forward(self, w: Tensor) -> Tensor:
        """w [B, D] -> style [B, C]."""
        style: Tensor = self.affine(w)
        return style


class SecondOrderStyle(nn.Module):
    """s = s1 * s2 + s3, where [s1, s2, s3] is an affine map of w (StyleGAN-T, eq. 1), [B, D] -> [B, C].

    The bias of s3 starts at 1, and with it the mean of s.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.affine = EqualizedLinear(width, 3 * channels)

    @torch.no_grad()
    def initialize(self, rng: torch.Generator) -> None:
        """Set the bias of s3 to 1. The affine map has initialized its weights before."""
        self.affine.bias[2 * len(self.affine.bias) // 3 :] = 1.0

    def forward(self, w: Tensor) -> Tensor:
        """w [B, D] -> style [B, C]."""
        s1, s2, s3 = self.affine(w).chunk(3, dim=1)
        style: Tensor = s1 * s2 + s3
        return style


class ModulatedConv(nn.Module):
    """A convolution whose kernel is scaled by a style per input channel, and demodulated.

    Source: StyleGAN2, eqs. 1 and 3. kernels: size of a bank of kernels. Each row then has its own kernel, a
    weighted mean of the bank (GigaGAN, eq. 2). A single kernel is not scaled itself: inputs and outputs are,
    which is the same.
    """

    def __init__(
        self, inputs: int, outputs: int, side: int, demodulate: bool = True, kernels: int = 1
    ) -> None:
        super().__init__()
        self.demodulate, self.gain = demodulate, (inputs * side**2) ** -0.5
        bank = () if kernels == 1 else (kernels,)
        self.weight = nn.Parameter(torch.empty(*bank, outputs, inputs, side, side))

    @torch.no_grad()
    def initialize(self, rng: torch.Generator) -> None:
        """Draw the initial weights."""
        self.weight.normal_(generator=rng)

    def forward(self, x: Tensor, style: Tensor, selection: Tensor | None = None) -> Tensor:
        """x [B, C_in, h, w] and style [B, C_in] -> [B, C_out, h, w].

        selection [B, kernels]: weights of the bank's kernels, with sum 1; None for a single kernel.
        """
        kernel = self.weight * self.gain
        padding = kernel.shape[-1] // 2
        # One kernel for all rows: scale inputs and outputs.
        if selection is None:
            y: Tensor = F.conv2d(x * style[:, :, None, None].to(x.dtype), kernel, padding=padding)
            if not self.demodulate:
                return y
            power = style.float().square() @ kernel.float().square().sum((2, 3)).T
            demodulated: Tensor = y * (power + 1e-8).rsqrt()[:, :, None, None].to(y.dtype)
            return demodulated

        # A kernel for each row: the mean of the bank, modulated and demodulated.
        row_kernels = torch.einsum("bn,noihw->boihw", selection.to(kernel.dtype), kernel)
        row_kernels = row_kernels * style[:, None, :, None, None].to(row_kernels.dtype)
        if self.demodulate:
            power = row_kernels.square().sum((2, 3, 4), keepdim=True)
            row_kernels = row_kernels * (power + 1e-8).rsqrt()

        # Convolve all rows at once, as the groups of one convolution.
        rows, outputs = row_kernels.shape[:2]
        y = F.conv2d(
            x.flatten(0, 1)[None], row_kernels.flatten(0, 1).to(x.dtype), padding=padding, groups=rows
        )
        return y.view(rows, outputs, *y.shape[2:])


def upsample(x: Tensor) -> Tensor:
    """Enlarge x [B, C, h, w] two times, bilinear: StyleGAN2's filter [1, 3, 3, 1] with repeated borders."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with the largest number of groups that divides both 32 and `channels`."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


class DownBlock(nn.Module):
    """A residual block that halves its input: two 3x3 convolutions on normalized features, and a 1x1
    shortcut. A shard unit."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([group_norm(inputs), group_norm(outputs)])
        self.convs = nn.ModuleList([EqualizedConv(inputs, outputs, 3), EqualizedConv(outputs, outputs, 3)])
        self.shortcut = EqualizedConv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, h, w] -> [B, C_out, h / 2, w / 2]."""
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.leaky_relu(norm(y), LEAKY_SLOPE))
        shortcut: Tensor = self.shortcut(x)
        return F.avg_pool2d((shortcut + y) * 0.5**0.5, 2)


class SynthesisConv(nn.Module):
    """Modulated 3x3 convolution, spatial noise, bias, leaky ReLU (StyleGAN2, figure 2d).

    residual: add layer scale * (the layer applied to GroupNorm of x) to x (StyleGAN-T, figure 3b). up:
    enlarge x two times first. kernels: size of the bank from which w selects (GigaGAN, eq. 2). second_order:
    use `SecondOrderStyle` instead of `Style`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        *,
        residual: bool = False,
        up: bool = False,
        kernels: int = 1,
        second_order: bool = True,
    ) -> None:
        super().__init__()
        assert not residual or inputs == outputs
        self.up = up
        self.style = (SecondOrderStyle if second_order else Style)(width, inputs)
        self.select = EqualizedLinear(width, kernels) if kernels > 1 else None
        self.conv = ModulatedConv(inputs, outputs, 3, kernels=kernels)
        self.bias, self.noise_strength = nn.Parameter(torch.empty(outputs)), nn.Parameter(torch.empty(1))
        self.norm = group_norm(inputs) if residual else None
        self.layer_scale = nn.Parameter(torch.empty(outputs)) if residual else None

    @torch.no_grad()
    def initialize(self, rng: torch.Generator) -> None:
        """Set bias, noise strength and layer scale to their small initial values."""
        self.bias.zero_()
        self.noise_strength.zero_()
        if self.layer_scale is not None:
            self.layer_scale.fill_(LAYER_SCALE)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        """x [B, C_in, h, w], w [B, D], noise [B, 1, h, w] at the output's size -> [B, C_out, h, w]."""
        y = x if self.norm is None else self.norm(x)
        y = upsample(y) if self.up else y
        selection = None if self.select is None else self.select(w).float().softmax(1)
        y = self.conv(y, self.style(w), selection) + self.noise_strength * noise
        y = F.leaky_relu(y + self.bias[:, None, None], LEAKY_SLOPE) * ACTIVATION_GAIN
        return y if self.layer_scale is None else x + self.layer_scale[:, None, None] * y


class ToImage(nn.Module):
    """A block's contribution to the image: modulated 1x1 convolution without demodulation (StyleGAN2)."""

    def __init__(self, channels: int, outputs: int, width: int, second_order: bool = True) -> None:
        super().__init__()
        self.style = (SecondOrderStyle if second_order else Style)(width, channels)
        self.conv = ModulatedConv(channels, outputs, 1, demodulate=False)
        self.bias = nn.Parameter(torch.empty(outputs))

    @torch.no_grad()
    def initialize(self, rng: torch.Generator) -> None:
        """Set the bias to zero."""
        self.bias.zero_()

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x [B, C, h, w] and w [B, D] -> [B, outputs, h, w]."""
        y: Tensor = self.conv(x, self.style(w)) + self.bias[:, None, None]
        return y


class FourierInput(nn.Module):
    """Fourier features of a grid, mixed by a trained matrix, in place of a learned constant (StyleGAN3,
    section 3.1; StyleGAN-T, figure 3a).

    Frequencies are uniform in the disk of radius BANDWIDTH, phases uniform; neither is trained.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("frequencies", torch.zeros(channels, 2))
        self.register_buffer("phases", torch.zeros(channels))
        self.weight = nn.Parameter(torch.empty(channels, channels))

    @torch.no_grad()
    def initialize(self, rng: torch.Generator) -> None:
        """Sample frequencies, phases and weights."""
        channels = len(self.phases)
        angle = 2 * math.pi * torch.rand(channels, generator=rng)
        radius = BANDWIDTH * torch.rand(channels, generator=rng).sqrt()
        self.frequencies.copy_(torch.stack([radius * angle.cos(), radius * angle.sin()], 1))
        self.phases.copy_(torch.rand(channels, generator=rng))
        self.weight.normal_(generator=rng)

    def features(self, shift: tuple[float, float] = (0.0, 0.0)) -> Tensor:
        """Compute sin(2 pi (f . p + phase)) sqrt(2) at the grid points p: [C, h, w].

        The points lie in [-1/2, 1/2]^2 and are moved by `shift` (y, x).
        """
        device = self.phases.device
        y, x = (
            (torch.arange(side, device=device) + 0.5) / side - 0.5 + offset
            for side, offset in zip(self.size, shift, strict=True)
        )
        turns = self.frequencies[:, 0, None, None] * y[:, None] + self.frequencies[:, 1, None, None] * x
        return torch.sin(2 * math.pi * (turns + self.phases[:, None, None])) * math.sqrt(2)

    def forward(self, rows: int) -> Tensor:
        """Return the input of the first block for `rows` rows, [B, C, h, w]."""
        features = self.features().to(self.weight.dtype)
        mixed = torch.einsum("oc,chw->ohw", self.weight * len(self.phases) ** -0.5, features)
        return mixed.expand(rows, *mixed.shape)


class SynthesisBlock(nn.Module):
    """The layers of one resolution (StyleGAN-T, figure 3b). A shard unit.

    An upsampling convolution (not in the first block), `residual_blocks` residual convolutions (plain ones
    without `residual`), attention if there is one, and a contribution to the image. attention: a module (x,
    tokens, mask) -> x.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        image_channels: int,
        *,
        up: bool,
        residual_blocks: int,
        residual: bool = True,
        kernels: int = 1,
        second_order: bool = True,
        attention: nn.Module | None = None,
    ) -> None:
        super().__init__()
        options = {"kernels": kernels, "second_order": second_order}
        self.up = up
        upsampling = [SynthesisConv(inputs, outputs, width, up=True, **options)] if up else []  # type: ignore[arg-type]
        self.convs = nn.ModuleList(
            [
                *upsampling,
                *(
                    SynthesisConv(outputs, outputs, width, residual=residual, **options)  # type: ignore[arg-type]
                    for _ in range(residual_blocks)
                ),
            ]
        )
        self.attention = attention
        self.to_image = ToImage(outputs, image_channels, width, second_order)

    def forward(
        self,
        x: Tensor,
        image: Tensor | None,
        w: Tensor,
        noise: Tensor,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x [B, C_in, h, w] -> (features [B, C_out, H, W], image [B, c, H, W]) at this resolution.

        image: the image of the blocks so far [B, c, h, w], or None. w: [B, D]. noise: [B, convolutions, H,
        W]. tokens: [B, L, D'] of the text, with their mask [B, L]. skip: features [B, C_out, H, W] of a
        U-Net's encoder, added after the first convolution.
        """
        for number, conv in enumerate(self.convs):
            x = conv(x, w, noise[:, number : number + 1].to(x.dtype))
            if skip is not None and number == 0:
                x = (x + skip) * 0.5**0.5
        if self.attention is not None:
            x = self.attention(x, tokens, mask)
        added: Tensor = self.to_image(x, w)
        if image is None:
            return x, added
        return x, (upsample(image) if self.up else image) + added


def noise_sizes(blocks: Sequence[nn.Module], first_size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Shape (convolutions, h, w) of each block's spatial noise. first_size: input size of the first block."""
    sizes, (height, width) = [], first_size
    for block in blocks:
        assert isinstance(block, SynthesisBlock)
        factor = 2 if block.up else 1
        height, width = height * factor, width * factor
        sizes.append((len(block.convs), height, width))
    return sizes


def split_noise(noise: Tensor, sizes: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """Split noise [B, N] into one tensor [B, convolutions, h, w] per block, in order."""
    parts = noise.split([math.prod(size) for size in sizes], dim=1)
    return [part.view(len(noise), *size) for part, size in zip(parts, sizes, strict=True)]


def initialize(network: nn.Module, rng: torch.Generator) -> None:
    """Sample the weights of all layers with `rng`, inner layers first, in the order of the network.

    It calls the method `initialize(rng)` of each layer that has one. Embeddings are N(0, 1), and
    normalizations keep torch's initial values.
    """
    for child in network.children():
        initialize(child, rng)
    if isinstance(network, nn.Embedding):
        nn.init.normal_(network.weight, generator=rng)
    initialize_layer: Callable[[torch.Generator], None] | None = getattr(network, "initialize", None)
    if initialize_layer is not None:
        initialize_layer(rng)
