"""FLUX.1-dev: a transformer and a rectified flow, which takes the guidance scale as an input.

Pairs, students and discriminators use latents [C, h, w]; the 2 x 2 packing into tokens of 4 C channels and
the position ids are inside this file.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2g.core.errors import UserError
from d2g.diffusion.conditioning import Conditioning, TextConditioner
from d2g.diffusion.families.base import (
    ANY_SCHEDULER,
    CLIP_CLASSES,
    CLIP_TOKENIZER_CLASSES,
    T5_CLASSES,
    T5_TOKENIZER_CLASSES,
    VAE_CLASSES,
    Components,
    ExportFormat,
    Pipeline,
    expect_width,
)
from d2g.diffusion.families.transformer import (
    JOINT_LORA_TARGETS,
    TransformerFamily,
    TransformerInputs,
    added,
    run_joint_blocks,
)
from d2g.diffusion.latents import LatentSpace

_T5_TOKENS = 512
"""max_sequence_length of diffusers' own pipeline, by default."""


class FluxConditioner(TextConditioner):
    """T5's hidden states and CLIP's pooled output. There is no unconditional row: guidance is an input."""

    spells_out_words = True

    @property
    def has_null(self) -> bool:
        return False

    def token_length(self, component: str) -> int:
        """T5 gets as many tokens as in diffusers' pipeline, whatever its tokenizer says."""
        return _T5_TOKENS if component == "tokenizer_2" else super().token_length(component)

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> hidden states [B, 512, D] and pooled embeddings [B, P]."""
        clip_ids, t5_ids = (self.tokenize(name, prompts).input_ids for name in ("tokenizer", "tokenizer_2"))
        pooled = self.run("text_encoder", clip_ids).pooler_output
        hidden = self.run("text_encoder_2", t5_ids)[0]
        return Conditioning.from_text(hidden, pooled)


class Flux(TransformerFamily):
    """FluxPipeline with a guidance embedding, as FLUX.1-dev; FLUX.1-schnell has none and is refused."""

    name = "flux"
    title = "FLUX.1-dev"
    pipelines = ("FluxPipeline",)
    components: ClassVar[Components] = {
        "transformer": ("FluxTransformer2DModel",),
        "vae": VAE_CLASSES,
        "text_encoder": CLIP_CLASSES,
        "tokenizer": CLIP_TOKENIZER_CLASSES,
        "text_encoder_2": T5_CLASSES,
        "tokenizer_2": T5_TOKENIZER_CLASSES,
        "scheduler": ANY_SCHEDULER,
    }
    reads_shift = True
    schedules = ("flow",)
    regression = ("flow",)
    gan = ("flow",)
    lora = ("flow",)
    exports = tuple(ExportFormat(name, ("flow",)) for name in ("safetensors", "diffusers", "lora"))
    block_types = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    lora_targets = JOINT_LORA_TARGETS
    embedded_guidance = 3.5
    packing = 2
    default_size = 128  # diffusers' pipeline: 1024 pixels
    flow_spacing = "trailing"

    def check(self, pipeline: Pipeline, config: Any, space: LatentSpace) -> tuple[int, int, int]:
        """As for every family. Refuses networks without a guidance input or with other patches."""
        where = f"teacher {pipeline.folder}: {pipeline.class_name(self.network)}"
        if not config.guidance_embeds:
            raise UserError(
                f"{where} has guidance_embeds=false, as FLUX.1-schnell, which is distilled to few steps "
                "already; expected a FLUX.1-dev"
            )
        if config.patch_size != 1:
            raise UserError(f"{where} has patch_size={config.patch_size}; {pipeline.kind} feeds patches of 1")
        if sum(config.axes_dims_rope) != config.attention_head_dim or len(config.axes_dims_rope) != 3:
            raise UserError(
                f"{where} has axes_dims_rope={list(config.axes_dims_rope)}; expected three numbers with the "
                f"sum {config.attention_head_dim}, its attention_head_dim"
            )
        return super().check(pipeline, config, space)

    def conditioner(
        self, pipeline: Pipeline, config: Any, models: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]
    ) -> FluxConditioner:
        """Both text encoders must have the widths that the transformer takes."""
        clip: Any = models["text_encoder"]
        t5: Any = models["text_encoder_2"]
        expect_width(pipeline, "pooled text", clip.config.hidden_size, config.pooled_projection_dim)
        expect_width(pipeline, "T5's text", t5.config.d_model, config.joint_attention_dim)
        return FluxConditioner(models, tokenizers, {"t5_tokens": _T5_TOKENS})

    def depth(self, config: Any) -> int:
        """Blocks of both kinds."""
        return int(config.num_layers + config.num_single_layers)

    def call(self, network: Any, config: Any, inputs: TransformerInputs) -> Tensor:
        """Packed latents with their positions, T5's states, CLIP's pooled text, time and guidance."""
        text = inputs.tensor("hidden")
        output: Tensor = network(
            hidden_states=self.pack(inputs.x),
            timestep=inputs.t / 1000,
            guidance=inputs.cond.tensors["guidance"],
            pooled_projections=inputs.tensor("pooled"),
            encoder_hidden_states=text,
            txt_ids=_text_ids(text),
            img_ids=_image_ids(inputs.x),
            return_dict=False,
        )[0]
        return self.unpack(output, (inputs.x.shape[-2], inputs.x.shape[-1]))

    def block_outputs(
        self, network: Any, config: Any, inputs: TransformerInputs, extra: Tensor | None
    ) -> list[Tensor]:
        """As FluxTransformer2DModel.forward: double blocks keep text and image tokens apart, single blocks
        treat them alike."""
        tokens = network.x_embedder(self.pack(inputs.x))
        time, guidance = (
            number.to(tokens.dtype) * 1000 for number in (inputs.t / 1000, inputs.cond.tensors["guidance"])
        )
        modulation = network.time_text_embed(time, guidance, inputs.tensor("pooled"))
        text = network.context_embedder(inputs.tensor("hidden"))
        positions = network.pos_embed(torch.cat([_text_ids(text), _image_ids(inputs.x)]))
        return run_joint_blocks(
            [*network.transformer_blocks, *network.single_transformer_blocks],
            added(tokens, extra),
            text,
            temb=modulation,
            image_rotary_emb=positions,
        )

    def pack(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> tokens [B, h w / 4, 4 C]."""
        return F.pixel_unshuffle(latents, self.packing).flatten(2).transpose(1, 2)

    def unpack(self, packed: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens [B, h w / 4, 4 C] -> latents [B, C, h, w]; the inverse of `pack`."""
        grid = (size[0] // self.packing, size[1] // self.packing)
        return F.pixel_shuffle(packed.transpose(1, 2).unflatten(2, grid), self.packing)

    def pipeline_settings(self, pixels: tuple[int, int]) -> dict[str, Any]:
        """The size, because the pipeline takes packed latents and has a default of its own."""
        return {"height": pixels[0], "width": pixels[1]}

    def fake_conditioning(self, pipeline: Pipeline, config: Any, rows: int) -> Conditioning:
        """T5's states, CLIP's pooled text, and guidance scales."""
        hidden = torch.empty(rows, _T5_TOKENS, config.joint_attention_dim)
        cond = Conditioning.from_text(hidden, torch.empty(rows, config.pooled_projection_dim))
        return cond.with_guidance(torch.empty(rows))


def _image_ids(x: Tensor) -> Tensor:
    """Position ids [h w / 4, 3] of the tokens of latents [B, C, h, w]: 0, row, column."""
    rows, columns = (torch.arange(side // Flux.packing, device=x.device).float() for side in x.shape[-2:])
    grid = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(grid[0]), *grid], dim=-1).flatten(0, 1)


def _text_ids(text: Tensor) -> Tensor:
    """Position ids [L, 3] of text tokens [B, L, D]: zeros."""
    return torch.zeros(text.shape[1], 3, device=text.device)
