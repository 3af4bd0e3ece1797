"""Configs of published teachers, to predict memory and operations of a run without downloading weights."""

import json
from pathlib import Path
from typing import Any

NAMES = {
    "sd15": "SD 1.5",
    "sdxl": "SDXL",
    "dit-xl-256": "DiT-XL/2 256",
    "pixart-sigma-512": "PixArt-Sigma 512",
    "sd35-medium": "SD 3.5 Medium",
    "edm-cifar10": "EDM CIFAR10 (as a UNet2DModel)",
    "flux-dev": "FLUX.1-dev",
    "sana-600m": "SANA 600M",
    "wuerstchen": "Wuerstchen v2, stage C",
    "wuerstchen-b": "Wuerstchen v2, stage B",
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
ATTENTION = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", ATTENTION[0], ATTENTION[0]],
        "up_block_types": [ATTENTION[1], ATTENTION[1], "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
VAE = {
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.18215,
}
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


DC_AE = {
    "latent_channels": 32,
    "encoder_block_types": [*["ResBlock"] * 3, *["EfficientViTBlock"] * 3],
    "decoder_block_types": [*["ResBlock"] * 3, *["EfficientViTBlock"] * 3],
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
GEMMA_2_2B = {
    "model_type": "gemma2",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256_000,
}
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
DIT_XL = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "patch_size": 2,
    "in_channels": 4,
}
LINEAR_BETAS = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "clip_sample": False}

ComponentConfigs = dict[str, tuple[str, str, dict[str, Any]]]
"""Component -> library, class and config."""


def _clip(config: dict[str, int], projection: int) -> tuple[str, str, dict[str, Any]]:
    settings = {"model_type": "clip_text_model", "projection_dim": projection, **config}
    return "transformers", "CLIPTextModelWithProjection", settings


_T5 = ("transformers", "T5EncoderModel", {"model_type": "t5", "feed_forward_proj": "gated-gelu", **T5_XXL})
TRANSFORMERS: dict[str, tuple[str, ComponentConfigs]] = {
    "dit-xl-256": (
        "DiTPipeline",
        {
            "transformer": (
                "diffusers",
                "DiTTransformer2DModel",
                {**DIT_XL, "out_channels": 8, "sample_size": 32, "num_embeds_ada_norm": 1000},
            ),
            "vae": ("diffusers", "AutoencoderKL", VAE),
            "scheduler": ("diffusers", "DDIMScheduler", LINEAR_BETAS),
        },
    ),
    "pixart-sigma-512": (
        "PixArtSigmaPipeline",
        {
            "transformer": (
                "diffusers",
                "PixArtTransformer2DModel",
                {
                    **DIT_XL,
                    "out_channels": 8,
                    "sample_size": 64,
                    "cross_attention_dim": 1152,
                    "caption_channels": 4096,
                    "interpolation_scale": 1,
                    "use_additional_conditions": False,
                },
            ),
            "vae": ("diffusers", "AutoencoderKL", {**VAE, "scaling_factor": 0.13025}),
            "text_encoder": _T5,
            "tokenizer": ("transformers", "T5Tokenizer", {}),
            "scheduler": ("diffusers", "DDIMScheduler", LINEAR_BETAS),
        },
    ),
    "sd35-medium": (
        "StableDiffusion3Pipeline",
        {
            "transformer": (
                "diffusers",
                "SD3Transformer2DModel",
                {
                    "sample_size": 128,
                    "num_layers": 24,
                    "num_attention_heads": 24,
                    "attention_head_dim": 64,
                    "caption_projection_dim": 1536,
                    "pos_embed_max_size": 384,
                    "dual_attention_layers": list(range(13)),
                    "qk_norm": "rms_norm",
                },
            ),
            "vae": (
                "diffusers",
                "AutoencoderKL",
                {**VAE, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
            ),
            "text_encoder": _clip(CLIP_L, 768),
            "tokenizer": ("transformers", "CLIPTokenizer", {}),
            "text_encoder_2": _clip(CLIP_G, 1280),
            "tokenizer_2": ("transformers", "CLIPTokenizer", {}),
            "text_encoder_3": _T5,
            "tokenizer_3": ("transformers", "T5Tokenizer", {}),
            "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        },
    ),
    "flux-dev": (
        "FluxPipeline",
        {
            "transformer": (
                "diffusers",
                "FluxTransformer2DModel",
                {
                    "in_channels": 64,
                    "num_layers": 19,
                    "num_single_layers": 38,
                    "num_attention_heads": 24,
                    "attention_head_dim": 128,
                    "joint_attention_dim": 4096,
                    "pooled_projection_dim": 768,
                    "guidance_embeds": True,
                },
            ),
            "vae": (
                "diffusers",
                "AutoencoderKL",
                {**VAE, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
            ),
            "text_encoder": ("transformers", "CLIPTextModel", {"model_type": "clip_text_model", **CLIP_L}),
            "tokenizer": ("transformers", "CLIPTokenizer", {}),
            "text_encoder_2": _T5,
            "tokenizer_2": ("transformers", "T5TokenizerFast", {}),
            "scheduler": (
                "diffusers",
                "FlowMatchEulerDiscreteScheduler",
                {"shift": 3.0, "use_dynamic_shifting": True},
            ),
        },
    ),
    "sana-600m": (
        "SanaPipeline",
        {
            "transformer": (
                "diffusers",
                "SanaTransformer2DModel",
                {
                    "sample_size": 32,
                    "patch_size": 1,
                    "in_channels": 32,
                    "out_channels": 32,
                    "num_layers": 28,
                    "num_attention_heads": 36,
                    "attention_head_dim": 32,
                    "num_cross_attention_heads": 16,
                    "cross_attention_head_dim": 72,
                    "cross_attention_dim": 1152,
                    "caption_channels": 2304,
                    "mlp_ratio": 2.5,
                },
            ),
            "vae": ("diffusers", "AutoencoderDC", DC_AE),
            "text_encoder": ("transformers", "Gemma2Model", GEMMA_2_2B),
            "tokenizer": ("transformers", "GemmaTokenizerFast", {}),
            "scheduler": (
                "diffusers",
                "DPMSolverMultistepScheduler",
                {"flow_shift": 3.0, "prediction_type": "flow_prediction", "use_flow_sigmas": True},
            ),
        },
    ),
}
"""Pipeline class and components of transformer teachers, by preset."""

_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_COSINE = ("diffusers", "DDPMWuerstchenScheduler", {"scaler": 1, "s": 0.008})
CASCADES: dict[str, tuple[str, ComponentConfigs]] = {
    "wuerstchen": (
        "WuerstchenPriorPipeline",
        {
            "prior": (
                "wuerstchen",
                "WuerstchenPrior",
                {"c_in": 16, "c": 1536, "c_cond": 1280, "c_r": 64, "depth": 32, "nhead": 24},
            ),
            "text_encoder": (
                "transformers",
                "CLIPTextModel",
                {"model_type": "clip_text_model", **CLIP_G, "projection_dim": 1280},
            ),
            "tokenizer": ("transformers", "CLIPTokenizer", {}),
            "scheduler": _COSINE,
        },
    ),
    "wuerstchen-b": (
        "WuerstchenDecoderPipeline",
        {
            "decoder": ("wuerstchen", "WuerstchenDiffNeXt", {}),
            "vqgan": ("wuerstchen", "PaellaVQModel", {}),
            "text_encoder": (
                "transformers",
                "CLIPTextModel",
                {"model_type": "clip_text_model", **_CLIP_H, "projection_dim": 1024},
            ),
            "tokenizer": ("transformers", "CLIPTokenizer", {}),
            "scheduler": _COSINE,
        },
    ),
}
"""The same of the stages of cascades. The defaults of diffusers' classes are Wuerstchen's stage B."""

PIXELS: dict[str, tuple[str, ComponentConfigs]] = {
    "edm-cifar10": (
        "DDPMPipeline",
        {
            "unet": (
                "diffusers",
                "UNet2DModel",
                {
                    "sample_size": 32,
                    "block_out_channels": [256, 256, 256],
                    "layers_per_block": 4,
                    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
                    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
                    "attention_head_dim": 256,
                    "time_embedding_dim": 512,
                    "num_class_embeds": 10,
                },
            ),
            "scheduler": (
                "diffusers",
                "EDMEulerScheduler",
                {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5},
            ),
        },
    ),
}
"""The same of teachers of pixels. EDM's own network has another architecture, of 55.7 M parameters."""


def configs_only(kind: str, folder: Path) -> str:
    """Write a pipeline folder with the configs of a key of NAMES and no weights, and return its path."""
    known = {**TRANSFORMERS, **CASCADES, **PIXELS}
    pipeline, components = known[kind] if kind in known else _stable_diffusion(kind == "sdxl")
    # Write the folder as diffusers lays it out, without weights.
    for name, (_, kind_of, config) in components.items():
        (folder / name).mkdir(parents=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps({"_class_name": kind_of, **config}))
    index = {"_class_name": pipeline, **{name: [lib, cls] for name, (lib, cls, _) in components.items()}}
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)


def _stable_diffusion(xl: bool) -> tuple[str, ComponentConfigs]:
    """Pipeline class and components of SD 1.5 or SDXL."""
    kind = "sdxl" if xl else "sd15"
    components: ComponentConfigs = {
        "unet": ("diffusers", "UNet2DConditionModel", UNETS[kind]),
        "vae": ("diffusers", "AutoencoderKL", VAE),
        "scheduler": ("diffusers", "DDIMScheduler", SCHEDULER),
        "text_encoder": ("transformers", "CLIPTextModel", {"model_type": "clip_text_model", **CLIP_L}),
        "tokenizer": ("transformers", "CLIPTokenizer", {}),
    }
    if xl:
        components["text_encoder_2"] = (
            "transformers",
            "CLIPTextModelWithProjection",
            {"model_type": "clip_text_model", "projection_dim": 1280, **CLIP_G},
        )
        components["tokenizer_2"] = ("transformers", "CLIPTokenizer", {})
    return "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline", components
