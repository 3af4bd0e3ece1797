"""PNG files and grids of uint8 images."""

from collections.abc import Mapping
from math import ceil, sqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from d2g.core.errors import UserError


def save_png(image: Tensor, path: Path, text: Mapping[str, str]) -> None:
    """Write uint8 [3, H, W] as PNG with `text` as its metadata."""
    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(path, pnginfo=info)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another --out"
        ) from error


def grid(images: Tensor, columns: int = 0, gap: int = 2) -> Tensor:
    """uint8 [N, 3, H, W] -> one picture [3, rows (H + gap), columns (W + gap)], row by row, white gaps."""
    columns = columns or ceil(sqrt(len(images)))
    rows = ceil(len(images) / columns)
    padded = F.pad(images, (0, gap, 0, gap), value=255)
    blank = torch.full((rows * columns - len(images), *padded.shape[1:]), 255, dtype=torch.uint8)
    cells = torch.cat([padded, blank]).unflatten(0, (rows, columns))
    picture: Tensor = cells.permute(2, 0, 3, 1, 4)
    return picture.reshape(3, rows * padded.shape[2], columns * padded.shape[3])
