"""Stable Cascade: stage C makes semantic latents from text, stage B latents of a VQGAN from those and text.

Both stages are a StableCascadeUNet on a continuous cosine schedule, and two families: each has its own pairs
and students. Pernias et al., Wuerstchen (arXiv 2306.00637).
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from d2g.core.errors import SettingError, UserError
from d2g.core.transfer import to_device
from d2g.diffusion.conditioning import Conditioning, TextConditioner
from d2g.diffusion.families.base import (
    ANY_SCHEDULER,
    CLIP_POOLED_CLASSES,
    CLIP_TOKENIZER_CLASSES,
    EMPTY_PROMPT,
    Components,
    Pipeline,
    expect_width,
)
from d2g.diffusion.families.cascade import CascadeFamily, run_cascade_block, time_ratio
from d2g.diffusion.latents import LatentSpace

_TOKENS = 77
"""Length of CLIP's text, to predict memory."""


class CascadeConditioner(TextConditioner):
    """CLIP's pooled text, and for stage C its last hidden states, both computed with the padding mask."""

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        tokenizers: Mapping[str, Any],
        facts: Mapping[str, Any],
        with_hidden: bool,
    ) -> None:
        super().__init__(models, tokenizers, facts)
        self.with_hidden = with_hidden

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> pooled text [B, P], and for stage C hidden states [B, L, D]."""
        tokens, encoder = self.tokenize("tokenizer", prompts), self.models["text_encoder"]
        mask = to_device(tokens.attention_mask, next(encoder.parameters()).device)
        output = self.run("text_encoder", tokens.input_ids, attention_mask=mask, output_hidden_states=True)
        tensors = {"hidden": output.hidden_states[-1]} if self.with_hidden else {}
        return Conditioning({**tensors, "pooled": output.text_embeds})


class StableCascadeFamily(CascadeFamily):
    """Base of both stages, whose network is a StableCascadeUNet."""

    block_types = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    output_layers = ("clf",)
    time_embedding = "get_timestep_ratio_embedding"

    @abstractmethod
    def text(self, config: Any, x: Tensor, cond: Conditioning) -> dict[str, Tensor]:
        """The CLIP arguments of StableCascadeUNet.forward, in the dtype of x."""

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
        """t: timesteps of `CosineSchedule`, 0 to COSINE_STEPS."""
        output: Tensor = network(
            x,
            timestep_ratio=time_ratio(x, t),
            effnet=self.prior_latents(x, cond),
            return_dict=False,
            **self.text(config, x, cond),
        )[0]
        return output

    def features(
        self, network: Any, x: Tensor, t: Tensor | float, cond: Conditioning, extra: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The maps after each level, on the way down and up."""
        # Time with the additional time inputs, which diffusers' pipelines leave at zero, and text.
        ratio = time_ratio(x, t)
        inputs = [ratio, *(torch.zeros_like(ratio) for _ in network.config.timestep_conditioning_type)]
        time = torch.cat([network.get_timestep_ratio_embedding(r) for r in inputs], dim=1)
        text = self.text(network.config, x, cond)
        clip = network.get_clip_embeddings(
            clip_txt_pooled=text["clip_text_pooled"],
            clip_txt=text.get("clip_text"),
            clip_img=text.get("clip_img"),
        )
        # Embedded latents, with the stage before and an empty picture where the network takes them.
        tokens = network.embedding(x) if extra is None else network.embedding(x) + extra
        size = tokens.shape[-2:]
        if (prior := self.prior_latents(x, cond)) is not None:
            tokens = tokens + network.effnet_mapper(resized(prior, size))
        if hasattr(network, "pixels_mapper"):
            tokens = tokens + resized(network.pixels_mapper(x.new_zeros(len(x), 3, 8, 8)), size)
        return _levels(network, tokens, time, clip)

    def feature_widths(self, config: Any) -> dict[str, int]:
        """As `features`: down0, down1, ..., up1, up0."""
        widths = list(config.block_out_channels)
        down = {f"down{level}": width for level, width in enumerate(widths)}
        return down | {f"up{level}": widths[level] for level in reversed(range(len(widths)))}

    def prior_latents(self, x: Tensor, cond: Conditioning) -> Tensor | None:
        """The latents of the stage before, in the dtype of x; None for networks without one."""
        return None

    def size_unit(self, config: Any) -> int:
        """Patches; levels of an odd size are resized by the network."""
        return int(config.patch_size)

    def check_size(self, name: str, config: Any, size: tuple[int, int]) -> None:
        """As for every family, and no smaller than the lowest level."""
        super().check_size(name, config, size)
        switches = config.switch_level
        levels = len(config.block_out_channels) - 1 if switches is None else sum(map(bool, switches))
        least = config.patch_size * 2**levels
        if min(size) < least:
            raise SettingError(
                f"latent size is {size[0]}x{size[1]}; teacher {name} takes {least} or more, because its "
                f"network halves it {levels} times"
            )

    def conditioner(
        self, pipeline: Pipeline, config: Any, models: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]
    ) -> CascadeConditioner:
        """The empty prompt is the unconditional row."""
        encoder: Any = models["text_encoder"]
        expect_width(
            pipeline, "pooled text", encoder.config.projection_dim, config.clip_text_pooled_in_channels
        )
        if with_hidden := config.clip_text_in_channels is not None:
            expect_width(pipeline, "text", encoder.config.hidden_size, config.clip_text_in_channels)
        return CascadeConditioner(models, tokenizers, {"no_prompt": EMPTY_PROMPT}, with_hidden)


class StableCascadePrior(StableCascadeFamily):
    """Stage C: text -> latents [16, 24, 24] of the semantic compressor; stage B turns them to images."""

    name = "stable_cascade_prior"
    title = "Stable Cascade, stage C"
    pipelines = ("StableCascadePriorPipeline",)
    components: ClassVar[Components] = {
        "prior": ("StableCascadeUNet",),
        "text_encoder": CLIP_POOLED_CLASSES,
        "tokenizer": CLIP_TOKENIZER_CLASSES,
        "scheduler": ANY_SCHEDULER,
    }
    network = "prior"
    autoencoder = None
    draws_images = False
    default_size = 24  # 1024 pixels

    def text(self, config: Any, x: Tensor, cond: Conditioning) -> dict[str, Tensor]:
        """Hidden states and pooled text; no image beside the prompt, as in diffusers' pipeline."""
        return {
            "clip_text_pooled": cond.tensors["pooled"].to(x.dtype).unsqueeze(1),
            "clip_text": cond.tensors["hidden"].to(x.dtype),
            "clip_img": x.new_zeros(len(x), 1, config.clip_image_in_channels),
        }

    def fake_conditioning(self, pipeline: Pipeline, config: Any, rows: int) -> Conditioning:
        """77 text tokens and pooled text."""
        return Conditioning.from_text(
            torch.empty(rows, _TOKENS, config.clip_text_in_channels),
            torch.empty(rows, config.clip_text_pooled_in_channels),
        )


class StableCascadeDecoder(StableCascadeFamily):
    """Stage B: stage C's latents and pooled text -> latents [4, 256, 256] of the VQGAN, stage A."""

    name = "stable_cascade_decoder"
    title = "Stable Cascade, stage B"
    pipelines = ("StableCascadeDecoderPipeline",)
    components: ClassVar[Components] = {
        "decoder": ("StableCascadeUNet",),
        "vqgan": ("PaellaVQModel",),
        "text_encoder": CLIP_POOLED_CLASSES,
        "tokenizer": CLIP_TOKENIZER_CLASSES,
        "scheduler": ANY_SCHEDULER,
    }
    network = "decoder"
    autoencoder = "vqgan"
    prior_family = StableCascadePrior.name
    default_size = 256  # 1024 pixels

    def prior_channels(self, config: Any) -> int:
        """Channels of stage C's latents."""
        return int(config.effnet_in_channels)

    def check(self, pipeline: Pipeline, config: Any, space: LatentSpace) -> tuple[int, int, int]:
        """As for both stages. Refuses networks without an input for stage C's latents."""
        if config.effnet_in_channels is None:
            where = f"teacher {pipeline.folder}: {pipeline.class_name(self.network)}"
            raise UserError(f"{where} has no effnet_in_channels, the input for latents of stage C")
        return super().check(pipeline, config, space)

    def text(self, config: Any, x: Tensor, cond: Conditioning) -> dict[str, Tensor]:
        """Pooled text alone."""
        return {"clip_text_pooled": cond.tensors["pooled"].to(x.dtype).unsqueeze(1)}

    def prior_latents(self, x: Tensor, cond: Conditioning) -> Tensor:
        """Stage C's latents of the rows."""
        assert "prior" in cond.tensors, "stage B needs a Conditioning with `prior`"
        return cond.tensors["prior"].to(x.dtype)

    def fake_conditioning(self, pipeline: Pipeline, config: Any, rows: int) -> Conditioning:
        """Pooled text, and latents of stage C at its usual size."""
        side = StableCascadePrior.default_size
        return Conditioning(
            {
                "pooled": torch.empty(rows, config.clip_text_pooled_in_channels),
                "prior": torch.empty(rows, config.effnet_in_channels, side, side),
            }
        )


def _levels(network: Any, x: Tensor, time: Tensor, clip: Tensor) -> dict[str, Tensor]:
    """The maps after each level of StableCascadeUNet's `_down_encode` and `_up_decode`."""
    maps: dict[str, Tensor] = {}
    # Down: the first level has the size of the patches.
    down = zip(network.down_blocks, network.down_downscalers, network.down_repeat_mappers, strict=True)
    for level, (blocks, scale, mappers) in enumerate(down):
        maps[f"down{level}"] = x = _level(blocks, mappers, scale(x), None, time, clip)
    # Up: each level but the lowest reads the maps of the way down.
    up = zip(network.up_blocks, network.up_upscalers, network.up_repeat_mappers, strict=True)
    for number, (blocks, scale, mappers) in enumerate(up):
        level = len(network.down_blocks) - 1 - number
        maps[f"up{level}"] = x = _level(
            blocks, mappers, x, maps[f"down{level}"] if number else None, time, clip
        )
        x = scale(x)
    return maps


def _level(blocks: Any, mappers: Any, x: Tensor, skip: Tensor | None, time: Tensor, clip: Tensor) -> Tensor:
    """The blocks of a level, run once more after each of its `mappers`; the first block reads `skip`."""
    for run in range(len(mappers) + 1):
        for number, block in enumerate(blocks):
            beside = skip if number == 0 else None
            if beside is not None and x.shape[-2:] != beside.shape[-2:]:
                x = resized(x.float(), beside.shape[-2:]).to(x.dtype)
            x = run_cascade_block(block, x, beside, time, clip)
        x = mappers[run](x) if run < len(mappers) else x
    return x


def resized(maps: Tensor, size: torch.Size) -> Tensor:
    """Feature maps at another size, as StableCascadeUNet resizes them."""
    return nn.functional.interpolate(maps, size=size, mode="bilinear", align_corners=True)
