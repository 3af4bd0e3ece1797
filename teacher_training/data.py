"""Captioned pictures for teacher training: rendered scenes, an image folder, or image-parquet."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.distributed import process_group
from d2g.core.errors import UserError
from d2g.core.progress import Progress, quiet
from eval.images.folders import SUFFIXES, load_all, read_images
from miniature.sampling import render_dataset


def captioned_images(
    source: str, size: int, limit: int, seed: int, template: str, progress: Progress = quiet
) -> tuple[Tensor, list[str]]:
    """uint8 images [N, 3, size, size], N <= limit, and N captions.

    `source`: "scenes" (rendered from `seed`), a folder with metadata.jsonl, a folder of class-named
    subfolders (captioned by `template`, as "a photo of a {}"), or .parquet. Pictures are cropped square and
    resized. Raises UserError where an image has no caption.
    """
    if source == "scenes":
        if size != 64:
            raise UserError(f"scenes are rendered at 64 pixels, got size {size}; leave --set size at 64")
        return render_dataset(limit, seed, "train", progress)
    folder, resize = Path(source), f"crop{size}-lanczos"
    classes = _classes(folder)
    if not classes:
        images, captions = load_all(read_images(folder, limit=limit, resize=resize))
    else:
        parts = [load_all(read_images(path, limit=limit, resize=resize)) for path in classes]
        names = [
            template.format(path.name.replace("_", " "))
            for path, (part, _) in zip(classes, parts, strict=True)
            for _ in range(len(part))
        ]
        # Above the limit, evenly spaced pictures stay, so that every class keeps its share.
        kept = (
            [row * len(names) // limit for row in range(limit)] if len(names) > limit else range(len(names))
        )
        images = torch.cat([part for part, _ in parts])[list(kept)]
        captions = [names[row] for row in kept]
    if "" in captions:
        raise UserError(
            f"{source}: {captions.count('')} of {len(captions)} images have no caption; "
            "expected a metadata.jsonl "
            "with file_name and caption, a caption column, or class-named subfolders"
        )
    return images, captions


def _classes(folder: Path) -> list[Path]:
    """Subfolders that hold images, when the folder itself holds neither images nor captions."""
    if not folder.is_dir() or (folder / "metadata.jsonl").is_file():
        return []
    if any(p.suffix.lower() in SUFFIXES or p.suffix == ".parquet" for p in folder.iterdir()):
        return []
    return sorted(
        p for p in folder.iterdir() if p.is_dir() and any(f.suffix.lower() in SUFFIXES for f in p.iterdir())
    )


def cached_images(
    folder: Path, source: str, size: int, limit: int, seed: int, template: str, progress: Progress = quiet
) -> tuple[Tensor, list[str]]:
    """`captioned_images`, kept in `folder` so that ranks and resumed runs read it instead of drawing it
    again.
    """
    pixels, texts = folder / "images.npy", folder / "captions.json"
    if not texts.is_file() and process_group.rank() == 0:
        images, captions = captioned_images(source, size, limit, seed, template, progress)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(pixels, images.numpy())
        write_atomically(texts, json.dumps(captions))  # last: it marks the cache as whole
    process_group.barrier()
    return torch.from_numpy(np.load(pixels)), json.loads(texts.read_text(encoding="utf-8"))
