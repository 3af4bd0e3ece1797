"""PixArt-alpha and PixArt-sigma: a transformer that attends to masked hidden states of a T5."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from d2g.diffusion.conditioning import Conditioning, TextConditioner
from d2g.diffusion.families.base import (
    ANY_SCHEDULER,
    EMPTY_PROMPT,
    T5_CLASSES,
    T5_TOKENIZER_CLASSES,
    VAE_CLASSES,
    Components,
    Family,
    Pipeline,
    expect_width,
)

_T5_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""max_sequence_length of diffusers' own pipelines, by default."""


class PixArtConditioner(TextConditioner):
    """T5's hidden states and padding mask of captions in lower case, cut to `t5_tokens`."""

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        tokenizers: Mapping[str, Any],
        facts: Mapping[str, Any] | None = None,
        t5_tokens: int = 120,
    ) -> None:
        super().__init__(models, tokenizers, facts)
        self.t5_tokens = t5_tokens

    def token_length(self, component: str) -> int:
        """As in diffusers' pipeline, whatever the tokenizer says."""
        return self.t5_tokens

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> hidden states [B, L, D] and their mask [B, L]."""
        captions = [prompt.lower().strip() for prompt in prompts]
        tokens = self.tokenize("tokenizer", captions)
        model: Any = self.models["text_encoder"]
        mask = tokens.attention_mask.to(next(model.parameters()).device)
        hidden = self.run("text_encoder", tokens.input_ids, attention_mask=mask)[0]
        return Conditioning({"hidden": hidden, "mask": mask})


class PixArt(Family):
    """PixArtAlphaPipeline and PixArtSigmaPipeline."""

    name = "pixart"
    title = "PixArt-alpha, PixArt-sigma"
    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    components: ClassVar[Components] = {
        "transformer": ("PixArtTransformer2DModel", "Transformer2DModel"),  # the second: its name until 2024
        "vae": VAE_CLASSES,
        "text_encoder": T5_CLASSES,
        "tokenizer": T5_TOKENIZER_CLASSES,
        "scheduler": ANY_SCHEDULER,
    }
    network = "transformer"
    schedules = ("vp",)

    def conditioner(
        self, pipeline: Pipeline, config: Any, models: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]
    ) -> PixArtConditioner:
        """Takes the number of tokens from the class of the pipeline."""
        encoder: Any = models["text_encoder"]
        expect_width(pipeline, "text", encoder.config.d_model, config.caption_channels)
        facts = {
            "no_prompt": EMPTY_PROMPT,
            "t5_tokens": _T5_TOKENS[pipeline.kind],
            "captions": "lower case, stripped",
            "micro_conditions": "height, width, height / width" if _takes_size(config) else None,
        }
        return PixArtConditioner(models, tokenizers, facts, t5_tokens=_T5_TOKENS[pipeline.kind])

    def forward(
        self,
        network: Any,
        config: Any,
        x: Tensor,
        t: Tensor | float,
        cond: Conditioning,
        downscale: int,
        guidance_embedding: Tensor | None = None,
    ) -> Tensor:
        """Masked hidden states, and the size and aspect ratio of the image where the network takes them."""
        # Micro-conditions, in pixels; networks without them expect None.
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if _takes_size(config):
            height, width = (downscale * side for side in x.shape[-2:])
            size = x.new_full((len(x), 2), height, dtype=torch.float32)
            size[:, 1] = width
            added = {"resolution": size, "aspect_ratio": x.new_full((len(x), 1), height / width).float()}
        output: Tensor = network(
            x,
            encoder_hidden_states=cond.tensors["hidden"],
            encoder_attention_mask=cond.tensors["mask"],
            timestep=t,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return output


def _takes_size(config: Any) -> bool:
    """Whether a network takes the size of the image: by its config, else if its latents are 128 x 128."""
    configured = config.use_additional_conditions
    return config.sample_size == 128 if configured is None else bool(configured)
