"""Stable Diffusion 3 and 3.5: a transformer and a rectified flow, two CLIP text models and an optional T5."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from d2g.core.errors import UserError
from d2g.diffusion.conditioning import Conditioning, TextConditioner
from d2g.diffusion.families.base import (
    ANY_SCHEDULER,
    CLIP_POOLED_CLASSES,
    CLIP_TOKENIZER_CLASSES,
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
    JOINT_LORA_TARGETS,
    TransformerFamily,
    TransformerInputs,
    added,
    run_joint_blocks,
)

_T5_TOKENS = 256
"""max_sequence_length of diffusers' own pipeline, by default."""


class SD3Conditioner(TextConditioner):
    """Two CLIPs side by side, padded to T5's width, T5 after them, and both CLIPs' pooled outputs.

    `width`: of the hidden states. Without a T5, zeros take its place, as in diffusers.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        tokenizers: Mapping[str, Any],
        facts: Mapping[str, Any] | None = None,
        width: int = 4096,
    ) -> None:
        super().__init__(models, tokenizers, facts)
        self.width = width

    def token_length(self, component: str) -> int:
        """Both CLIPs get as many tokens as the first one's tokenizer says, as in diffusers' pipeline."""
        return _T5_TOKENS if component == "tokenizer_3" else super().token_length("tokenizer")

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> hidden states [B, L + 256, width] and pooled embeddings [B, P1 + P2]."""
        # Both CLIP models: next-to-last hidden states side by side, padded to T5's width.
        hidden, pooled = [], []
        for number in ("", "_2"):
            ids = self.tokenize(f"tokenizer{number}", prompts).input_ids
            output = self.run(f"text_encoder{number}", ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled.append(output[0])
        clip = torch.cat(hidden, dim=-1)
        clip = nn.functional.pad(clip, (0, self.width - clip.shape[-1]))
        # T5's states follow as further tokens; zeros stand for an absent T5.
        if "text_encoder_3" in self.models:
            ids = self.tokenize("tokenizer_3", prompts).input_ids
            t5 = self.run("text_encoder_3", ids)[0].to(clip)
        else:
            t5 = clip.new_zeros(len(prompts), _T5_TOKENS, self.width)
        # Hidden states are joined along tokens, pooled embeddings along channels.
        return Conditioning.from_text(torch.cat([clip, t5], dim=1), torch.cat(pooled, dim=-1))


class StableDiffusion3(TransformerFamily):
    """StableDiffusion3Pipeline, with or without T5."""

    name = "sd3"
    title = "Stable Diffusion 3, 3.5"
    pipelines = ("StableDiffusion3Pipeline",)
    components: ClassVar[Components] = {
        "transformer": ("SD3Transformer2DModel",),
        "vae": VAE_CLASSES,
        "text_encoder": CLIP_POOLED_CLASSES,
        "tokenizer": CLIP_TOKENIZER_CLASSES,
        "text_encoder_2": CLIP_POOLED_CLASSES,
        "tokenizer_2": CLIP_TOKENIZER_CLASSES,
        "text_encoder_3": T5_CLASSES,
        "tokenizer_3": T5_TOKENIZER_CLASSES,
        "scheduler": ANY_SCHEDULER,
    }
    optional = ("text_encoder_3", "tokenizer_3")
    reads_shift = True
    schedules = ("flow",)
    regression = ("flow",)
    gan = ("flow",)
    lora = ("flow",)
    exports = tuple(ExportFormat(name, ("flow",)) for name in ("safetensors", "diffusers", "lora"))
    block_types = ("JointTransformerBlock",)
    lora_targets = JOINT_LORA_TARGETS

    def conditioner(
        self, pipeline: Pipeline, config: Any, models: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]
    ) -> SD3Conditioner:
        """Takes the width of the hidden states from the transformer's config."""
        clips: list[Any] = [models["text_encoder"], models["text_encoder_2"]]
        pooled = sum(int(clip.config.projection_dim) for clip in clips)
        expect_width(pipeline, "pooled text", pooled, config.pooled_projection_dim)
        if "text_encoder_3" in models:
            if "tokenizer_3" not in tokenizers:
                raise UserError(
                    f"teacher {pipeline.folder}: model_index.json has text_encoder_3 but no tokenizer_3; "
                    "copy the tokenizer of the original model, or set both to [null, null]"
                )
            t5: Any = models["text_encoder_3"]
            expect_width(pipeline, "T5's text", t5.config.d_model, config.joint_attention_dim)
        facts = {
            "no_prompt": EMPTY_PROMPT,
            "t5_tokens": _T5_TOKENS,
            "t5": "encoded" if "text_encoder_3" in models else "absent: zeros",
        }
        return SD3Conditioner(models, tokenizers, facts, width=config.joint_attention_dim)

    def call(self, network: Any, config: Any, inputs: TransformerInputs) -> Tensor:
        """Hidden states for the joint attention, pooled embeddings for the modulation."""
        output: Tensor = network(
            hidden_states=inputs.x,
            timestep=inputs.t,
            encoder_hidden_states=inputs.tensor("hidden"),
            pooled_projections=inputs.tensor("pooled"),
            return_dict=False,
        )[0]
        return output

    def block_outputs(
        self, network: Any, config: Any, inputs: TransformerInputs, extra: Tensor | None
    ) -> list[Tensor]:
        """As SD3Transformer2DModel.forward: text and image tokens attend to each other in every block."""
        tokens = added(network.pos_embed(inputs.x).contiguous(), extra)
        modulation = network.time_text_embed(inputs.t, inputs.tensor("pooled"))
        text = network.context_embedder(inputs.tensor("hidden"))
        return run_joint_blocks(network.transformer_blocks, tokens, text, temb=modulation)

    def fake_conditioning(self, pipeline: Pipeline, config: Any, rows: int) -> Conditioning:
        """77 tokens of both CLIPs, then T5's, and both pooled embeddings."""
        hidden = torch.empty(rows, 77 + _T5_TOKENS, config.joint_attention_dim)
        return Conditioning.from_text(hidden, torch.empty(rows, config.pooled_projection_dim))
