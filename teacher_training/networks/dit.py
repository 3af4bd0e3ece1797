"""A class-conditional DiT (Peebles and Xie 2023) of latents, trained on epsilon prediction."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2g.core.transfer import device_of, to_device
from d2g.diffusion import pretrained
from teacher_training.config import DiTConfig, TeacherConfig
from teacher_training.data import TrainingPictures
from teacher_training.loop import LossFn
from teacher_training.networks.epsilon_loss import epsilon_loss, min_snr_weights
from teacher_training.networks.kind import (
    NetworkKind,
    TrainableNetwork,
    class_labels,
    drop_labels,
)


def build_dit(config: DiTConfig, channels: int, side: int, classes: int) -> nn.Module:
    """An untrained DiTTransformer2DModel for latents [B, channels, side, side].

    As in the paper (section 3.2, adaLN-Zero), every block starts as the identity and the prediction as zero.
    """
    transformer: Any = pretrained.new_model(
        "DiTTransformer2DModel",
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        num_layers=config.layers,
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        patch_size=config.patch,
        num_embeds_ada_norm=classes,
    )
    modulations = [block.norm1.linear for block in transformer.transformer_blocks]
    for layer in (*modulations, transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    # diffusers would drop labels with global random numbers; the loss drops them, reproducibly.
    for module in transformer.modules():
        if type(module).__name__ == "LabelEmbedding":
            module.dropout_prob = 0.0
    network: nn.Module = transformer
    return network


class TrainableDiT(TrainableNetwork):
    """A DiT and the names of its classes."""

    def __init__(self, network: nn.Module, classes: list[str], config: DiTConfig) -> None:
        self.network, self.classes, self.config = network, classes, config
        self.modules = {"network": network}

    def loss(self, inputs: Tensor, prompts: Sequence[str]) -> LossFn:
        """The error of epsilon on latents, with classes."""
        labels, schedule = class_labels(prompts), pretrained.sd_schedule()
        weights, device = min_snr_weights(schedule, self.config.min_snr_gamma), device_of(self.network)

        def loss_of(rows: list[int], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            def predict(x: Tensor, t: Tensor) -> Tensor:
                # The label after the last class stands for no class.
                null = len(self.classes)
                kept_labels = drop_labels(labels[rows], self.config.class_dropout, null, generator)
                epsilon: Tensor = self.network(x, t, class_labels=to_device(kept_labels, device)).sample
                return epsilon

            return epsilon_loss(to_device(inputs[rows], device), schedule, weights, generator, predict)

        return loss_of

    def save(self, folder: Path, vae: Any) -> None:
        """Save a DiTPipeline with the class names."""
        pretrained.save_diffusers_pipeline(
            folder,
            "DiTPipeline",
            {"id2label": dict(enumerate(self.classes))},
            transformer=self.network,
            vae=vae,
            scheduler=pretrained.new_sd_scheduler(),
        )


def _build(
    config: TeacherConfig, pictures: TrainingPictures, shape: tuple[int, int], folder: Path, first: bool
) -> TrainableDiT:
    assert pictures.classes is not None, "the pictures were checked before"
    torch.manual_seed(config.seed)
    network = build_dit(config.dit, *shape, len(pictures.classes))
    return TrainableDiT(network, pictures.classes, config.dit)


DIT_NETWORK = NetworkKind(
    name="dit",
    title="a DiT",
    pipeline="DiTPipeline",
    component="transformer",
    stages=("data", "vae", "dit", "lpips"),
    prompts="label",
    needs_classes=True,
    build=_build,
)
