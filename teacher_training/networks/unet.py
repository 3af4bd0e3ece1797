"""A U-Net of pixels, trained on epsilon prediction with Stable Diffusion's noise schedule."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2g.diffusion import pretrained
from teacher_training.config import PixelUNetConfig, TeacherConfig
from teacher_training.data import TrainingPictures
from teacher_training.networks.epsilon_loss import epsilon_loss, min_snr_weights
from teacher_training.networks.kind import NetworkKind
from teacher_training.networks.pixel_unet import PixelNetwork, Predict


class PixelUNet(PixelNetwork):
    """A variance-preserving U-Net of pixels."""

    def __init__(self, pictures: TrainingPictures, side: int, config: PixelUNetConfig, seed: int) -> None:
        super().__init__(pictures, side, config, seed)
        self.schedule = pretrained.sd_schedule()
        self.weights = min_snr_weights(self.schedule, config.min_snr_gamma)

    @property
    def scheduler(self) -> Any:
        """DDIM with Stable Diffusion's betas."""
        return pretrained.new_sd_scheduler()

    def pixel_loss(
        self, x0: Tensor, generator: torch.Generator, predict: Predict
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted error of epsilon."""
        return epsilon_loss(x0, self.schedule, self.weights, generator, predict)


def _build(
    config: TeacherConfig, pictures: TrainingPictures, shape: tuple[int, int], folder: Path, first: bool
) -> PixelUNet:
    return PixelUNet(pictures, shape[1], config.pixel_unet, config.seed)


PIXEL_UNET_NETWORK = NetworkKind(
    name="unet",
    title="a U-Net of pixels",
    pipeline="DDPMPipeline",
    component="unet",
    stages=("data", "pixel_unet"),
    prompts="label",
    build=_build,
)
