"""A text encoder and a U-Net of latents, trained together on epsilon prediction with caption dropout."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2g.core.errors import UserError
from d2g.core.transfer import device_of, to_device
from d2g.diffusion import pretrained
from d2g.diffusion.families.sd import SDConditioner
from d2g.diffusion.pipelines import open_pipeline
from d2g.diffusion.schedule import Schedule
from d2g.diffusion.teacher import Teacher
from teacher_training.config import DenoiserConfig, TeacherConfig
from teacher_training.data import TrainingPictures
from teacher_training.loop import LossFn
from teacher_training.networks.epsilon_loss import epsilon_loss, min_snr_weights
from teacher_training.networks.kind import NetworkKind, TrainableNetwork


def build_denoiser(
    config: DenoiserConfig, tokenizer: Any, latent_channels: int, latent_size: int
) -> tuple[SDConditioner, nn.Module]:
    """Build an untrained text encoder and UNet2DConditionModel, with cross-attention at every scale."""
    levels = len(config.channels)
    unet = pretrained.new_unet(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        layers_per_block=config.layers_per_block,
        block_out_channels=config.channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=config.text_width,
        attention_head_dim=config.heads,  # diffusers reads this as the number of heads, as in SD 1.5's config
        norm_num_groups=8,
    )
    text = pretrained.new_conditioner(tokenizer, config.text_width, config.text_layers, config.heads)
    return text, unet


def check_init(name: str) -> None:
    """Raise UserError unless this teacher can be trained further: Stable Diffusion that predicts epsilon."""
    pipeline = open_pipeline(name)
    if pipeline.family.name != "sd":
        raise UserError(f"--init {name} is a {pipeline.kind}; expected a StableDiffusionPipeline")
    schedule = pretrained.load_schedule(name)
    if not isinstance(schedule, Schedule) or schedule.prediction != "epsilon":
        kind = schedule.prediction
        raise UserError(f"--init {name} predicts {kind}; expected a teacher that predicts epsilon")


class TextUNet(TrainableNetwork):
    """A text encoder and its U-Net."""

    def __init__(self, text: SDConditioner, unet: nn.Module, config: DenoiserConfig) -> None:
        self.text, self.unet, self.config = text, unet, config
        self.modules = {"text": text.models["text_encoder"], "unet": unet}

    def loss(self, inputs: Tensor, prompts: Sequence[str]) -> LossFn:
        """The error of epsilon on latents, with captions."""
        tokens, empty = self.text.tokens(prompts), self.text.tokens([""])
        schedule = pretrained.sd_schedule()
        weights, device = min_snr_weights(schedule, self.config.min_snr_gamma), device_of(self.unet)

        def loss_of(rows: list[int], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            def predict(x: Tensor, t: Tensor) -> Tensor:
                # Replace some captions with the empty one, for classifier-free guidance.
                dropped = torch.rand(len(rows), 1, generator=generator) < self.config.caption_dropout
                hidden = self.text(torch.where(dropped, empty, tokens[rows])).tensors["hidden"]
                epsilon: Tensor = self.unet(x, t, hidden).sample
                return epsilon

            return epsilon_loss(to_device(inputs[rows], device), schedule, weights, generator, predict)

        return loss_of

    def save(self, folder: Path, vae: Any) -> None:
        """Save a StableDiffusionPipeline."""
        pretrained.save_pipeline(
            folder, unet=self.unet, vae=vae, conditioner=self.text, set_alpha_to_one=True
        )

    def teacher(self, teacher: Teacher, modules: Mapping[str, nn.Module]) -> Teacher:
        """Return the teacher with the text encoder and the U-Net of `modules`."""
        teacher.conditioner.models["text_encoder"] = modules["text"]
        return replace(teacher, network=modules["unet"])


def _build(
    config: TeacherConfig, pictures: TrainingPictures, shape: tuple[int, int], folder: Path, first: bool
) -> TextUNet:
    """The text encoder and U-Net of `init`, else fresh ones of the settings' shape.

    Raises UserError for an `init` whose U-Net takes other latents.
    """
    channels, side = shape
    # The first time the tokenizer is trained on the captions, or that of `init` is copied.
    if not first:
        tokenizer = pretrained.load_tokenizer(str(folder))
    elif config.init:
        tokenizer = pretrained.load_tokenizer(config.init)
        tokenizer.save_pretrained(folder / "tokenizer")
    else:
        vocab_size, max_length = config.unet.vocab_size, config.unet.max_length
        tokenizer = pretrained.new_tokenizer(pictures.prompts, folder / "tokenizer", vocab_size, max_length)
    if not config.init:
        torch.manual_seed(config.seed)
        text, unet = build_denoiser(config.unet, tokenizer, channels, side)
        return TextUNet(text, unet, config.unet)
    unet = pretrained.load_unet(config.init)
    if unet.config.in_channels != channels:
        raise UserError(
            f"--init {config.init} takes latents of {unet.config.in_channels} channels, the autoencoder "
            f"{config.pretrained_vae} makes {channels}; leave --vae out, or give another"
        )
    unet.register_to_config(sample_size=side)
    loaded: Any = pretrained.load_conditioner(config.init)
    conditioner = SDConditioner(dict(loaded.models.items()), {"tokenizer": tokenizer})
    return TextUNet(conditioner, unet, config.unet)


TEXT_UNET_NETWORK = NetworkKind(
    name="unet_text",
    title="a U-Net of latents and captions",
    pipeline="StableDiffusionPipeline",
    component="unet",
    stages=("data", "vae", "unet", "lpips", "clip"),
    prompts="text",
    takes_init=True,
    build=_build,
)
