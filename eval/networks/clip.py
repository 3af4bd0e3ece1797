"""CLIP models through open_clip. No other module imports open_clip."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2g.core.atomic_files import share_weights
from d2g.core.errors import UserError, first_line
from d2g.core.json_files import COPY_AGAIN, read_json_object
from d2g.core.machine_errors import raise_machine_error
from d2g.vision.transformers_vision import refuse_custom_code, text_table_sha256
from eval.images.resize import to_pil
from eval.networks.base import ClipNet, Device, FeatureNet, parameters_sha256

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
)
CLIP_CONFIG, CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"

CLIP_PRESETS: Mapping[str, str] = MappingProxyType(
    {
        # The default of GigaGAN's evaluation code. OpenAI trained with quick GELU; the name selects it.
        "vit-b-32": "ViT-B-32-quickgelu:openai",
        # LAION-2B: StyleGAN-T, DMD ("OpenCLIP-G") and most likely Diffusion2GAN (method.md "CLIP score").
        "vit-g-14": "ViT-g-14:laion2b_s12b_b42k",
        # CMMD (Jayasumana et al. 2024).
        "vit-l-14-336": "ViT-L-14-336-quickgelu:openai",
    }
)
"""Short names of the CLIP models that papers score with: open_clip's model and tag."""


def load_clip(model: str, device: Device = "cpu") -> ClipNet:
    """Load a CLIP through open_clip.

    `model`: a name of CLIP_PRESETS, `MODEL:TAG_OR_FILE` (ViT-B-32-quickgelu:openai), or a folder (also
    `local-dir:FOLDER`) with open_clip_config.json, weights and tokenizer files. With a tag, open_clip
    downloads the weights. The name of the result is always model and tag. Raises UserError when the folder,
    the weights or the name is missing.
    """
    net, preprocess, tokenizer, full_name = _load(model, device)

    @torch.no_grad()
    def encode_images(images: Tensor) -> Tensor:
        return F.normalize(_embed(net, preprocess, images, device), dim=1).cpu()

    @torch.no_grad()
    def encode_texts(texts: list[str]) -> Tensor:
        return F.normalize(net.encode_text(tokenizer(texts).to(device)).float(), dim=1).cpu()

    return ClipNet(
        name=full_name,
        dim=encode_texts([""]).shape[1],
        sha256=parameters_sha256(net),
        encode_images=encode_images,
        encode_texts=encode_texts,
        text_sha256=_text_sha256(net),
    )


def _text_sha256(net: Any) -> str:
    tower = net if hasattr(net, "token_embedding") else getattr(net, "text", None)
    table = getattr(tower, "token_embedding", None)
    return "" if table is None else text_table_sha256(table.weight)


def load_clip_features(model: str | Path | None = None, device: Device = "cpu") -> FeatureNet:
    """Load the image tower of a CLIP as a feature network. Embeddings are not normalized; `cmmd` does that.

    `model` None: ViT-B/32, with which clean-fid and Kynkaanniemi et al. 2023 measure FD-CLIP.
    """
    net, preprocess, tokenizer, full_name = _load(str(model or "vit-b-32"), device)
    with torch.no_grad():
        dim = net.encode_text(tokenizer([""]).to(device)).shape[1]
    return FeatureNet(
        name=f"clip:{full_name}",
        dim=dim,
        sha256=parameters_sha256(net),
        function=lambda images: _embed(net, preprocess, images, device),
    )


def _load(model: str, device: Device) -> tuple[Any, Any, Any, str]:
    """Load open_clip's model, preprocessing and tokenizer; the last value is the full name of the model."""
    import open_clip

    model = CLIP_PRESETS.get(model, model)
    # A folder, or MODEL:WEIGHTS as open_clip names them.
    folder = model.removeprefix("local-dir:")
    local = folder != model or Path(folder).is_dir()
    name, _, pretrained = (f"local-dir:{folder}", "", "") if local else model.partition(":")
    _check_source(model, Path(folder) if local else None, pretrained)
    try:
        options = _without_own_code(Path(folder)) if local else {}
        net, _, preprocess = open_clip.create_model_and_transforms(
            name, pretrained=pretrained or None, device=device
        )
        tokenizer = open_clip.get_tokenizer(name, **options)
    except Exception as error:  # on damaged files and without a network, it raises almost anything
        raise_machine_error(error)
        raise UserError(
            f"CLIP {model!r} does not load ({first_line(error)[:200]}); give MODEL:FILE with its weights, or "
            "a folder of open_clip, fetched where there is a network"
        ) from error
    full_name = f"local-dir:{Path(folder).resolve().name}" if local else model
    return net.eval().requires_grad_(False), preprocess, tokenizer, full_name


def _without_own_code(folder: Path) -> dict[str, bool]:
    """Options of the tokenizer that win over the folder's `tokenizer_kwargs`: none of its code runs.

    Raises ValueError for a text model with code of its own, before open_clip would ask whether to run it.
    """
    text = read_json_object(folder / CLIP_CONFIG, COPY_AGAIN)["model_cfg"]["text_cfg"]
    if text.get("hf_model_name"):
        refuse_custom_code(text["hf_model_name"])
    # open_clip's own tokenizer, which runs no code, does not take the option.
    return {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}


def _embed(net: Any, preprocess: Any, images: Tensor, device: Device) -> Tensor:
    pixels = torch.stack([preprocess(to_pil(image)) for image in images]).to(device)
    embedded: Tensor = net.encode_image(pixels).float()
    return embedded


def _check_source(model: str, folder: Path | None, pretrained: str) -> None:
    if folder is None and not pretrained:
        raise UserError(
            f"CLIP {model!r} is neither a folder nor MODEL:TAG_OR_FILE; for example "
            f"{', '.join(CLIP_PRESETS)} or ViT-B-32-quickgelu:openai"
        )
    # Without weights open_clip only logs a line and continues with a random network.
    if folder is not None:
        suffixes = {file.suffix for file in folder.glob("*")}
        if not (folder / CLIP_CONFIG).is_file() or not suffixes & {".safetensors", ".bin", ".pth"}:
            raise UserError(
                f"{folder} is no open_clip folder; expected {CLIP_CONFIG} and {CLIP_WEIGHTS} in it"
            )


def new_clip(model_config: Mapping[str, Any]) -> Any:
    """Build an untrained CLIP from open_clip's `model_cfg` (embed_dim, vision_cfg, text_cfg)."""
    import open_clip

    return open_clip.CLIP(**model_config)


def clip_tokenizer(folder: str | Path, context_length: int) -> Callable[[list[str]], Tensor]:
    """Load open_clip's tokenizer from CLIPTokenizer files: texts -> token ids [B, context_length].

    Its `.tokenizer` is the transformers tokenizer. Raises UserError when the folder has no tokenizer, or one
    with code of its own.
    """
    import open_clip

    if not any((Path(folder) / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{folder} holds no tokenizer; expected {', '.join(TOKENIZER_FILES[:2])} in it")
    try:
        tokenizer: Callable[[list[str]], Tensor] = open_clip.tokenizer.HFTokenizer(
            str(folder), context_length=context_length, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise_machine_error(error)
        raise UserError(
            f"the tokenizer of {folder} does not load ({first_line(error)[:200]}); copy it again"
        ) from error
    return tokenizer


def save_clip(
    model: nn.Module,
    model_config: Mapping[str, Any],
    preprocess_config: Mapping[str, Any],
    tokenizer: str | Path,
    out: str | Path,
) -> None:
    """Write a folder that `local-dir:` of open_clip loads: config, fp16 weights and tokenizer files."""
    from safetensors.torch import save_file

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": model_config, "preprocess_cfg": preprocess_config}
    (out / CLIP_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(
        {name: t.detach().half().contiguous() for name, t in model.state_dict().items()}, out / CLIP_WEIGHTS
    )
    share_weights(out, CLIP_WEIGHTS)
    for name in TOKENIZER_FILES:
        if (Path(tokenizer) / name).is_file():
            shutil.copyfile(Path(tokenizer) / name, out / name)
