"""DINOv2 and CLIP models of transformers, from a folder or a hub id."""

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from d2g.core.errors import UserError

WEIGHTS = ("config.json", "*.safetensors")
WORDS = ("vocab.json", "merges.txt", "tokenizer*.json", "special_tokens_map.json")


def load_dinov2_model(name: str) -> Any:
    """Load a Dinov2Model: fp32, eval, frozen. Raises UserError when `name` is no folder or hub id of one."""
    return _load(name, "Dinov2Model", "dinov2")


def load_clip_model(name: str) -> Any:
    """Load a CLIPModel: fp32, eval, frozen. Raises UserError when `name` is no folder or hub id of one."""
    return _load(name, "CLIPModel", "clip")


def load_clip_tokenizer(name: str) -> Any:
    """Load the CLIPTokenizer of a folder or hub id. Raises UserError when there is none."""
    from transformers import CLIPTokenizer

    folder = _folder(name, WORDS)
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise UserError(
            f"{name} holds no tokenizer; expected tokenizer.json or vocab.json and merges.txt in it"
        )
    return CLIPTokenizer.from_pretrained(folder)


def _load(name: str, kind: str, model_type: str) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = _folder(name, WEIGHTS)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        if config.model_type != model_type:
            raise UserError(f"{name} is a {config.model_type} model; expected {model_type}")
        model, report = getattr(transformers, kind).from_pretrained(
            folder, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
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
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name}: no such folder here, and as a hub id it cannot be fetched "
            f"({str(error).splitlines()[0]}); fetch its {', '.join(files)} elsewhere and give their folder"
        ) from error
