"""`NetworkKind`: how `d2g teacher train` builds, trains and saves one kind of network."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from d2g.diffusion.teacher import Teacher
from teacher_training.config import NETWORK_GROUPS, NetworkName, TeacherConfig
from teacher_training.data import TrainingPictures
from teacher_training.loop import LossFn


class TrainableNetwork(ABC):
    """The network of a teacher while it is trained, with what else has its own weights.

    modules: what is trained, by the names that checkpoints use.
    """

    modules: Mapping[str, nn.Module]

    def to(self, device: torch.device | str) -> None:
        """Move what is trained to a device, in place."""
        for module in self.modules.values():
            module.to(device)

    @abstractmethod
    def loss(self, inputs: Tensor, prompts: Sequence[str]) -> LossFn:
        """The training loss on scaled latents [N, C, h, w], or for networks in pixels on uint8 images
        [N, 3, S, S], with N prompts. Inputs stay on the CPU; each batch goes to the network's device."""

    @abstractmethod
    def save(self, folder: Path, vae: Any) -> None:
        """Save the pipeline with these weights. vae: its autoencoder; networks in pixels do not read it."""

    def teacher(self, teacher: Teacher, modules: Mapping[str, nn.Module]) -> Teacher:
        """A loaded teacher with other weights: `modules` as in this class."""
        return replace(teacher, network=modules["network"])


@dataclass(frozen=True, kw_only=True)
class NetworkKind:
    """A value of `network`."""

    name: NetworkName
    title: str
    """Its name in messages."""
    pipeline: str
    """Class of its pipelines in diffusers."""
    component: str
    """The component of the pipeline that denoises."""
    stages: tuple[str, ...]
    """All stages of its training, in order; that of the network is `stage`."""
    prompts: Literal["text", "label"]
    """What it reads: captions, or classes if the pictures have any."""
    needs_classes: bool = False
    """Whether it cannot be trained on pictures without classes."""
    takes_init: bool = False
    """Whether its training can start from another teacher."""
    build: Callable[[TeacherConfig, TrainingPictures, tuple[int, int], Path, bool], TrainableNetwork]
    """(settings, pictures, (channels, side) of the latents or pixels, folder of the pipeline so far, whether
    nothing is saved there yet) -> the network with its initial weights. Equal settings and pictures give
    equal weights."""

    @property
    def stage(self) -> str:
        """The stage that trains the network, and the group of its settings."""
        return NETWORK_GROUPS[self.name]


def class_labels(prompts: Sequence[str]) -> Tensor:
    """Class numbers in decimal as int64 [N]."""
    return torch.tensor([int(prompt) for prompt in prompts], dtype=torch.int64)


def drop_labels(labels: Tensor, share: float, null_label: int, generator: torch.Generator) -> Tensor:
    """Labels [B], a random `share` of them replaced by the label of no class. Draws B numbers."""
    dropped = torch.rand(len(labels), generator=generator) < share
    return torch.where(dropped, null_label, labels)
