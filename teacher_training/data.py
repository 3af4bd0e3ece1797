"""Captioned images for teacher training: a registered data source, an image folder, or image-parquet."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.distributed import process_group
from d2g.core.errors import UserError
from d2g.core.json_files import read_json
from d2g.core.progress import Progress, quiet
from d2g.data.captions import class_captions
from eval.images.folders import load_all, open_images, read_images

DataSource = Callable[[int, int, int, Progress], tuple[Tensor, list[str]]]
"""`load(size, limit, seed, progress)` returns uint8 images [N, 3, size, size], N <= limit, and N captions."""

_SOURCES: dict[str, DataSource] = {}


def register_data(name: str, load: DataSource) -> None:
    """Make `load` available as `d2g teacher train --data NAME`. A registered name hides a folder of that
    name. Registering the same function again changes nothing; another function under the same name is an
    error.
    """
    assert _SOURCES.setdefault(name, load) is load, f"data source {name!r} is already registered"


def is_registered(source: str) -> bool:
    """Whether this is the name of a registered data source."""
    return source in _SOURCES


def captioned_images(
    source: str,
    size: int,
    limit: int,
    seed: int,
    template: str,
    progress: Progress = quiet,
    column: str | None = None,
) -> tuple[Tensor, list[str]]:
    """Load uint8 images [N, 3, size, size], N <= limit, and their N captions.

    `source` is the name of a registered data source, a folder with captions (`d2g.data.captions`), a folder
    with one subfolder per class (captioned by `template`, such as "a photo of a {}"), or a .parquet file.
    Images from files are turned upright, cropped to a square and resized. `column`: the caption column.
    Raises UserError for a missing source and for images without a caption.
    """
    if source in _SOURCES:
        return _SOURCES[source](size, limit, seed, progress)
    if not Path(source).exists():
        names = f"the data sources {', '.join(sorted(_SOURCES))}" if _SOURCES else "no data sources"
        raise UserError(
            f"{source}: no such file or folder; expected a folder of captioned images, a .parquet file, "
            f"or a registered name (there are {names})"
        )
    files = open_images(source, column)
    captions = {} if files.captions else class_captions(Path(source), files.pictures, template)
    if captions:
        files = replace(files, captions=captions)
        # Above the limit, take evenly spaced images, so that every class keeps its share.
        count = len(files.pictures)
        if count > limit:
            files = replace(files, pictures=[files.pictures[row * count // limit] for row in range(limit)])
    images, texts = load_all(read_images(files, limit=limit, resize=f"crop{size}-lanczos", exact=False))
    if "" in texts:
        raise UserError(
            f"{source}: {texts.count('')} of {len(texts)} images have no caption; "
            "expected a metadata.jsonl with file_name and caption, NAME.txt beside NAME.png, a caption "
            "column, or class-named subfolders"
        )
    return images, texts


def cached_images(
    folder: Path,
    source: str,
    size: int,
    limit: int,
    seed: int,
    template: str,
    progress: Progress = quiet,
    column: str | None = None,
) -> tuple[Tensor, list[str]]:
    """`captioned_images`, cached in `folder`: rank 0 loads them once, other ranks and resumed runs read the
    cache.
    """
    pixels, texts = folder / "images.npy", folder / "captions.json"
    if not texts.is_file() and process_group.rank() == 0:
        images, captions = captioned_images(source, size, limit, seed, template, progress, column)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(pixels, images.numpy())
        write_atomically(texts, json.dumps(captions))  # written last: it marks a complete cache
    process_group.barrier()
    return torch.from_numpy(np.load(pixels)), read_json(texts, f"delete {folder} and run again", list[str])
