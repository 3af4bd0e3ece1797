"""Base of pixel-space U-Nets, variance-preserving and EDM: shape, classes, pipeline."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2g.core.transfer import device_of, to_device
from d2g.diffusion import pretrained
from d2g.diffusion.latents import from_uint8
from teacher_training.config import PixelNetworkConfig
from teacher_training.data import TrainingPictures
from teacher_training.loop import LossFn
from teacher_training.networks.kind import TrainableNetwork, class_labels, drop_labels


def build_pixel_unet(config: PixelNetworkConfig, side: int, embeddings: int | None) -> nn.Module:
    """An untrained UNet2DModel for RGB pixels [B, 3, side, side], with attention at the lowest level.

    embeddings: number of embedded class labels, that of no class included; None without classes.
    """
    above = len(config.channels) - 1
    unet: nn.Module = pretrained.new_model(
        "UNet2DModel",
        sample_size=side,
        in_channels=3,
        out_channels=3,
        layers_per_block=config.layers_per_block,
        block_out_channels=config.channels,
        down_block_types=("DownBlock2D",) * above + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * above,
        attention_head_dim=config.head_width,
        norm_num_groups=8,
        num_class_embeds=embeddings,
    )
    return unet


Predict = Callable[[Tensor, Tensor], Tensor]
"""The network's output from its input [B, 3, S, S] and its time input [B]."""


class PixelNetwork(TrainableNetwork):
    """A UNet2DModel of pixels; `classes` are None for an unconditional one."""

    def __init__(self, pictures: TrainingPictures, side: int, config: PixelNetworkConfig, seed: int) -> None:
        self.classes = pictures.classes
        self.class_dropout = config.class_dropout if self.classes else 0.0
        torch.manual_seed(seed)
        embeddings = len(self.classes) + (self.class_dropout > 0) if self.classes else None
        self.network = build_pixel_unet(config, side, embeddings)
        self.modules = {"network": self.network}

    @property
    @abstractmethod
    def scheduler(self) -> Any:
        """The scheduler of its pipeline."""

    @abstractmethod
    def pixel_loss(
        self, x0: Tensor, generator: torch.Generator, predict: Predict
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss on pixels x0 [B, 3, S, S] in [-1, 1], and values for the log."""

    def loss(self, inputs: Tensor, prompts: Sequence[str]) -> LossFn:
        """`pixel_loss` on uint8 images, with their classes."""
        labels, device = class_labels(prompts) if self.classes else None, device_of(self.network)

        def loss_of(rows: list[int], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            def predict(x: Tensor, t: Tensor) -> Tensor:
                batch_labels = None if labels is None else labels[rows]
                # The label after the last class stands for no class.
                if batch_labels is not None and self.classes and self.class_dropout:
                    batch_labels = drop_labels(batch_labels, self.class_dropout, len(self.classes), generator)
                output: Tensor = self.network(x, t, class_labels=to_device(batch_labels, device)).sample
                return output

            return self.pixel_loss(from_uint8(to_device(inputs[rows], device)), generator, predict)

        return loss_of

    def save(self, folder: Path, vae: Any) -> None:
        """Save a DDPMPipeline, whose index holds the class names and the label that means no class."""
        index: dict[str, Any] = {}
        if self.classes:
            index["id2label"] = dict(enumerate(self.classes))
            if self.class_dropout:
                index["null_class"] = len(self.classes)
        pretrained.save_diffusers_pipeline(
            folder, "DDPMPipeline", index, unet=self.network, scheduler=self.scheduler
        )
