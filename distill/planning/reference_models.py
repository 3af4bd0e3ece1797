"""Configs of SD 1.5 and SDXL, to predict memory and FLOPs of a run without downloading weights."""

import json
from pathlib import Path
from typing import Any

NAMES = {"sd15": "SD 1.5", "sdxl": "SDXL"}
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


def configs_only(kind: str, folder: Path) -> str:
    """Write a pipeline folder with the configs of `sd15` or `sdxl` and no weights, and return its path."""
    xl = kind == "sdxl"
    # Library, class and config of each component.
    components: dict[str, tuple[str, str, dict[str, Any]]] = {
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
    # Write the folder as diffusers lays it out, without weights.
    for name, (_, kind_of, config) in components.items():
        (folder / name).mkdir(parents=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps({"_class_name": kind_of, **config}))
    pipeline = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
    index = {"_class_name": pipeline, **{name: [lib, cls] for name, (lib, cls, _) in components.items()}}
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)
