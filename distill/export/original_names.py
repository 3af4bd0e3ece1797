"""Original names of the weights of Stable Diffusion 1.x and SDXL, as in one-file checkpoints and in ComfyUI.

diffusers converts these names to its own (`diffusers.loaders.single_file_utils`); this is the way back.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

UNET, VAE = "model.diffusion_model.", "first_stage_model."
"""Prefixes of both networks in a one-file checkpoint."""

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def original_unet(weights: Mapping[str, Tensor], layers_per_block: int) -> dict[str, Tensor]:
    """The weights of a UNet2DConditionModel under their original names.

    Raises KeyError for a weight that has no original name, such as the input for a guidance scale.
    """
    attention_levels = {
        name.split(".")[1] for name in weights if re.match(r"up_blocks\.\d+\.attentions", name)
    }
    return {
        UNET + _unet_name(name, layers_per_block, attention_levels): value for name, value in weights.items()
    }


def _unet_name(name: str, layers: int, attention_levels: Iterable[str]) -> str:
    """The original name of one weight. The original blocks are numbered through all levels."""
    layer, _, parameter = name.rpartition(".")
    if not re.match(r"(down|up)_blocks\.|mid_block\.", layer):
        return f"{_UNET_ENDS[layer]}.{parameter}"
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", layer):
        kind, number, rest = match.groups()
        block = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
        return f"{block}.{_inside(kind, rest)}.{parameter}"
    match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", layer)
    if match is None:
        raise KeyError(name)
    way, level, kind, number, rest = match.groups()
    first = int(level) * (layers + 1)
    # Residual blocks come first in their block, attention second, upsampling last.
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op.{parameter}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{2 if level in attention_levels else 1}.{rest}.{parameter}"
    block = (
        f"input_blocks.{first + int(number) + 1}" if way == "down" else f"output_blocks.{first + int(number)}"
    )
    return f"{block}.{1 if kind == 'attentions' else 0}.{_inside(kind, rest)}.{parameter}"


def _inside(kind: str, rest: str) -> str:
    return rest if kind == "attentions" else _RESNET[rest]


def original_vae(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an AutoencoderKL under their original names, with attention as 1x1 convolutions."""
    levels = 1 + max(int(match[1]) for name in weights if (match := re.search(r"up_blocks\.(\d+)", name)))
    renamed = {}
    for name, value in weights.items():
        text = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
        text = re.sub(r"down_blocks\.(\d+)", r"down.\1", text)
        text = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", text)
        text = text.replace(".resnets.", ".block.").replace("conv_shortcut", "nin_shortcut")
        text = text.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        text = text.replace("conv_norm_out", "norm_out")
        if match := re.match(r"(.+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)$", text):
            coder, part, parameter = match.groups()
            text = f"{coder}.mid.attn_1.{_VAE_ATTENTION[part]}.{parameter}"
            value = value[:, :, None, None] if value.ndim == 2 else value
        renamed[VAE + text] = value
    return renamed


def original_clip(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights of a CLIPTextModel, which keep their names below `prefix`, in OpenAI's model."""
    return {f"{prefix}transformer.text_model.{_plain(name)}": value for name, value in weights.items()}


def original_open_clip(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights of a CLIPTextModelWithProjection under OpenCLIP's names, with one matrix for q, k and v."""
    plain, renamed = {_plain(name): value for name, value in weights.items()}, {}
    for name, value in plain.items():
        if name == "text_projection.weight":
            renamed["text_projection"] = value.T
        elif name in _OPEN_CLIP:
            renamed[_OPEN_CLIP[name]] = value
        elif match := re.match(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", name):
            number, part, parameter = match.groups()
            layer = f"transformer.resblocks.{number}"
            if part in _OPEN_CLIP_LAYER:
                renamed[f"{layer}.{_OPEN_CLIP_LAYER[part]}.{parameter}"] = value
            elif part == "self_attn.q_proj":
                parts = [plain[name.replace("q_proj", f"{key}_proj")] for key in "qkv"]
                renamed[f"{layer}.attn.in_proj_{parameter}"] = torch.cat(parts)
            elif part not in ("self_attn.k_proj", "self_attn.v_proj"):
                raise KeyError(name)
        else:
            raise KeyError(name)
    return {prefix + name: value for name, value in renamed.items()}


def _plain(name: str) -> str:
    """A name of a CLIP text model without the `text_model.` that only some versions of transformers have."""
    return name.removeprefix("text_model.")


def kohya_adapters(adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LoRA adapters of scale 1 for a U-Net, `unet.LAYER.lora_A.weight`, under kohya's names."""
    renamed = {}
    for name, value in adapters.items():
        match = re.match(r"unet\.(.+)\.lora_([AB])\.weight$", name)
        if match is None:
            raise KeyError(name)
        layer = "lora_unet_" + match[1].replace(".", "_")
        renamed[f"{layer}.lora_{'down' if match[2] == 'A' else 'up'}.weight"] = value
        if match[2] == "A":
            renamed[f"{layer}.alpha"] = torch.tensor(float(len(value)), dtype=value.dtype)
    return renamed
