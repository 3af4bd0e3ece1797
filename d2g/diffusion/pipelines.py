"""Pipelines on disk: which kinds we know, their pieces, and the files that decide what a teacher draws.

A pipeline is a folder in diffusers layout, or a hub id. Its `model_index.json` says what it is.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from d2g.core.errors import UserError

_VAE = ("AutoencoderKL", "AutoencoderTiny")
_CLIP = ("CLIPTextModel",)
_CLIP_POOLED = ("CLIPTextModelWithProjection",)
_CLIP_TOKENIZER = ("CLIPTokenizer", "CLIPTokenizerFast")
_T5 = ("T5EncoderModel",)
_T5_TOKENIZER = ("T5Tokenizer", "T5TokenizerFast")
_PIXART = {
    "transformer": ("PixArtTransformer2DModel", "Transformer2DModel"),  # the second: its name until 2024
    "vae": _VAE,
    "text_encoder": _T5,
    "tokenizer": _T5_TOKENIZER,
    "scheduler": (),
}
_PIXELS = {"unet": ("UNet2DModel",), "scheduler": ()}

PIPELINES: dict[str, dict[str, tuple[str, ...]]] = {
    "StableDiffusionPipeline": {
        "unet": ("UNet2DConditionModel",),
        "vae": _VAE,
        "text_encoder": _CLIP,
        "tokenizer": _CLIP_TOKENIZER,
        "scheduler": (),
    },
    "StableDiffusionXLPipeline": {
        "unet": ("UNet2DConditionModel",),
        "vae": _VAE,
        "text_encoder": _CLIP,
        "tokenizer": _CLIP_TOKENIZER,
        "text_encoder_2": _CLIP_POOLED,
        "tokenizer_2": _CLIP_TOKENIZER,
        "scheduler": (),
    },
    "StableDiffusion3Pipeline": {
        "transformer": ("SD3Transformer2DModel",),
        "vae": _VAE,
        "text_encoder": _CLIP_POOLED,
        "tokenizer": _CLIP_TOKENIZER,
        "text_encoder_2": _CLIP_POOLED,
        "tokenizer_2": _CLIP_TOKENIZER,
        "text_encoder_3": _T5,
        "tokenizer_3": _T5_TOKENIZER,
        "scheduler": (),
    },
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
    "DiTPipeline": {
        "transformer": ("DiTTransformer2DModel", "Transformer2DModel"),
        "vae": _VAE,
        "scheduler": (),
    },
    "LDMPipeline": {"unet": ("UNet2DModel",), "vqvae": ("VQModel",), "scheduler": ()},
    "DDIMPipeline": _PIXELS,
    "DDPMPipeline": _PIXELS,
}
"""Kinds of pipeline, by their class in diffusers -> piece -> the classes it may have (none: `d2g.diffusion.scheduler_files`
decides). The first class is the one we load."""

OPTIONAL = {"StableDiffusion3Pipeline": ("text_encoder_3", "tokenizer_3")}
"""Pieces that a pipeline may leave out, by saying [null, null]."""

SHIPPED = {"miniature": Path(__file__).resolve().parents[2] / "miniature" / "weights"}
"""Names that stand for folders in this distribution: teacher/, student/ and more inside each."""

FACTS = ("force_zeros_for_empty_prompt", "null_class")
"""Keys of model_index.json beside its pieces that decide latents."""

HALVES = ("bf16", "fp16")
"""Variants of weights that we take when there are no others."""

_TEXT = (".json", ".txt", ".model")  # configs, vocabularies, sentencepiece models


@dataclass(frozen=True)
class Pipeline:
    """A pipeline's folder, its class in diffusers, and its model_index.json."""

    folder: Path
    kind: str
    index: dict[str, Any]

    @property
    def components(self) -> list[str]:
        """The pieces it has, of those its kind needs."""
        absent = {p for p in OPTIONAL.get(self.kind, ()) if self.class_name(p) is None}
        return [component for component in PIPELINES[self.kind] if component not in absent]

    def class_name(self, component: str) -> str | None:
        """The class that model_index.json names for a piece; None where it says [null, null] or nothing."""
        entry = self.index.get(component)
        return entry[1] if isinstance(entry, list) and len(entry) == 2 else None

    def component_dir(self, component: str) -> Path:
        """The folder of a piece. Raises UserError when the piece is missing or of a class we do not load."""
        name, component_dir = self.class_name(component), self.folder / component
        if not component_dir.is_dir() and _may_be_flat(self.kind):
            file = "scheduler_config.json" if component == "scheduler" else "config.json"
            component_dir = self.folder if (self.folder / file).is_file() else component_dir
        if name is None or not component_dir.is_dir():
            found = ", ".join(sorted(p.name for p in self.folder.iterdir() if p.is_dir())) or "none"
            raise UserError(
                f"teacher {self.folder}: no {component}; expected the pieces {', '.join(PIPELINES[self.kind])} "
                f"in diffusers layout; found {found}"
            )
        allowed = PIPELINES[self.kind][component]
        if allowed and name not in allowed:
            raise UserError(
                f"teacher {self.folder}: {component} is a {name}; supported: {', '.join(allowed)}"
            )
        return component_dir


def classes(pipeline: Pipeline, embeddings: int | None) -> tuple[int, int | None]:
    """(classes that may be asked for, the one that stands for none) of a UNet2DModel with so many embeddings
    of classes; (0, None) of an unconditional one.

    The network has no null class of its own; model_index.json may name its last one, as `null_class`. Raises
    UserError where it names another.
    """
    null = pipeline.index.get("null_class")
    if null is not None and (embeddings is None or null != embeddings - 1):
        raise UserError(
            f"teacher {pipeline.folder}: model_index.json has null_class={null}, but the UNet has "
            f"{embeddings or 'no'} classes; expected the last of them"
        )
    return (embeddings or 0) - (null is not None), null


def _may_be_flat(kind: str) -> bool:
    """DDPM repositories of two pieces keep both at the root, and diffusers finds them there."""
    return PIPELINES[kind] is _PIXELS


def resolve(name: str) -> Path:
    """The folder of a pipeline: `name` itself if it is one, a shipped name's, or the snapshot of a hub id.

    Raises UserError for a missing folder, a folder without model_index.json, and a failed download.
    """
    folder = SHIPPED[name] / "teacher" if name in SHIPPED else Path(name)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(
                f"teacher {name}: no model_index.json; expected a folder in diffusers layout, "
                "as StableDiffusionPipeline.save_pretrained writes"
            )
        return folder
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise UserError(
            f"teacher {name}: no such folder; give a folder in diffusers layout or a hub id org/name"
        )
    return _snapshot(name)


def open_pipeline(name: str) -> Pipeline:
    """What a folder or hub id holds. Raises UserError for kinds of pipeline that we cannot sample from."""
    return _read_index(resolve(name))


def _read_index(folder: Path) -> Pipeline:
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        kind = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"teacher {folder}: model_index.json cannot be read ({type(error).__name__}: {error}); "
            "expected JSON with _class_name, as save_pretrained writes"
        ) from error
    if kind not in PIPELINES:
        raise UserError(
            f"teacher {folder}: model_index.json says {kind}, which is not supported; "
            f"supported: {', '.join(PIPELINES)}"
        )
    return Pipeline(folder, kind, index)


@lru_cache
def _snapshot(name: str) -> Path:
    """Download the files that a hub id's kind of pipeline needs, or find them in the cache: full precision
    where the repository has it, a copy in half precision where not.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(name, allow_patterns=patterns))

    try:
        pipeline = _read_index(fetch(["model_index.json"]))
        components = pipeline.components
        models = [p for p in components if p != "scheduler" and not p.startswith("tokenizer")]
        wanted = [f"{component}/*{suffix}" for component in components for suffix in _TEXT]
        wanted += [f"{model}/{file}" for model in models for file in weight_patterns(None)]
        if _may_be_flat(pipeline.kind):
            wanted += ["config.json", "scheduler_config.json", *weight_patterns(None)]
        folder = fetch(["model_index.json", *wanted])
        bare = [p for p in models if (folder / p).is_dir() and not list((folder / p).glob("*.safetensors"))]
        if bare:
            fetch([f"{model}/{file}" for model in bare for v in HALVES for file in weight_patterns(v)])
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"teacher {name}: no such folder here, and as a hub id it cannot be fetched ({first}); "
            "check the name"
        ) from error


def weight_patterns(variant: str | None) -> list[str]:
    """Names of a piece's safetensors as diffusers and transformers write them, whole or in shards."""
    shard = "-?????-of-?????"
    patterns = []
    for stem in ("diffusion_pytorch_model", "model"):
        if variant is None:
            patterns += [f"{stem}.safetensors", f"{stem}{shard}.safetensors"]
        else:
            patterns += [f"{stem}.{variant}.safetensors", f"{stem}.{variant}{shard}.safetensors"]
            patterns += [f"{stem}{shard}.{variant}.safetensors"]
    return patterns


def choose_weights(names: Iterable[str]) -> tuple[str | None, list[str]]:
    """(variant, files) of the safetensors to load from a piece's file names.

    The plain ones, else one of HALVES: copies in half precision are taken only where nothing else is.
    Raises UserError when there are none.
    """
    listed = sorted(names)
    for variant in (None, *HALVES):
        patterns = weight_patterns(variant)
        if found := [name for name in listed if any(fnmatchcase(name, p) for p in patterns)]:
            return variant, found
    raise UserError(
        f"no safetensors weights among its files ({', '.join(listed) or 'none'}); "
        "load the pipeline with diffusers and save_pretrained it with safe_serialization=True"
    )


def weights_sha256(name: str) -> str:
    """sha256 over the files that decide what a teacher draws: all pieces of its kind of pipeline, every shard
    of their weights, and the keys of model_index.json in FACTS.

    Files are hashed side by side, and each once per process.
    """
    pipeline, total = open_pipeline(name), hashlib.sha256()
    files = [
        path
        for component in sorted(pipeline.components)
        for path in piece_files(pipeline.component_dir(component))
    ]
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        digests = list(pool.map(_file_sha256, files))
    for path, digest in zip(files, digests, strict=True):
        total.update(path.name.encode() + digest)
    facts = {key: pipeline.index[key] for key in FACTS if key in pipeline.index}
    if facts:
        total.update(json.dumps(facts, sort_keys=True).encode())
    return total.hexdigest()


def piece_files(component_dir: Path) -> list[Path]:
    """The files of a piece that are loaded, in order of name; other variants and formats are left out."""
    names = sorted(path.name for path in component_dir.iterdir() if path.is_file())
    weights = [name for name in names if name.endswith(".safetensors")]
    chosen = set(choose_weights(names)[1]) if weights else set()
    return [component_dir / name for name in names if name in chosen or name.endswith(_TEXT)]


def piece_sha256(component_dir: Path) -> str:
    """sha256 over the files of one piece."""
    total = hashlib.sha256()
    for path in piece_files(component_dir):
        total.update(path.name.encode() + _file_sha256(path))
    return total.hexdigest()


def _file_sha256(path: Path) -> bytes:
    facts = path.stat()
    return _digest(path, facts.st_size, facts.st_mtime_ns, facts.st_ino)


@lru_cache(maxsize=4096)
def _digest(path: Path, size: int, mtime_ns: int, inode: int) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
