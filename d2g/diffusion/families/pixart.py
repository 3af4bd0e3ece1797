"""PixArt-alpha and PixArt-sigma: a transformer that attends to masked hidden states of a T5."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from d2g.core.transfer import to_device
from d2g.diffusion.conditioning import Conditioning, TextConditioner
from d2g.diffusion.families.base import (
    ANY_SCHEDULER,
    EMPTY_PROMPT,
    T5_CLASSES,
    T5_TOKENIZER_CLASSES,
    VAE_CLASSES,
    Components,
    ExportFormat,
    Pipeline,
    expect_width,
)
from d2g.diffusion.families.transformer import (
    TransformerFamily,
    TransformerInputs,
    added,
    attention_bias,
    run_blocks,
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
        mask = to_device(tokens.attention_mask, next(model.parameters()).device)
        hidden = self.run("text_encoder", tokens.input_ids, attention_mask=mask)[0]
        return Conditioning({"hidden": hidden, "mask": mask})


class PixArt(TransformerFamily):
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
    schedules = ("vp",)
    regression = ("vp",)
    gan = ("vp",)
    lora = ("vp",)
    exports = tuple(ExportFormat(name, ("vp",)) for name in ("safetensors", "diffusers"))
    not_exported = "no lora: its pipelines load no adapters"
    block_types = ("BasicTransformerBlock",)
    output_layers = ("norm_out", "proj_out", "scale_shift_table")

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

    def call(self, network: Any, config: Any, inputs: TransformerInputs) -> Tensor:
        """Masked hidden states, and the size and aspect ratio of the image where the network takes them."""
        output: Tensor = network(
            inputs.x,
            encoder_hidden_states=inputs.tensor("hidden"),
            encoder_attention_mask=inputs.cond.tensors["mask"],
            timestep=inputs.t,
            added_cond_kwargs=_micro_conditions(config, inputs.x, inputs.downscale),
            return_dict=False,
        )[0]
        return output

    def block_outputs(
        self, network: Any, config: Any, inputs: TransformerInputs, extra: Tensor | None
    ) -> list[Tensor]:
        """As PixArtTransformer2DModel.forward: one modulation for all blocks, cross-attention to masked
        text."""
        tokens = added(network.pos_embed(inputs.x), extra)
        modulation, _ = network.adaln_single(
            inputs.t,
            _micro_conditions(config, inputs.x, inputs.downscale),
            batch_size=len(inputs.x),
            hidden_dtype=tokens.dtype,
        )
        text = inputs.tensor("hidden")
        if network.caption_projection is not None:
            text = network.caption_projection(text)
        return run_blocks(
            network.transformer_blocks,
            tokens,
            encoder_hidden_states=text,
            encoder_attention_mask=attention_bias(inputs.tensor("mask")),
            timestep=modulation,
        )

    def pipeline_settings(self, pixels: tuple[int, int]) -> dict[str, Any]:
        """Captions without the pipeline's optional cleaning, and sizes as they are."""
        return {"clean_caption": False, "use_resolution_binning": False}

    def fake_conditioning(self, pipeline: Pipeline, config: Any, rows: int) -> Conditioning:
        """T5's states, none of them masked."""
        tokens = _T5_TOKENS[pipeline.kind]
        width = config.caption_channels or config.cross_attention_dim
        mask = torch.ones(rows, tokens, dtype=torch.int64)
        return Conditioning({"hidden": torch.empty(rows, tokens, width), "mask": mask})


def _micro_conditions(config: Any, x: Tensor, downscale: int) -> dict[str, Tensor | None]:
    """The size in pixels and the aspect ratio of images with latents x; None for networks without them."""
    if not _takes_size(config):
        return {"resolution": None, "aspect_ratio": None}
    height, width = (downscale * side for side in x.shape[-2:])
    size = x.new_full((len(x), 2), height, dtype=torch.float32)
    size[:, 1] = width
    return {"resolution": size, "aspect_ratio": x.new_full((len(x), 1), height / width).float()}


def _takes_size(config: Any) -> bool:
    """Whether a network takes the size of the image: by its config, else if its latents are 128 x 128."""
    configured = config.use_additional_conditions
    return config.sample_size == 128 if configured is None else bool(configured)
