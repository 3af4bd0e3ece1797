"""PNG files and grids of uint8 images."""

import io
from collections.abc import Mapping
from math import ceil, sqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from d2g.core.errors import UserError


def png_bytes(image: Tensor, text: Mapping[str, str], kind: str = "PNG") -> bytes:
    """The content of a PNG file with a uint8 image [3, H, W] and `text` as its metadata.

    kind: another format that Pillow writes.
    """
    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    content = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(content, kind, pnginfo=info)
    return content.getvalue()


def save_png(image: Tensor, path: Path, text: Mapping[str, str]) -> None:
    """Write a uint8 image [3, H, W] as PNG with `text` as its metadata. Raises UserError if it cannot.

    A name with the ending of another format that Pillow writes gives that format.
    """
    kind = Image.registered_extensions().get(path.suffix.lower(), "PNG")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_bytes(image, text, kind))
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another --out"
        ) from error


def image_grid(images: Tensor, columns: int = 0, gap: int = 2) -> Tensor:
    """Arrange uint8 images [N, 3, H, W] in a grid [3, rows (H + gap), columns (W + gap)] with white gaps.

    columns: 0 makes the grid as square as possible. Images fill the grid row by row.
    """
    columns = columns or ceil(sqrt(len(images)))
    rows = ceil(len(images) / columns)
    padded = F.pad(images, (0, gap, 0, gap), value=255)
    blank = padded.new_full((rows * columns - len(images), *padded.shape[1:]), 255)
    cells = torch.cat([padded, blank]).unflatten(0, (rows, columns))
    grid: Tensor = cells.permute(2, 0, 3, 1, 4)
    return grid.reshape(3, rows * padded.shape[2], columns * padded.shape[3])
