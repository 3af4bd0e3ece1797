"""SDXL: a U-Net that takes the states of two CLIP text models, a pooled embedding, and the image size."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from d2g.core.errors import UserError
from d2g.diffusion.conditioning import CLIPConditioner, Conditioning
from d2g.diffusion.families.base import (
    ANY_SCHEDULER,
    CLIP_CLASSES,
    CLIP_POOLED_CLASSES,
    CLIP_TOKENIZER_CLASSES,
    EMPTY_PROMPT,
    VAE_CLASSES,
    Components,
    Pipeline,
    expect_addition,
    expect_width,
)
from d2g.diffusion.families.unet import TextUNetFamily

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")


class SDXLConditioner(CLIPConditioner):
    """Next-to-last hidden states of two text models side by side, and the pooled output of the second one.

    `zero_null`: zeros are the unconditional row (the default of SDXL's pipeline), not the empty prompt.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        tokenizers: Mapping[str, Any],
        facts: Mapping[str, Any] | None = None,
        zero_null: bool = True,
    ) -> None:
        super().__init__(models, tokenizers, facts)
        self.zero_null = zero_null

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [B, 2, L], padded and cut to the text models' length."""
        return torch.stack([self.tokenize(name, prompts).input_ids for name in TOKENIZERS], dim=1)

    def forward(self, tokens: Tensor) -> Conditioning:
        """Token ids [B, 2, L] -> hidden states [B, L, D1 + D2] and pooled embeddings [B, P]."""
        outputs = [
            self.run(name, ids, output_hidden_states=True)
            for name, ids in zip(TEXT_ENCODERS, tokens.unbind(1), strict=True)
        ]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return Conditioning.from_text(hidden, outputs[-1][0])

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], null: bool = False) -> Conditioning:
        """Encode B prompts like every text conditioner, except that `zero_null` gives zeros."""
        if not (null and self.zero_null):
            return super().encode(prompts, null)
        rows = self.embed(prompts).tensors
        return Conditioning(rows, {name: torch.zeros_like(tensor[:1]) for name, tensor in rows.items()})


class StableDiffusionXL(TextUNetFamily):
    """StableDiffusionXLPipeline, base models; the time ids of a row are those of its own size, uncropped."""

    name = "sdxl"
    title = "Stable Diffusion XL"
    pipelines = ("StableDiffusionXLPipeline",)
    components: ClassVar[Components] = {
        "unet": ("UNet2DConditionModel",),
        "vae": VAE_CLASSES,
        "text_encoder": CLIP_CLASSES,
        "tokenizer": CLIP_TOKENIZER_CLASSES,
        "text_encoder_2": CLIP_POOLED_CLASSES,
        "tokenizer_2": CLIP_TOKENIZER_CLASSES,
        "scheduler": ANY_SCHEDULER,
    }

    def conditioner(
        self, pipeline: Pipeline, config: Any, models: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]
    ) -> SDXLConditioner:
        """Refuses the U-Nets of Stable Diffusion and of SDXL's refiner."""
        expect_addition(pipeline, config, "text_time")
        first: Any = models["text_encoder"]
        second: Any = models["text_encoder_2"]
        text = first.config.hidden_size + second.config.hidden_size
        expect_width(pipeline, "text", text, config.cross_attention_dim)
        width, pooled = config.projection_class_embeddings_input_dim, second.config.projection_dim
        if width != 6 * config.addition_time_embed_dim + pooled:
            raise UserError(
                f"teacher {pipeline.folder}: the UNet takes {width} added numbers; expected six time ids of "
                f"{config.addition_time_embed_dim} and {pooled} of text (SDXL's refiner cannot be a teacher)"
            )
        zeros = bool(pipeline.index.get("force_zeros_for_empty_prompt", True))
        facts = {
            "no_prompt": "zeros" if zeros else EMPTY_PROMPT,
            "time_ids": "height, width, 0, 0, height, width",
        }
        return SDXLConditioner(models, tokenizers, facts, zero_null=zeros)
