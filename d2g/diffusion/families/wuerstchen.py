"""Wuerstchen v2: stage C makes semantic latents from text, stage B latents of a VQGAN from those and text.

Pernias et al. (arXiv 2306.00637). Networks predict epsilon as (x - a) / b, from two outputs a and b.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from d2g.core.errors import UserError
from d2g.core.transfer import to_device
from d2g.diffusion.conditioning import Conditioning, TextConditioner
from d2g.diffusion.families.base import (
    ANY_SCHEDULER,
    CLIP_CLASSES,
    CLIP_TOKENIZER_CLASSES,
    EMPTY_PROMPT,
    Components,
    Pipeline,
    expect_width,
)
from d2g.diffusion.families.cascade import CascadeFamily, run_cascade_block, time_ratio
from d2g.diffusion.latents import LatentSpace

LATENT_MEAN, LATENT_STD = 42.0, 1.0
"""latent_mean and latent_std of diffusers' pipeline: stage B reads 42 x - 1 of stage C's latents x."""
_TOKENS = 77
"""Length of CLIP's text, to predict memory."""
PRIOR_HEADS = 4
"""Depths at which a discriminator reads stage C's blocks."""


class WuerstchenConditioner(TextConditioner):
    """CLIP's last hidden states after its final norm, computed with the padding mask."""

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> hidden states [B, L, D]."""
        tokens, encoder = self.tokenize("tokenizer", prompts), self.models["text_encoder"]
        mask = to_device(tokens.attention_mask, next(encoder.parameters()).device)
        output = self.run("text_encoder", tokens.input_ids, attention_mask=mask)
        return Conditioning.from_text(output.last_hidden_state)


class WuerstchenFamily(CascadeFamily):
    """Base of both stages."""

    text_width: str
    """The setting of the network with the width of its text."""
    time_embedding = "gen_r_embedding"

    def check(self, pipeline: Pipeline, config: Any, space: LatentSpace) -> tuple[int, int, int]:
        """The latent shape. Refuses networks whose latents are not those of the autoencoder."""
        if config.c_in != space.channels:
            where = f"teacher {pipeline.folder}: {pipeline.class_name(self.network)}"
            raise UserError(f"{where} takes {config.c_in} channels, but latents have {space.channels}")
        return self.latent_shape(config)

    def latent_shape(self, config: Any) -> tuple[int, int, int]:
        """At 1024 pixels, because its networks have no size in their config, or at its `sample_size`."""
        side = int(getattr(config, "sample_size", None) or self.default_size or 0)
        return int(config.c_in), side, side

    def conditioner(
        self, pipeline: Pipeline, config: Any, models: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]
    ) -> WuerstchenConditioner:
        """The empty prompt is the unconditional row."""
        encoder: Any = models["text_encoder"]
        expect_width(pipeline, "text", encoder.config.hidden_size, getattr(config, self.text_width))
        return WuerstchenConditioner(models, tokenizers, {"no_prompt": EMPTY_PROMPT})


class WuerstchenPrior(WuerstchenFamily):
    """Stage C: text -> latents [16, 24, 24] of the semantic compressor."""

    name = "wuerstchen_prior"
    title = "Würstchen v2, stage C"
    pipelines = ("WuerstchenPriorPipeline",)
    components: ClassVar[Components] = {
        "prior": ("WuerstchenPrior",),
        "text_encoder": CLIP_CLASSES,
        "tokenizer": CLIP_TOKENIZER_CLASSES,
        "scheduler": ANY_SCHEDULER,
    }
    network = "prior"
    autoencoder = None
    draws_images = False
    default_size = 24  # 1024 pixels
    text_width = "c_cond"
    block_types = ("ResBlock", "TimestepBlock", "AttnBlock")
    output_layers = ("out",)

    def check(self, pipeline: Pipeline, config: Any, space: LatentSpace) -> tuple[int, int, int]:
        """As for both stages. Refuses another normalization than the one that stage B undoes."""
        values = {"latent_mean": LATENT_MEAN, "latent_std": LATENT_STD}
        for name, expected in values.items():
            if (value := pipeline.index.get(name, expected)) != expected:
                raise UserError(
                    f"teacher {pipeline.folder}: model_index.json has {name}={value}; expected {expected:g}"
                )
        return super().check(pipeline, config, space)

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
        """t: timesteps of `CosineSchedule`."""
        output: Tensor = network(x, time_ratio(x, t), cond.tensors["hidden"].to(x.dtype))
        return output

    def features(
        self, network: Any, x: Tensor, t: Tensor | float, cond: Conditioning, extra: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The maps after PRIOR_HEADS equally spaced blocks of the network."""
        text = network.cond_mapper(cond.tensors["hidden"].to(x.dtype))
        time = network.gen_r_embedding(time_ratio(x, t))
        depths, maps = self._depths(network.config), dict[str, Tensor]()
        x = network.projection(x) if extra is None else network.projection(x) + extra
        # A block of the paper is three modules here: residual, time and attention.
        for number, module in enumerate(network.blocks, start=1):
            x = run_cascade_block(module, x, None, time, text)
            if number % 3 == 0 and number // 3 in depths:
                maps[f"block{number // 3}"] = x
        return maps

    def feature_widths(self, config: Any) -> dict[str, int]:
        """As `features`: block4, block8, block12 and block16 of 16 blocks."""
        return {f"block{depth}": int(config.c) for depth in self._depths(config)}

    def _depths(self, config: Any) -> list[int]:
        heads = min(PRIOR_HEADS, config.depth)
        return [round(config.depth * (number + 1) / heads) for number in range(heads)]

    def patch(self, config: Any) -> int:
        """Single latents."""
        return 1

    def size_unit(self, config: Any) -> int:
        """Any size."""
        return 1

    def fake_conditioning(self, pipeline: Pipeline, config: Any, rows: int) -> Conditioning:
        """77 text tokens."""
        return Conditioning.from_text(torch.empty(rows, _TOKENS, config.c_cond))


class WuerstchenDecoder(WuerstchenFamily):
    """Stage B: stage C's latents and text -> latents [4, 256, 256] of the VQGAN, stage A."""

    name = "wuerstchen_decoder"
    title = "Würstchen v2, stage B"
    pipelines = ("WuerstchenDecoderPipeline",)
    components: ClassVar[Components] = {
        "decoder": ("WuerstchenDiffNeXt",),
        "vqgan": ("PaellaVQModel",),
        "text_encoder": CLIP_CLASSES,
        "tokenizer": CLIP_TOKENIZER_CLASSES,
        "scheduler": ANY_SCHEDULER,
    }
    network = "decoder"
    autoencoder = "vqgan"
    prior_family = WuerstchenPrior.name
    default_size = 256  # 1024 pixels
    text_width = "clip_embd"
    block_types = ("ResBlockStageB", "TimestepBlock", "AttnBlock")
    output_layers = ("clf",)

    def prior_channels(self, config: Any) -> int:
        """Channels of stage C's latents."""
        return int(config.effnet_embd)

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
        """t: timesteps of `CosineSchedule`."""
        text = cond.tensors["hidden"].to(x.dtype)
        output: Tensor = network(x, time_ratio(x, t), effnet=_prior_latents(x, cond), clip=text)
        return output

    def features(
        self, network: Any, x: Tensor, t: Tensor | float, cond: Conditioning, extra: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The maps after each level, on the way down and up; scaling modules are part of the levels here."""
        text = network.gen_c_embeddings(cond.tensors["hidden"].to(x.dtype))
        time, prior = network.gen_r_embedding(time_ratio(x, t)), _prior_latents(x, cond)
        x = network.embedding(x) if extra is None else network.embedding(x) + extra
        maps, mappers, levels = dict[str, Tensor](), network.effnet_mappers, len(network.down_blocks)
        for number, blocks in enumerate((*network.down_blocks, *network.up_blocks)):
            up = number >= levels
            level = 2 * levels - 1 - number if up else number
            skip, injected, first = maps.get(f"down{level}") if number > levels else None, None, True
            for module in blocks:
                beside = None
                if hasattr(module, "depthwise"):
                    # Stage C's latents enter every residual block of a level at the size of its first one.
                    if mappers[number] is not None and injected is None:
                        injected = mappers[number](_resized(prior, x))
                    inputs = [part for part in (skip if first else None, injected) if part is not None]
                    beside = torch.cat(inputs, dim=1) if inputs else None
                x = run_cascade_block(module, x, beside, time, text)
                first = False
            maps[f"{'up' if up else 'down'}{level}"] = x
        return maps

    def feature_widths(self, config: Any) -> dict[str, int]:
        """As `features`. A level on the way up ends with the scaling to the next one, and has its width."""
        widths = list(config.c_hidden)
        down = {f"down{level}": width for level, width in enumerate(widths)}
        return down | {f"up{level}": widths[max(level - 1, 0)] for level in reversed(range(len(widths)))}

    def size_unit(self, config: Any) -> int:
        """Every level must have an even size."""
        return self.patch(config) * 1 << (len(config.c_hidden) - 1)

    def fake_conditioning(self, pipeline: Pipeline, config: Any, rows: int) -> Conditioning:
        """77 text tokens, and latents of stage C at their usual size."""
        side = WuerstchenPrior.default_size
        text = torch.empty(rows, _TOKENS, config.clip_embd)
        return Conditioning({"hidden": text, "prior": torch.empty(rows, config.effnet_embd, side, side)})


def _prior_latents(x: Tensor, cond: Conditioning) -> Tensor:
    """Stage C's latents as stage B reads them, in the dtype of x.

    Zeros of an unconditional row stay zeros, as in diffusers' pipeline.
    """
    assert "prior" in cond.tensors, "stage B needs a Conditioning with `prior`"
    prior = cond.tensors["prior"]
    empty = (prior == 0).flatten(1).all(dim=1).view(-1, 1, 1, 1)
    return torch.where(empty, prior, prior * LATENT_MEAN - LATENT_STD).to(x.dtype)


def _resized(prior: Tensor, x: Tensor) -> Tensor:
    """Stage C's latents at the size of x, as WuerstchenDiffNeXt resizes them."""
    return nn.functional.interpolate(
        prior.float(), size=x.shape[-2:], mode="bicubic", antialias=True, align_corners=True
    ).to(prior.dtype)
