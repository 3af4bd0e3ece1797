"""Stable Diffusion 1.x and 2.x: a U-Net that attends to the last hidden states of a CLIP text model."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from d2g.core.errors import UserError
from d2g.diffusion.conditioning import CLIPConditioner, Conditioning
from d2g.diffusion.families.base import (
    ANY_SCHEDULER,
    CLIP_CLASSES,
    CLIP_TOKENIZER_CLASSES,
    EMPTY_PROMPT,
    VAE_CLASSES,
    Components,
    Pipeline,
    expect_addition,
    expect_width,
)
from d2g.diffusion.families.unet import TextUNetFamily


class SDConditioner(CLIPConditioner):
    """Last hidden states [B, L, D] of the text model, as StableDiffusionPipeline encodes prompts."""

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [B, L], padded and cut to the text model's length."""
        ids: Tensor = self.tokenize("tokenizer", prompts).input_ids
        return ids

    def forward(self, tokens: Tensor) -> Conditioning:
        """Token ids [B, L] -> hidden states [B, L, D]."""
        return Conditioning.from_text(self.run("text_encoder", tokens)[0])


class StableDiffusion(TextUNetFamily):
    """StableDiffusionPipeline: epsilon, v, zero terminal SNR, EDM."""

    name = "sd"
    title = "Stable Diffusion 1.x, 2.x"
    pipelines = ("StableDiffusionPipeline",)
    components: ClassVar[Components] = {
        "unet": ("UNet2DConditionModel",),
        "vae": VAE_CLASSES,
        "text_encoder": CLIP_CLASSES,
        "tokenizer": CLIP_TOKENIZER_CLASSES,
        "scheduler": ANY_SCHEDULER,
    }

    # StableDiffusionPipeline's constructor corrects files of 2022.
    scheduler_settings: ClassVar[Mapping[str, Any]] = {"steps_offset": 1, "clip_sample": False}

    def corrected_config(self, component: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """U-Nets saved before diffusers 0.9 have a `sample_size` of 32 in place of 64."""
        version = re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version")))
        early = version is not None and (int(version[1]), int(version[2])) < (0, 9)
        size = config.get("sample_size")
        small = isinstance(size, int) and size < 64
        enlarged = {"sample_size": 64} if component == "unet" and early and small else {}
        return super().corrected_config(component, config) | enlarged

    def conditioner(
        self, pipeline: Pipeline, config: Any, models: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]
    ) -> SDConditioner:
        """Refuses SDXL's U-Net and text models with an attention mask."""
        expect_addition(pipeline, config, None)
        encoder: Any = models["text_encoder"]
        expect_width(pipeline, "text", encoder.config.hidden_size, config.cross_attention_dim)
        if getattr(encoder.config, "use_attention_mask", False):
            raise UserError(
                f"teacher {pipeline.folder}: text_encoder has use_attention_mask; CLIP's have none"
            )
        return SDConditioner(models, tokenizers, {"no_prompt": EMPTY_PROMPT})
