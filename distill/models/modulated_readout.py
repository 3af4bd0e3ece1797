"""Conditional logits of a feature map, as in GigaGAN's discriminators (arXiv 2303.05511, section 3.3).

Written from memory of the paper. Unspecified choices: method.md "Discriminators of GigaGAN".
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.models.condition_vector import ConditionShape
from distill.models.style_generator import CLASS_WIDTH
from distill.models.style_layers import (
    ACTIVATION_GAIN,
    LEAKY_SLOPE,
    EqualizedConv,
    ModulatedConv,
    Style,
    normalize_second_moment,
)

LAYERS = 4
"""Number of modulated convolutions of a readout (GigaGAN, section 3.3)."""


class ModulatedReadout(nn.Module):
    """Logits psi(f, c) + u(f) of features f under a condition c (GigaGAN, section 3.3).

    psi consists of 1x1 convolutions that are modulated by c, u is a 1x1 convolution without it. For an
    unconditional teacher, the logits are u(f).
    """

    def __init__(self, channels: int, shape: ConditionShape) -> None:
        super().__init__()
        self.unconditional = EqualizedConv(channels, 1, 1)
        self.classes = nn.Embedding(shape.classes, CLASS_WIDTH) if shape.classes else None
        width = shape.text_width or (CLASS_WIDTH if shape.classes else 0)
        outputs = [*[channels] * (LAYERS - 1), 1] if width else []
        self.styles = nn.ModuleList(Style(width, channels) for _ in outputs)
        # The last convolution outputs logits, which are not demodulated.
        self.convs = nn.ModuleList(ModulatedConv(channels, n, 1, demodulate=n > 1) for n in outputs)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(n, 1, 1)) for n in outputs)

    def forward(self, features: Tensor, cond: Tensor | None) -> Tensor:
        """features [B, C, h, w]; cond: class numbers [B], text [B, D], or None -> logits [B, 1, h, w]."""
        logits: Tensor = self.unconditional(features)
        if not len(self.convs):
            return logits
        assert cond is not None, "a readout with a condition"
        code = normalize_second_moment(cond if self.classes is None else self.classes(cond))
        layers = list(zip(self.styles, self.convs, self.biases, strict=True))
        x = features
        for number, (style, conv, bias) in enumerate(layers):
            x = conv(x, style(code.to(x.dtype))) + bias
            if number < len(layers) - 1:
                x = F.leaky_relu(x, LEAKY_SLOPE) * ACTIVATION_GAIN
        return logits + x
