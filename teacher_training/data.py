"""Captioned images for teacher training: a registered data source, an image folder, or image-parquet."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.distributed import process_group
from d2g.core.errors import UserError
from d2g.core.progress import Progress, quiet
from eval.images.folders import IMAGE_SUFFIXES, load_all, read_images

DataSource = Callable[[int, int, int, Progress], tuple[Tensor, list[str]]]
"""`load(size, limit, seed, progress)` returns uint8 images [N, 3, size, size], N <= limit, and N captions."""

_SOURCES: dict[str, DataSource] = {}


def register_data(name: str, load: DataSource) -> None:
    """Make `load` available as `d2g teacher train --data NAME`. A registered name hides a folder of that
    name. Registering the same function again changes nothing; another function under the same name is an
    error.
    """
    assert _SOURCES.setdefault(name, load) is load, f"data source {name!r} is already registered"


def captioned_images(
    source: str, size: int, limit: int, seed: int, template: str, progress: Progress = quiet
) -> tuple[Tensor, list[str]]:
    """Load uint8 images [N, 3, size, size], N <= limit, and their N captions.

    `source` is the name of a registered data source, a folder with metadata.jsonl, a folder with one
    subfolder per class (captioned by `template`, such as "a photo of a {}"), or a .parquet file. Images from
    files are cropped to a square and resized. Raises UserError for a missing source and for images without
    a caption.
    """
    if source in _SOURCES:
        return _SOURCES[source](size, limit, seed, progress)
    if not Path(source).exists():
        names = f"the data sources {', '.join(sorted(_SOURCES))}" if _SOURCES else "no data sources"
        raise UserError(
            f"{source}: no such file or folder; expected a folder of captioned images, a .parquet file, "
            f"or a registered name (there are {names})"
        )
    images, captions = _read_captioned(Path(source), limit, f"crop{size}-lanczos", template)
    if "" in captions:
        raise UserError(
            f"{source}: {captions.count('')} of {len(captions)} images have no caption; "
            "expected a metadata.jsonl with file_name and caption, a caption column, or class-named "
            "subfolders"
        )
    return images, captions


def _read_captioned(folder: Path, limit: int, resize: str, template: str) -> tuple[Tensor, list[str]]:
    classes = _classes(folder)
    if not classes:
        return load_all(read_images(folder, limit=limit, resize=resize))
    images = [load_all(read_images(path, limit=limit, resize=resize))[0] for path in classes]
    captions = [
        template.format(path.name.replace("_", " "))
        for path, part in zip(classes, images, strict=True)
        for _ in range(len(part))
    ]
    # Above the limit, take evenly spaced images, so that every class keeps its share.
    count = len(captions)
    rows = [row * count // limit for row in range(limit)] if count > limit else list(range(count))
    return torch.cat(images)[rows], [captions[row] for row in rows]


def _classes(folder: Path) -> list[Path]:
    """Subfolders that hold images; none when the folder itself holds images or captions."""
    if not folder.is_dir() or (folder / "metadata.jsonl").is_file():
        return []
    if any(p.suffix.lower() in IMAGE_SUFFIXES or p.suffix == ".parquet" for p in folder.iterdir()):
        return []
    return sorted(
        p
        for p in folder.iterdir()
        if p.is_dir() and any(f.suffix.lower() in IMAGE_SUFFIXES for f in p.iterdir())
    )


def cached_images(
    folder: Path, source: str, size: int, limit: int, seed: int, template: str, progress: Progress = quiet
) -> tuple[Tensor, list[str]]:
    """`captioned_images`, cached in `folder`: rank 0 loads them once, other ranks and resumed runs read the
    cache.
    """
    pixels, texts = folder / "images.npy", folder / "captions.json"
    if not texts.is_file() and process_group.rank() == 0:
        images, captions = captioned_images(source, size, limit, seed, template, progress)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(pixels, images.numpy())
        write_atomically(texts, json.dumps(captions))  # written last: it marks a complete cache
    process_group.barrier()
    return torch.from_numpy(np.load(pixels)), json.loads(texts.read_text(encoding="utf-8"))
