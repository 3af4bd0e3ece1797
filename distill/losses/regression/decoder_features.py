"""Distance between features of the VAE's decoder: the latent perceptual loss (LPL, Berrada et al. 2025,
arXiv 2411.04873).

It needs no trained metric, so it works for every latent space whose autoencoder has diffusers' decoder.
docs/method.md ("Decoder features") says what differs from the authors' code.
"""

from typing import Any

import torch
from torch import Tensor

from d2g.core.errors import SettingError
from d2g.diffusion.latents import latent_space
from distill.config.regression import RegressionConfig
from distill.losses.regression.base import FrozenNetworks, RegressionLoss, RowDistance, Transforms

MAX_DEVIATION = 5.0
"""Positions where a target feature is more than this many standard deviations from its channel's mean are
masked. The paper masks outliers too; this threshold is ours.
"""
EPSILON = 1e-6
"""Added to the variance of a channel, which may be constant."""


class DecoderFeatures(RowDistance):
    """Squared distance of decoder features, normalized per channel, summed over blocks.

    It uses the features after the decoder's middle block and after its first `blocks` up blocks. The weight
    of features that are r times as large as the latents is 1 / r. Raises SettingError for an autoencoder
    without diffusers' decoder, and for more blocks than it has.
    """

    def __init__(self, vae: Any, blocks: int) -> None:
        super().__init__()
        decoder: Any = getattr(vae, "decoder", None)
        if not hasattr(decoder, "mid_block") or not hasattr(decoder, "up_blocks"):
            raise SettingError(
                "regression.losses has decoder_features, which reads an AutoencoderKL's decoder; "
                f"got {type(vae).__name__}; take another loss"
            )
        if blocks > len(decoder.up_blocks):
            raise SettingError(
                f"regression.decoder_blocks is {blocks}; expected at most {len(decoder.up_blocks)}, the up "
                "blocks of the VAE's decoder"
            )
        self.vae, self.blocks = vae.requires_grad_(False), blocks

    def features(self, latents: Tensor) -> list[Tensor]:
        """Scaled latents [B, C, h, w] -> features [B, C_l, h_l, w_l] after each block, in the VAE's dtype."""
        vae, decoder = self.vae, self.vae.decoder
        hidden = latent_space(vae).raw(latents).to(next(vae.parameters()).dtype)
        if vae.post_quant_conv is not None:
            hidden = vae.post_quant_conv(hidden)
        hidden = decoder.mid_block(decoder.conv_in(hidden))
        features = [hidden]
        for block in decoder.up_blocks[: self.blocks]:
            hidden = block(hidden)
            features.append(hidden)
        return features

    def forward(self, pred: Tensor, target: Tensor, transforms: Transforms = None) -> Tensor:
        """pred, target [B, C, h, w] scaled latents -> distance of each row [B]."""
        with torch.no_grad():
            target_features = self.features(target)
        distance = pred.new_zeros(len(pred))
        for predicted, expected in zip(self.features(pred), target_features, strict=True):
            # Normalize both with the statistics of the target's channels, and mask outliers.
            predicted, expected = predicted.float(), expected.float()
            variance, mean = torch.var_mean(expected, dim=(2, 3), keepdim=True, correction=0)
            scale = (variance + EPSILON).rsqrt()
            inlier = ((expected - mean) * scale).abs() <= MAX_DEVIATION

            # Mean squared error, with less weight for larger features.
            error = ((predicted - expected) * scale).square() * inlier
            enlargement = predicted.shape[-1] / pred.shape[-1]
            distance = distance + error.mean(dim=(1, 2, 3)) / enlargement
        return distance


def _build(config: RegressionConfig, networks: FrozenNetworks) -> DecoderFeatures:
    """Build the distance with the decoder of the teacher's autoencoder."""
    return DecoderFeatures(networks.vae, config.decoder_blocks)


DECODER_FEATURES_LOSS = RegressionLoss(
    name="decoder_features",
    log_key="loss/decoder_features",
    build=_build,
    needs=frozenset({"decoder"}),
    settings=("decoder_blocks",),
    describe=lambda config: f" of the middle block and {config.decoder_blocks} up blocks",
)
