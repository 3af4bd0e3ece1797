"""Pipelines on disk: folders in diffusers layout and hub ids, and the files that decide a teacher's samples.

A pipeline's `model_index.json` says what it is; the supported ones are in `d2g/diffusion/families/`.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypedDict

from d2g.core import hub
from d2g.core.errors import UserError
from d2g.core.json_files import check_type, parse_json
from d2g.core.machine_errors import raise_machine_error
from d2g.core.regular_files import open_regular
from d2g.diffusion.families.base import Family, Pipeline
from d2g.diffusion.families.registry import FAMILIES

FAMILY_OF: Mapping[str, Family] = {kind: family for family in FAMILIES.values() for kind in family.pipelines}
"""Pipeline class of diffusers -> its family."""

PIPELINES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    kind: family.components for kind, family in FAMILY_OF.items()
}
"""Pipeline class of diffusers -> component -> the classes it may have."""

SHIPPED = {"miniature": Path(__file__).resolve().parents[2] / "miniature" / "weights"}
"""Names of folders in this distribution, each with teacher/, student/ and more inside."""

FACTS = ("force_zeros_for_empty_prompt", "null_class")
"""Keys of model_index.json, other than its components, that decide latents."""

HALVES = ("bf16", "fp16")
"""Variants of weights that are loaded if there is no full-precision copy."""

_TEXT = (".json", ".txt", ".model")  # configs, vocabularies, sentencepiece models


def is_local(name: str) -> bool:
    """Whether a pipeline's name is a shipped one or a path of this disk, not a hub id."""
    return name in SHIPPED or Path(name).exists()


def resolve(name: str) -> Path:
    """The folder of a pipeline: `name` itself if it is one, a shipped folder, or the snapshot of a hub id.

    Raises UserError for a missing folder, a folder without model_index.json, a teacher whose training is not
    finished, and a failed download.
    """
    folder = SHIPPED[name] / "teacher" if name in SHIPPED else Path(name)
    if folder.is_dir():
        refuse_unfinished(name, folder)
        if not (folder / "model_index.json").is_file():
            raise UserError(f"teacher {name}: {_other_folder(folder)}")
        return folder
    if folder.is_file():
        raise UserError(f"teacher {name}: {_single_file(folder)}")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise UserError(
            f"teacher {name}: no such folder; give a folder in diffusers layout or a hub id org/name"
        )
    return _snapshot(name)


TRAINING = "training"
"""The folder inside a teacher of `d2g teacher train` with its caches, checkpoints, scores and command."""
HELPER_STAGES = ("vae", "lpips", "clip")
"""Stages of `d2g teacher train` that do not train the network; the folder of a stage has its name."""


def refuse_unfinished(name: str, folder: Path) -> None:
    """Raise UserError for a folder of `d2g teacher train` whose network is not trained to the end."""
    training = folder / TRAINING
    finished = [file for file in training.glob("*/scores.json") if file.parent.name not in HELPER_STAGES]
    if finished or not (training / "config.json").is_file():
        return
    command = training / "command.txt"
    how = (
        f"finish it with `{command.read_text(encoding='utf-8').strip()}`"
        if command.is_file()
        else "run the same `d2g teacher train` command again to finish it"
    )
    raise UserError(f"teacher {name}: its training is not finished; {how}")


def _other_folder(folder: Path) -> str:
    """Describe a folder without model_index.json, and how it becomes a teacher."""
    names = {path.name for path in folder.iterdir()}
    into = 'save_pretrained("teacher")'
    # Folders of d2g and of diffusers that are no pipelines.
    if {"student.json", "checkpoints"} & names:
        return "a student of d2g, no teacher; give it to --student"
    if "pytorch_lora_weights.safetensors" in names:
        return (
            "LoRA adapters, no model_index.json; in diffusers, load the pipeline they were trained on, then "
            f"pipe.load_lora_weights({str(folder)!r}), pipe.fuse_lora() and pipe.{into}"
        )
    # A network without the other components of its pipeline.
    networks = [n for n in ("unet", "transformer") if (folder / n / "config.json").is_file()]
    others = {component for family in FAMILIES.values() for component in family.components} - {*networks}
    if networks and not others & names:
        network = networks[0]
        return (
            f"no model_index.json and no component but {network}, as fine-tuning scripts leave checkpoints; "
            f"copy the pipeline that it was trained from, with its folder {network} replaced by this one"
        )
    if {"config.json", "diffusion_pytorch_model.safetensors"} <= names:
        return (
            "one model, no model_index.json; copy the pipeline that it was trained from, with the folder of "
            "that component replaced by this one"
        )
    return (
        "no model_index.json; expected a folder in diffusers layout, as "
        "StableDiffusionPipeline.save_pretrained writes"
    )


def _single_file(file: Path) -> str:
    """Explain how a checkpoint in a single file becomes a teacher."""
    if file.suffix not in SINGLE_FILE_SUFFIXES:
        return "a file; expected a folder in diffusers layout or a hub id org/name"
    return (
        f"a checkpoint in a single file; import it once with `d2g teacher import {shlex.quote(str(file))} "
        "FOLDER`, then give FOLDER"
    )


SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""Endings of checkpoints in a single file; all but the first are pickles of torch.save."""


def open_pipeline(name: str) -> Pipeline:
    """The pipeline in a folder or hub id. Raises UserError for pipelines of no family."""
    return _read_index(resolve(name))


def family_of(name: str) -> Family:
    """The family of a teacher. Raises UserError as `open_pipeline` does."""
    return open_pipeline(name).family


class ModelIndex(TypedDict):
    """The fields of every model_index.json. Components are pairs of library and class."""

    _class_name: str


def _read_index(folder: Path) -> Pipeline:
    try:
        with open_regular(folder / "model_index.json") as file:
            index = parse_json(file.read())
        check_type(index, ModelIndex)
        kind = index["_class_name"]
    except (OSError, ValueError) as error:
        raise_machine_error(error)
        raise UserError(
            f"teacher {folder}: model_index.json cannot be read ({type(error).__name__}: {error}); "
            "expected JSON with _class_name, as save_pretrained writes"
        ) from error
    if not isinstance(kind, str) or kind not in FAMILY_OF:
        raise UserError(
            f"teacher {folder}: model_index.json says {kind}, which is not supported; "
            f"supported: {', '.join(FAMILY_OF)}"
        )
    return Pipeline(folder, kind, index, FAMILY_OF[kind])


@lru_cache
def _snapshot(name: str) -> Path:
    """Download the files of a hub id that its family needs, or find them in the cache: weights in full
    precision where the repository has them, else a copy in half precision.
    """

    def fetch(patterns: list[str]) -> Path:
        return hub.fetch(name, patterns, f"teacher {name}")

    # First the index, which names the components; then their files.
    pipeline = _read_index(fetch(["model_index.json"]))
    components = pipeline.components
    models = [c for c in components if c != "scheduler" and not c.startswith("tokenizer")]
    patterns = [f"{component}/*{suffix}" for component in components for suffix in _TEXT]
    patterns += [f"{model}/{file}" for model in models for file in weight_patterns(None)]
    if pipeline.family.flat_layout:
        patterns += ["config.json", "scheduler_config.json", *weight_patterns(None)]
    folder = fetch(["model_index.json", "README.md", *patterns])  # the README states the license
    # Models without full-precision weights: fetch their copies in half precision.
    missing = [m for m in models if (folder / m).is_dir() and not list((folder / m).glob("*.safetensors"))]
    if missing:
        fetch([f"{model}/{file}" for model in missing for v in HALVES for file in weight_patterns(v)])
    return folder


def weight_patterns(variant: str | None) -> list[str]:
    """File names of a component's safetensors as diffusers and transformers write them, single or sharded."""
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
    """(variant, files) of the safetensors to load, from a component's file names.

    Full precision, or else one of HALVES. Raises UserError if there are no safetensors.
    """
    listed = sorted(names)
    for variant in (None, *HALVES):
        patterns = weight_patterns(variant)
        if files := [name for name in listed if any(fnmatchcase(name, p) for p in patterns)]:
            return variant, files
    raise UserError(
        f"no safetensors weights among its files ({', '.join(listed) or 'none'}); "
        "load the pipeline with diffusers and save_pretrained it with safe_serialization=True"
    )


class TeacherDigests(NamedTuple):
    """Digests that identify a teacher at any path: sha256 over its files.

    `weights`: of all components. `denoiser`: of those that decide latents, without the autoencoder.
    """

    weights: str
    denoiser: str


def teacher_digests(name: str) -> TeacherDigests:
    """The digests of a teacher. Raises UserError as `open_pipeline` does."""
    return TeacherDigests(weights_sha256(name), denoiser_sha256(name))


def weights_sha256(name: str) -> str:
    """sha256 over the files that decide a teacher's samples: all components of its pipeline, every shard of
    their weights, and the keys of model_index.json in FACTS.

    Files are hashed in parallel, and each once per process.
    """
    pipeline = open_pipeline(name)
    return _components_sha256(pipeline, pipeline.components)


def denoiser_sha256(name: str) -> str:
    """sha256 as `weights_sha256`, but without the autoencoder, which turns latents into pixels only."""
    pipeline = open_pipeline(name)
    return _components_sha256(pipeline, [c for c in pipeline.components if c != pipeline.family.autoencoder])


def _components_sha256(pipeline: Pipeline, components: Iterable[str]) -> str:
    # The components in order of name, so that the hash does not depend on the file system.
    total = hashlib.sha256()
    files = [
        path
        for component in sorted(components)
        for path in component_files(pipeline.component_dir(component))
    ]
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        digests = list(pool.map(_file_sha256, files))
    # File names enter the hash too: equal bytes in another file are another model.
    for path, digest in zip(files, digests, strict=True):
        total.update(path.name.encode() + digest)
    facts = {key: pipeline.index[key] for key in FACTS if key in pipeline.index}
    if facts:
        total.update(json.dumps(facts, sort_keys=True).encode())
    return total.hexdigest()


def component_files(folder: Path) -> list[Path]:
    """The files of a component that are loaded, in order of name, without other variants and formats."""
    # Of the weights, only the files that are loaded; all texts, because they hold configs and vocabularies.
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    weights = [name for name in names if name.endswith(".safetensors")]
    chosen = set(choose_weights(names)[1]) if weights else set()
    return [folder / name for name in names if name in chosen or name.endswith(_TEXT)]


def component_sha256(folder: Path) -> str:
    """sha256 over the files of one component that are loaded."""
    total = hashlib.sha256()
    for path in component_files(folder):
        total.update(path.name.encode() + _file_sha256(path))
    return total.hexdigest()


def _file_sha256(path: Path) -> bytes:
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=4096)
def _digest(path: Path, size: int, mtime_ns: int, inode: int) -> bytes:
    """sha256 of a file; the other arguments make a changed file another key of the cache."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
