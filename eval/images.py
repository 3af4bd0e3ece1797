"""Read images and their captions from a folder or from image-parquet files, and bring them to one size."""

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from core.errors import UserError

Batch = tuple[Tensor, list[str]]
"""uint8 images [B, 3, H, W] and their B captions ("" where there is none)."""

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
CAPTION_KEYS = ("caption", "text", "prompt")
_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
}


def read_images(
    source: str | Path, *, limit: int | None = None, resize: str = "native", batch_size: int = 64
) -> Iterator[Batch]:
    """Batches of the images of a folder (with or without metadata.jsonl) or of .parquet files, in sorted
    order.

    Captions come from metadata.jsonl (`file_name` and `caption`, `text` or `prompt`), else from a PNG's own
    `prompt` text; in parquet from such a column. `resize` as in `Protocol`; "native" wants images of one
    size. Raises UserError for a missing or empty source, an unreadable image (named), mixed sizes.
    """
    source = Path(source)
    images: list[Tensor] = []
    captions: list[str] = []
    first_size: tuple[int, int] | None = None
    for done, (name, data, caption) in enumerate(_entries(source)):
        if done == limit:
            break
        image, own_caption = _decode(data, name)
        images.append(to_tensor(_resized(image, resize)))
        captions.append(own_caption if caption is None else caption)
        size = images[-1].shape[2], images[-1].shape[1]
        first_size = first_size or size
        if size != first_size:
            raise UserError(
                f"{name} has {size} pixels, the images before it {first_size}; "
                "make them one size or choose a protocol that resizes"
            )
        if len(images) == batch_size:
            yield torch.stack(images), captions
            images, captions = [], []
    if images:
        yield torch.stack(images), captions


def read_image(file: Path) -> Tensor:
    """One image file -> uint8 [3, H, W]. Raises UserError where it is missing or unreadable."""
    if not file.is_file():
        raise UserError(f"{file}: no such image file")
    return to_tensor(_decode(file.read_bytes(), str(file))[0])


def resize_batch(images: Tensor, resize: str) -> Tensor:
    """uint8 [B, 3, H, W] brought to the protocol's size, exactly as `read_images` does it."""
    if resize == "native":
        return images
    return torch.stack([to_tensor(_resized(to_pil(image), resize)) for image in images])


def resize_clean(images: Tensor, size: int = 299) -> Tensor:
    """clean-fid's resize: antialiased bicubic (a = -1/2, as PIL's) in fp32, neither rounded nor clipped."""
    return F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)


def resize_tensorflow(images: Tensor, size: int = 299) -> Tensor:
    """TensorFlow 1's bilinear resize, part of FID's graph: pixel i is read at i * H / size."""
    height, width = images.shape[2:]
    shift = torch.tensor([[1, 0, 1 / width - 1 / size], [0, 1, 1 / height - 1 / size]], device=images.device)
    grid = F.affine_grid(shift.expand(len(images), 2, 3), [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)


def to_pil(image: Tensor) -> Image.Image:
    """uint8 [3, H, W] -> PIL RGB."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def to_tensor(image: Image.Image) -> Tensor:
    """PIL RGB -> uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def load_all(batches: Iterable[Batch]) -> Batch:
    """All batches as one: for sets that fit in memory. Raises UserError when there are none."""
    parts = list(batches)
    if not parts:
        raise UserError("got no images at all; expected at least one")
    return torch.cat([images for images, _ in parts]), [caption for _, texts in parts for caption in texts]


def _resized(image: Image.Image, resize: str) -> Image.Image:
    """Centre crop of the long edge, then PIL resize (method notes 7.1: GigaGAN's evaluation code)."""
    if resize == "native":
        return image
    size, name = resize.removeprefix("crop").split("-")
    if image.size == (int(size), int(size)):
        return image
    short = min(image.size)
    left, top = (round((length - short) / 2) for length in image.size)
    square = image.crop((left, top, left + short, top + short))
    return square.resize((int(size), int(size)), _FILTERS[name])


def _decode(data: bytes, name: str) -> tuple[Image.Image, str]:
    try:
        with Image.open(io.BytesIO(data)) as opened:
            prompt = opened.info.get("prompt", "")
            return opened.convert("RGB"), prompt if isinstance(prompt, str) else ""
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} is no readable image ({error}); remove it or make it again") from error


def _entries(source: Path) -> Iterator[tuple[str, bytes, str | None]]:
    """(name for messages, encoded image, caption or None), sorted."""
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; expected a folder of images or a .parquet file")
    if source.is_file() and source.suffix != ".parquet":
        raise UserError(f"{source} is neither a folder of images nor a .parquet file; give one of these")
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    pictures = [file for file in files if file.suffix.lower() in SUFFIXES and file.is_file()]
    tables = [file for file in files if file.suffix == ".parquet"]
    if pictures:
        captions = _metadata(source / "metadata.jsonl")
        for file in pictures:
            yield str(file), file.read_bytes(), captions.get(file.relative_to(source).as_posix())
    elif tables:
        for file in tables:
            yield from _parquet(file)
    else:
        raise UserError(f"{source} holds no images; expected {', '.join(sorted(SUFFIXES))} or .parquet files")


def _metadata(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    captions = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            captions[row["file_name"]] = str(next(row[key] for key in CAPTION_KEYS if key in row))
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise UserError(
                f"{file} line {number} lacks file_name or one of {', '.join(CAPTION_KEYS)}; mend that line"
            ) from error
    return captions


def _parquet(file: Path) -> Iterator[tuple[str, bytes, str | None]]:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]
    from pyarrow.lib import ArrowException  # type: ignore[import-untyped]

    try:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        if "image" not in names:
            raise UserError(f"{file} has columns {', '.join(names)}; expected `image` with `bytes` inside")
        key = next((key for key in CAPTION_KEYS if key in names), None)
        row = 0
        for batch in table.iter_batches(64, columns=["image", *([key] if key else [])]):
            for entry in batch.to_pylist():
                yield f"{file} row {row}", _cell(entry["image"], file, row), entry[key] if key else None
                row += 1
    except (ArrowException, OSError) as error:
        raise UserError(f"{file} is no readable parquet file ({error}); fetch it again") from error


def _cell(image: Any, file: Path, row: int) -> bytes:
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        raise UserError(f"{file} row {row}: `image` holds no bytes; expected encoded images in `image.bytes`")
    return data
