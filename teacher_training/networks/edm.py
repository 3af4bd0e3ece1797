"""A U-Net of pixels with the preconditioning and the training noise of EDM (Karras et al. 2022)."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2g.core.transfer import to_device
from d2g.diffusion import pretrained
from teacher_training.config import EDMConfig, TeacherConfig
from teacher_training.data import TrainingPictures
from teacher_training.networks.kind import NetworkKind
from teacher_training.networks.pixel_unet import PixelNetwork, Predict


class EDMExample(NamedTuple):
    """A training example of the network F: input [B, C, h, w], c_noise [B], target [B, C, h, w]."""

    input: Tensor
    c_noise: Tensor
    target: Tensor


def training_example(x0: Tensor, noise: Tensor, sigma: Tensor, sigma_data: float) -> EDMExample:
    """Clean rows x0 and noise [B, C, h, w] at noise levels [B] as an example for F (eq. 8).

    With the weight lambda = 1 / c_out^2 the loss of D is the plain squared error of F against
    (x0 - c_skip x) / c_out, where x = x0 + sigma noise (Table 1: c_skip, c_out, c_in, c_noise).
    """
    s = sigma.view(-1, 1, 1, 1)
    total = (s.square() + sigma_data**2).sqrt()
    x = x0 + s * noise
    c_skip, c_out = (sigma_data / total).square(), s * sigma_data / total
    return EDMExample(x / total, sigma.log() / 4, (x0 - c_skip * x) / c_out)


class EDMUNet(PixelNetwork):
    """A U-Net of pixels, preconditioned."""

    def __init__(self, pictures: TrainingPictures, side: int, config: EDMConfig, seed: int) -> None:
        super().__init__(pictures, side, config, seed)
        self.config = config

    @property
    def scheduler(self) -> Any:
        """EDMEulerScheduler with the settings' noise levels."""
        names = ("sigma_min", "sigma_max", "sigma_data", "rho")
        return pretrained.new_model(
            "EDMEulerScheduler", **{name: getattr(self.config, name) for name in names}
        )

    def pixel_loss(
        self, x0: Tensor, generator: torch.Generator, predict: Predict
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The squared error of F at noise levels with a normal ln sigma."""
        noise = to_device(torch.randn(x0.shape, generator=generator), x0.device)
        log_sigma = to_device(torch.randn(len(x0), generator=generator), x0.device)
        sigma = (self.config.log_sigma_mean + self.config.log_sigma_std * log_sigma).exp()
        example = training_example(x0, noise, sigma, self.config.sigma_data)
        loss = (predict(example.input, example.c_noise).float() - example.target).square().mean()
        return loss, {"loss/mse": loss}


def _build(
    config: TeacherConfig, pictures: TrainingPictures, shape: tuple[int, int], folder: Path, first: bool
) -> EDMUNet:
    return EDMUNet(pictures, shape[1], config.edm, config.seed)


EDM_NETWORK = NetworkKind(
    name="edm",
    title="an EDM U-Net of pixels",
    pipeline="DDPMPipeline",
    component="unet",
    stages=("data", "edm"),
    prompts="label",
    build=_build,
)
