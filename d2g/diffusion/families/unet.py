"""What all U-Nets of diffusers share: their call, their repeated blocks, and the stages that work for
them."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.families.base import ExportFormat, Family, Pipeline


class UNetFamily(Family):
    """Base of the families whose network is a UNet2DConditionModel or a UNet2DModel."""

    network = "unet"
    # These networks take any real number as their time input, so their schedule may also be EDM's.
    schedules = ("vp", "edm")
    regression = ("vp", "edm")
    gan = ("vp", "edm")
    lora = ("vp", "edm")
    takes_dropout = True
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")  # as diffusers does for Stable Diffusion

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
        """Text goes in as cross-attention states, and for SDXL as added conditions; class labels as such."""
        # A UNet2DConditionModel takes text, a UNet2DModel at most class labels.
        if self.reads_text:
            output: Tensor = network(
                x,
                t,
                cond.tensors["hidden"].to(x.dtype),
                timestep_cond=guidance_embedding,
                added_cond_kwargs=added_conditions(config, cond, x, downscale),
                return_dict=False,
            )[0]
            return output
        labels = cond.tensors["class_labels"].to(x.device) if config.num_class_embeds is not None else None
        output = network(x, t, class_labels=labels, return_dict=False)[0]
        return output

    @abstractmethod
    def embeddings(
        self, network: Any, x: Tensor, t: Tensor, cond: Conditioning, downscale: int
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the inputs of the blocks besides features, as in diffusers' forward pass.

        Inputs as in `forward`, t [B]. Returns the embedding [B, E] of time and conditions, and the states
        [B, L, D] that cross-attention reads; None for networks without text.
        """

    def class_embedding(self, network: Any, cond: Conditioning) -> Tensor | None:
        """The embeddings [B, E] of class labels, which a discriminator projects; None without classes."""
        return None

    def shard_units(self, network: nn.Module) -> Iterator[nn.Module]:
        """Residual blocks, transformer blocks, and attentions outside them: they hold nearly all weights and
        activations of a U-Net, or of a network built around one."""
        for module in network.modules():
            kind = type(module).__name__
            if kind.startswith("ResnetBlock") or kind == "BasicTransformerBlock":
                yield module
            elif kind == "AttentionBlock" or (kind == "Attention" and hasattr(module, "group_norm")):
                if getattr(module, "group_norm", None) is not None:
                    yield module

    def fake_conditioning(self, pipeline: Pipeline, config: Any, rows: int) -> Conditioning:
        """77 text tokens, and for SDXL pooled text; class labels."""
        if not self.reads_text:
            return Conditioning.from_labels(torch.zeros(rows, dtype=torch.int64))
        pooled = None
        if config.addition_embed_type == "text_time":
            pooled = torch.empty(
                rows, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            )
        return Conditioning.from_text(torch.empty(rows, 77, config.cross_attention_dim), pooled)

    def size_unit(self, config: Any) -> int:
        """A UNet2DConditionModel crops what its last levels return too large; a UNet2DModel does not."""
        return 1 if self.reads_text else 2 ** (len(config.block_out_channels) - 1)


class TextUNetFamily(UNetFamily):
    """Base of the families whose network is a UNet2DConditionModel that reads text: all stages work.

    No scheduler of diffusers starts from sigma_max.
    """

    takes_guidance = True
    exports = (
        ExportFormat("safetensors", ("vp", "edm")),
        ExportFormat("onnx", ("vp", "edm")),
        ExportFormat("diffusers", ("vp",), reason="no scheduler starts at sigma_max"),
        ExportFormat("lora", ("vp",)),
        ExportFormat("comfyui", ("vp",)),
    )

    def embeddings(
        self, network: Any, x: Tensor, t: Tensor, cond: Conditioning, downscale: int
    ) -> tuple[Tensor, Tensor | None]:
        """As UNet2DConditionModel.forward: time, added conditions and text."""
        text = cond.tensors["hidden"]
        embedding = network.time_embedding(network.get_time_embed(sample=x, timestep=t))
        added = added_conditions(network.config, cond, x, downscale)
        extra = network.get_aug_embed(emb=embedding, encoder_hidden_states=text, added_cond_kwargs=added)
        embedding = embedding if extra is None else embedding + extra
        embedding = embedding if network.time_embed_act is None else network.time_embed_act(embedding)
        states = network.process_encoder_hidden_states(encoder_hidden_states=text, added_cond_kwargs=added)
        return embedding, states


def added_conditions(config: Any, cond: Conditioning, x: Tensor, downscale: int) -> dict[str, Tensor] | None:
    """diffusers' `added_cond_kwargs` for network inputs x [B, C, h, w]; None if a U-Net's config takes none.

    downscale: pixels per latent. Without `time_ids` in `cond`, the size of the image is that of x, uncropped.
    """
    if config.addition_embed_type != "text_time":
        return None
    assert "pooled" in cond.tensors, "SDXL's U-Net needs a Conditioning with `pooled`"
    time_ids = cond.tensors.get("time_ids")
    if time_ids is None:
        # Filled in place on x's device: a copy from the CPU would wait for the GPU.
        time_ids = x.new_zeros(len(x), 6, dtype=torch.float32)
        time_ids[:, 0::4], time_ids[:, 1::4] = downscale * x.shape[2], downscale * x.shape[3]
    # fp32 whatever the network runs in: bf16 has eight bits, too few for most sizes above 2048.
    return {"text_embeds": cond.tensors["pooled"].to(x.dtype), "time_ids": time_ids.float()}


def attention_parameters(unet: nn.Module) -> set[str]:
    """Names of the parameters inside attention layers and transformer blocks (the weight-decay rule)."""
    return {
        name
        for name, _ in unet.named_parameters()
        if ".attentions." in f".{name}" or "transformer_blocks." in name
    }
