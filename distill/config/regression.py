"""Settings of the regression losses."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from d2g.core.config import check_values, nearest, require, setting
from d2g.core.errors import SettingError
from latent_lpips.config import AUGMENT_FAMILIES, are_augment_families

Reduction = Literal["mean", "sum"]
RegressionName = Literal[
    "mse", "l1", "pseudo_huber", "lpips", "latent_lpips", "e_latent_lpips", "decoder_features"
]
"""Regression losses, in the order of docs. `distill/losses/regression/NAME.py` defines each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegressionConfig:
    """The distance between student and teacher latents: a weighted sum of losses."""

    losses: tuple[tuple[RegressionName, float], ...] = setting(
        (("e_latent_lpips", 1.0),),
        "Losses and weights, as `name:weight,name:weight`. lpips compares decoded images (the paper uses it "
        "for CIFAR10, in pixels); the paper's SD-CFG-3 adds latent_lpips with weight 1; the others "
        "reproduce the comparison of losses or come from later work. [] trains a GAN without regression: on "
        "the latents of pairs (ADM, arXiv 2507.18569), or on real images without pairs (D2O, arXiv "
        "2405.20750)",
        source='Table A1; method.md "Comparison of regression losses"',
        recipe=True,
    )
    augment: str = setting(
        "bgco",
        "Augmentation families of e_latent_lpips: b blitting, g geometry, c color, o cutout, or none; the "
        "paper uses bgo for SD-CFG-3",
        source='Table A1; method.md "E-LatentLPIPS"',
        recipe=True,
    )
    draws: int = setting(
        1,
        "Random transforms per row and step that e_latent_lpips averages over",
        source='method.md "E-LatentLPIPS"',
    )
    huber_c: float = setting(
        0.00054,
        "Pseudo-Huber constant per dimension: c = huber_c sqrt(C h w)",
        source="Song and Dhariwal 2024, section 3.3",
    )
    lpips_net: Literal["vgg", "alex", "squeeze"] = setting("vgg", "Network of lpips", source="DMD, B.1")
    lpips_weights: str = setting(
        "", "Torchvision's weight file of the lpips network; empty takes it from PyTorch's hub folder"
    )
    lpips_resize: int = setting(
        0,
        "Side in pixels to which images are enlarged for lpips; 0 keeps their size",
        source="DMD, B.1: 224 on CIFAR10",
    )
    decoder_blocks: int = setting(
        3,
        "Up blocks of the VAE's decoder that decoder_features compares, after the middle block",
        source="LPL, arXiv 2411.04873, section 4",
    )

    def __post_init__(self) -> None:
        # Names first: `check_values` does not look into pairs.
        names = [name for name, _ in self.losses]
        for name in names:
            if name not in get_args(RegressionName):
                raise SettingError(f"losses has {name!r}{nearest(name, get_args(RegressionName))}")
        positive = all(0 < weight < math.inf for _, weight in self.losses)
        # A repeated name would hide one of its weights.
        require(
            self,
            losses=(
                len(set(names)) == len(names) and positive,
                "names, each once, with positive weights, such as e_latent_lpips:1,latent_lpips:1",
            ),
        )
        # Types and choices, then ranges.
        check_values(self)
        require(
            self,
            augment=(
                are_augment_families(self.augment),
                f"'none' or letters of {AUGMENT_FAMILIES!r}, each once",
            ),
            draws=(self.draws >= 1, "1 or more"),
            huber_c=(self.huber_c > 0, "a positive number"),
            lpips_resize=(self.lpips_resize >= 0, "pixels, or 0"),
            decoder_blocks=(self.decoder_blocks >= 0, "0 or more"),
        )

    @property
    def names(self) -> tuple[RegressionName, ...]:
        """The names of the losses."""
        return tuple(name for name, _ in self.losses)
