"""SANA: a transformer with linear attention on DC-AE latents, a rectified flow, and Gemma 2 for text."""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from d2g.core.errors import UserError
from d2g.core.transfer import to_device
from d2g.diffusion.conditioning import Conditioning, TextConditioner
from d2g.diffusion.families.base import ANY_SCHEDULER, Components, ExportFormat, Pipeline, expect_width
from d2g.diffusion.families.transformer import (
    TransformerFamily,
    TransformerInputs,
    added,
    attention_bias,
    run_blocks,
)
from d2g.diffusion.latents import LatentSpace

_GEMMA_TOKENS = 300
"""max_sequence_length of diffusers' own pipeline, by default."""


class SanaConditioner(TextConditioner):
    """Gemma's hidden states and padding mask of captions in lower case, after an instruction to Gemma.

    `instruction`: as the pipeline puts before captions by default (complex_human_instruction). Its states are
    cut off again, except for the first token's. The unconditional row is the empty prompt without it.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        tokenizers: Mapping[str, Any],
        facts: Mapping[str, Any] | None = None,
        instruction: str = "",
    ) -> None:
        super().__init__(models, tokenizers, facts)
        self.instruction = instruction
        tokenizer = self.tokenizers["tokenizer"]
        tokenizer.padding_side = "right"  # as the pipeline sets it
        self.instruction_tokens = len(tokenizer.encode(instruction))

    def token_length(self, component: str) -> int:
        """The instruction, and as many tokens for the caption as in diffusers' pipeline."""
        return self.instruction_tokens + _GEMMA_TOKENS - 2

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> hidden states [B, 300, D] and their mask [B, 300]."""
        captions = [self.instruction + prompt.lower().strip() for prompt in prompts]
        states = self._states(captions, self.token_length("tokenizer"))
        return states.map(lambda tensor: torch.cat([tensor[:, :1], tensor[:, 1 - _GEMMA_TOKENS :]], dim=1))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], null: bool = False) -> Conditioning:
        encoded = self.embed(prompts)
        return Conditioning(encoded.tensors, self._states([""], _GEMMA_TOKENS).tensors) if null else encoded

    def _states(self, texts: Sequence[str], length: int) -> Conditioning:
        tokens = self.tokenize("tokenizer", texts, length)
        model: Any = self.models["text_encoder"]
        mask = to_device(tokens.attention_mask, next(model.parameters()).device)
        # One pass needs no cache of keys and values, which Gemma would fill and wait for.
        hidden = self.run("text_encoder", tokens.input_ids, attention_mask=mask, use_cache=False)[0]
        return Conditioning({"hidden": hidden, "mask": mask})


class Sana(TransformerFamily):
    """SanaPipeline; SANA-Sprint, which takes guidance as an input, is refused."""

    name = "sana"
    title = "SANA"
    pipelines = ("SanaPipeline",)
    components: ClassVar[Components] = {
        "transformer": ("SanaTransformer2DModel",),
        "vae": ("AutoencoderDC",),
        "text_encoder": ("Gemma2Model",),
        "tokenizer": ("GemmaTokenizer", "GemmaTokenizerFast"),
        "scheduler": ANY_SCHEDULER,
    }
    schedules = ("flow",)
    regression = ("flow",)
    gan = ("flow",)
    lora = ("flow",)
    exports = tuple(ExportFormat(name, ("flow",)) for name in ("safetensors", "diffusers", "lora"))
    block_types = ("SanaTransformerBlock",)
    output_layers = ("norm_out", "proj_out", "scale_shift_table")
    dpm_solver_flow = True

    def check(self, pipeline: Pipeline, config: Any, space: LatentSpace) -> tuple[int, int, int]:
        """As for every family. Refuses SANA-Sprint."""
        if config.guidance_embeds:
            where = f"teacher {pipeline.folder}: {pipeline.class_name(self.network)}"
            raise UserError(
                f"{where} has guidance_embeds=true, as SANA-Sprint, which is distilled to few steps already; "
                f"a {pipeline.kind} never feeds it"
            )
        return super().check(pipeline, config, space)

    def conditioner(
        self, pipeline: Pipeline, config: Any, models: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]
    ) -> SanaConditioner:
        """Takes the instruction from the defaults of diffusers' pipeline."""
        encoder: Any = models["text_encoder"]
        expect_width(pipeline, "text", encoder.config.hidden_size, config.caption_channels)
        instruction = default_instruction()
        facts = {
            "no_prompt": "the empty prompt without the instruction",
            "gemma_tokens": _GEMMA_TOKENS,
            "captions": "lower case, stripped",
            "instruction_sha256": hashlib.sha256(instruction.encode()).hexdigest(),
        }
        return SanaConditioner(models, tokenizers, facts, instruction)

    def call(self, network: Any, config: Any, inputs: TransformerInputs) -> Tensor:
        """Masked hidden states of Gemma."""
        output: Tensor = network(
            inputs.x,
            encoder_hidden_states=inputs.tensor("hidden"),
            encoder_attention_mask=inputs.cond.tensors["mask"],
            timestep=_time(config, inputs),
            return_dict=False,
        )[0]
        return output

    def block_outputs(
        self, network: Any, config: Any, inputs: TransformerInputs, extra: Tensor | None
    ) -> list[Tensor]:
        """As SanaTransformer2DModel.forward: one modulation for all blocks, linear attention between image
        tokens, cross-attention to masked text."""
        tokens = added(network.patch_embed(inputs.x), extra)
        modulation, _ = network.time_embed(
            _time(config, inputs), batch_size=len(tokens), hidden_dtype=tokens.dtype
        )
        text = network.caption_norm(network.caption_projection(inputs.tensor("hidden")))
        height, width = (side // config.patch_size for side in inputs.x.shape[-2:])
        return run_blocks(
            network.transformer_blocks,
            tokens,
            encoder_hidden_states=text,
            encoder_attention_mask=attention_bias(inputs.tensor("mask")),
            timestep=modulation,
            height=height,
            width=width,
        )

    def pipeline_settings(self, pixels: tuple[int, int]) -> dict[str, Any]:
        """The size as it is, because the pipeline's default is 1024 pixels for every network."""
        return {"height": pixels[0], "width": pixels[1], "use_resolution_binning": False}

    def fake_conditioning(self, pipeline: Pipeline, config: Any, rows: int) -> Conditioning:
        """Gemma's states, none of them masked."""
        mask = torch.ones(rows, _GEMMA_TOKENS, dtype=torch.int64)
        return Conditioning(
            {"hidden": torch.empty(rows, _GEMMA_TOKENS, config.caption_channels), "mask": mask}
        )


def default_instruction() -> str:
    """The instruction that SanaPipeline puts before every caption by default."""
    from diffusers import SanaPipeline

    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)


def _time(config: Any, inputs: TransformerInputs) -> Tensor:
    """The time input. Whole numbers stay integers where they are not scaled (see `time_tensor`)."""
    return inputs.t if config.timestep_scale == 1 else inputs.t * config.timestep_scale
