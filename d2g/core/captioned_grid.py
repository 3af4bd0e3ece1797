"""Images in a grid with captions below them, under a heading."""

from collections.abc import Iterator, Sequence
from math import ceil, sqrt
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from d2g.core.png import image_grid

SMALLEST, LARGEST = 160, 256  # pixels of the longer side of an image on the sheet
LINES = 3  # of a caption
FONT, TITLE = 11, 14
MARGIN = 8
INK, FAINT, PAPER = (30, 30, 30), (120, 120, 120), (255, 255, 255)


def captioned_grid(images: Tensor, captions: Sequence[str], heading: str, across: int = 0) -> Tensor:
    """uint8 [N, 3 or 1, H, W] and N captions -> one image [3, height, width] under a heading.

    across: images per row; 0 chooses as `columns` does. Small images are enlarged by whole factors, large
    ones reduced by averaging; captions have at most LINES lines.
    """
    font = load_font(FONT)
    pictures = [_picture(image) for image in images]
    wrapped = [wrap(caption, font, pictures[0].width, LINES) for caption in captions]
    depth = max(map(len, wrapped)) * (FONT + 3) + 4
    cells = [_cell(picture, lines, font, depth) for picture, lines in zip(pictures, wrapped, strict=True)]
    table = F.pad(
        image_grid(torch.stack(cells), across or columns(len(cells)), gap=MARGIN), (MARGIN, 0), value=255
    )
    return torch.cat([_heading(heading, table.shape[2]), table], dim=1)


def load_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans from matplotlib: Pillow's own font has no accents, no Greek and no Cyrillic letters."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def columns(count: int) -> int:
    """A number of columns for an aspect ratio of about 3 : 2 with few empty cells."""
    wanted = ceil(sqrt(1.5 * count))
    return min(range(ceil(sqrt(count)), wanted + 3), key=lambda n: (-count % n, abs(n - wanted)))


def _picture(image: Tensor) -> Image.Image:
    picture = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy())
    longer = max(picture.size)
    # Whole factors keep the pixels of small images sharp.
    if longer < SMALLEST:
        times = ceil(SMALLEST / longer)
        return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    if longer > LARGEST:
        side = (max(1, picture.width * LARGEST // longer), max(1, picture.height * LARGEST // longer))
        return picture.resize(side, Image.Resampling.BOX)
    return picture


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Wrap `text` into at most `lines` lines of `width` pixels, between words; … replaces the rest."""
    wrapped = [""]
    # Fill lines greedily, word by word.
    for word in _pieces(text, font, width):
        joined = f"{wrapped[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            wrapped[-1] = joined
        else:
            wrapped.append(word)
    # Shorten the last line that fits until the ellipsis fits too.
    if len(wrapped) > lines:
        last = wrapped[lines - 1]
        while last and font.getlength(f"{last}…") > width:
            last = last[:-1]
        wrapped = [*wrapped[: lines - 1], f"{last.rstrip()}…"]
    return wrapped


def _pieces(text: str, font: ImageFont.FreeTypeFont, width: int) -> Iterator[str]:
    """Words; those too long for a line are split."""
    for word in text[:1000].split():
        while font.getlength(word) > width and len(word) > 1:
            fits = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            yield word[:fits]
            word = word[fits:]
        yield word


def _cell(picture: Image.Image, lines: Sequence[str], font: ImageFont.FreeTypeFont, depth: int) -> Tensor:
    cell = Image.new("RGB", (picture.width, picture.height + depth), PAPER)
    cell.paste(picture)
    draw = ImageDraw.Draw(cell)
    for number, line in enumerate(lines):
        draw.text((0, picture.height + 2 + number * (FONT + 3)), line, INK, font)
    return _tensor(cell)


def _heading(text: str, width: int) -> Tensor:
    font = load_font(TITLE)
    lines = wrap(text, font, width - 2 * MARGIN, LINES)
    image = Image.new("RGB", (width, len(lines) * (TITLE + 5) + 2 * MARGIN), PAPER)
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((MARGIN, MARGIN + number * (TITLE + 5)), line, FAINT, font)
    return _tensor(image)


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
