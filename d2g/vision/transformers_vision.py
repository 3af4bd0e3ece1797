"""DINO, DINOv2, DINOv3 and CLIP models of transformers, from a folder or a hub id."""

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from d2g.core import hub
from d2g.core.errors import UserError
from d2g.core.machine_errors import raise_machine_error

WEIGHTS = ("config.json", "*.safetensors")
WORDS = ("vocab.json", "merges.txt", "tokenizer*.json", "special_tokens_map.json")


def load_dinov2_model(name: str) -> Any:
    """Load a Dinov2Model: fp32, eval, frozen. Raises UserError when `name` is no folder or hub id of one."""
    return _load(name, "Dinov2Model", "dinov2")


def load_clip_model(name: str) -> Any:
    """Load a CLIPModel: fp32, eval, frozen. Raises UserError when `name` is no folder or hub id of one."""
    return _load(name, "CLIPModel", "clip")


VISION_MODELS = {
    "vit": "ViTModel",
    "deit": "DeiTModel",
    "dinov2": "Dinov2Model",
    "dinov3_vit": "DINOv3ViTModel",
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
}
"""Classes of vision transformers by the type in their config; DINO and some of DeiT are of type vit."""
PUBLISHED_CONFIGS: dict[str, dict[str, Any]] = {
    "facebook/dino-vits16": {
        "model_type": "vit",
        "hidden_size": 384,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
    },
    "openai/clip-vit-large-patch14": {
        "model_type": "clip",
        "projection_dim": 768,
        "text_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
        },
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
        },
    },
}
"""Configs of published models, as far as they differ from the class's defaults, to predict memory with."""


def load_vision_transformer(name: str, on_meta: bool = False) -> Any:
    """Load the image tower of a DINO, DINOv2, DINOv3, DeiT or CLIP: fp32, eval, frozen.

    on_meta: without weights. Raises UserError when `name` is no folder or hub id of one.
    """
    import transformers

    config = _vision_config(name, (WEIGHTS[0],) if on_meta else WEIGHTS)
    if config.model_type not in VISION_MODELS:
        raise UserError(f"{name} is a {config.model_type} model; expected {', '.join(VISION_MODELS)}")
    kind = VISION_MODELS[config.model_type]
    options = {"add_pooling_layer": False} if kind in ("ViTModel", "DeiTModel") else {}  # no pooler
    if not on_meta:
        return _load(name, kind, config.model_type, **options)
    with torch.device("meta"):
        model = getattr(transformers, kind)(getattr(config, "vision_config", config), **options)
    return model.eval().requires_grad_(False)


def clip_on_meta(name: str) -> Any:
    """A CLIPModel without weights, from the config of a folder or hub id."""
    import transformers

    config = _vision_config(name, (WEIGHTS[0],))
    if config.model_type != "clip":
        raise UserError(f"{name} is a {config.model_type} model; expected clip")
    with torch.device("meta"):
        return transformers.CLIPModel(config).eval().requires_grad_(False)


def _vision_config(name: str, files: tuple[str, ...]) -> Any:
    """The config of a folder or hub id, or that of a published model which is not here."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(_folder(name, files), trust_remote_code=False)
    except UserError:
        if name not in PUBLISHED_CONFIGS or files == WEIGHTS:
            raise
        settings = dict(PUBLISHED_CONFIGS[name])
        return transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    except (OSError, ValueError) as error:
        raise_machine_error(error)
        raise UserError(f"{name} has no config of transformers: {str(error).splitlines()[0]}") from error


def refuse_custom_code(name: str) -> None:
    """Raise ValueError or OSError unless transformers has the model of this folder or hub id itself."""
    import transformers

    transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)


def load_clip_tokenizer(name: str) -> Any:
    """Load the CLIPTokenizer of a folder or hub id. Raises UserError when there is none."""
    from transformers import CLIPTokenizer

    folder = _folder(name, WORDS)
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise UserError(
            f"{name} holds no tokenizer; expected tokenizer.json or vocab.json and merges.txt in it"
        )
    return CLIPTokenizer.from_pretrained(folder)


def text_table_sha256(table: torch.Tensor) -> str:
    """Digest of a CLIP by the embeddings of its tokens [N, D], which all file formats store, in fp16."""
    return hashlib.sha256(table.detach().half().cpu().contiguous().numpy().tobytes()).hexdigest()


def clip_sha256(name: str) -> str:
    """`text_table_sha256` of a CLIPModel in a folder or hub id; "" without the embeddings of its tokens."""
    for file in sorted(_folder(name, WEIGHTS).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # no dict
                if key.endswith("embeddings.token_embedding.weight"):
                    return text_table_sha256(tensors.get_tensor(key))
    return ""


def _load(name: str, kind: str, model_type: str, **options: Any) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = _folder(name, WEIGHTS)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if config.model_type != model_type:
            raise UserError(f"{name} is a {config.model_type} model; expected {model_type}")
        model, report = getattr(transformers, kind).from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise_machine_error(error)
        raise UserError(f"{name} does not load as {kind}: {str(error).splitlines()[0]}") from error
    if report["missing_keys"]:  # transformers would initialize them at random
        raise UserError(f"{name} lacks weights of {kind}: {', '.join(sorted(report['missing_keys'])[:3])}")
    return model.float().eval().requires_grad_(False)


def _folder(name: str, files: tuple[str, ...]) -> Path:
    """The folder itself, or the downloaded snapshot of a hub id with these files."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise UserError(f"{name}: no such folder; give one as save_pretrained writes, or a hub id org/name")
    return hub.fetch(name, files, name)
