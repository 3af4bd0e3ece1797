"""Teachers with random weights for benchmarks/gpu.py."""

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu_rows import DEVICE, Options
from benchmarks.training_step import fill_randomly
from d2g.diffusion.pretrained import load_on_meta, new_tokenizer
from distill.planning.reference_models import configs_only
from miniature.sampling import scene_captions


def random_teacher(kind: str, options: Options) -> str:
    """A pipeline folder of SD 1.5's or SDXL's size in fp16 under OUT/models."""
    folder = options.out / "models" / (f"tiny-{kind}" if options.tiny else kind)
    if not (folder / "model_index.json").is_file():  # written last
        _save_random_pipeline(kind, folder, options.tiny)
    return str(folder)


TINY: dict[str, dict[str, Any]] = {
    "vae": {"block_out_channels": [32] * 4, "layers_per_block": 1},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 1000},
    "text_encoder_2": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "vocab_size": 1000,
    },
}
TINY_UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 8, "block_out_channels": [32, 32, 64, 64], "cross_attention_dim": 32},
    "sdxl": {
        "sample_size": 8,
        "block_out_channels": [32, 64, 64],
        "attention_head_dim": [2, 2, 2],
        "cross_attention_dim": 64,
        "transformer_layers_per_block": [1, 1, 1],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
    },
}


def random_configs(kind: str, folder: Path, tiny: bool) -> str:
    """A pipeline folder of a key of distill.planning.reference_models.NAMES, without weights."""
    configs_only(kind, folder)
    for part, smaller in {**TINY, "unet": {**TINY_UNETS[kind], "layers_per_block": 1}}.items():
        file = folder / part / "config.json"
        if not tiny or not file.is_file():
            continue
        config = json.loads(file.read_text())
        heads = {"num_attention_heads": 2, "projection_dim": 32} if part.startswith("text") else {}
        file.write_text(json.dumps({**config, **smaller, **heads}))
    return str(folder)


def _save_random_pipeline(kind: str, folder: Path, tiny: bool) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    with tempfile.TemporaryDirectory() as scratch:
        configs = random_configs(kind, Path(scratch) / "configs", tiny)
        parts = ["unet", "vae", "text_encoder", *(["text_encoder_2"] if kind == "sdxl" else [])]
        networks: dict[str, Any] = {part: load_on_meta(configs, part) for part in parts}
        for network in networks.values():
            fill_randomly(network, DEVICE)
            network.half()
        # The vocabulary does not matter for the speed, the 77 tokens do.
        words = scene_captions(200, 0)
        tokenizers = {
            part.replace("text_encoder", "tokenizer"): new_tokenizer(words, Path(scratch) / part, 400, 77)
            for part in parts
            if part.startswith("text_encoder")
        }
        scheduler = DDIMScheduler.from_pretrained(configs, subfolder="scheduler")
        if kind == "sdxl":
            StableDiffusionXLPipeline(
                **networks, **tokenizers, scheduler=scheduler, add_watermarker=False
            ).save_pretrained(folder)
        else:
            StableDiffusionPipeline(
                **networks,
                **tokenizers,
                scheduler=scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            ).save_pretrained(folder)
