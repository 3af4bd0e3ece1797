"""The crops of ImageNet training: positions come from a generator, PIL crops and resizes."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CROP_ASPECT = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
CENTER_CROP_RESIZE = 256 / 224
"""Scoring resizes the short side to this multiple of the crop, then crops the center."""

CropBox = tuple[int, int, int, int]  # left, top, right, bottom


def random_box(width: int, height: int, area: Sequence[float], rng: torch.Generator) -> CropBox:
    """Sample a crop box as torchvision's RandomResizedCrop does (Szegedy et al. 2015).

    Its share of the image is uniform in `area`, its aspect ratio log-uniform in 3/4 to 4/3. After ten boxes
    that do not fit, returns the largest center crop with such an aspect ratio.
    """
    for share, aspect, x, y in torch.rand(CROP_ATTEMPTS, 4, generator=rng).tolist():
        pixels = width * height * (area[0] + share * (area[1] - area[0]))
        ratio = math.exp(math.log(CROP_ASPECT[0]) + aspect * math.log(CROP_ASPECT[1] / CROP_ASPECT[0]))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    # No box fits: take the largest center crop with a legal aspect ratio.
    w = min(width, round(height * CROP_ASPECT[1]))
    h = min(height, round(width / CROP_ASPECT[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_crop(
    image: Image.Image, size: int, area: Sequence[float], mirror: bool, rng: torch.Generator
) -> Tensor:
    """Crop a random box, resize it bilinearly, mirror half of them. Returns uint8 [3, size, size]."""
    flip = bool(torch.rand((), generator=rng) < 0.5) and mirror
    box = random_box(*image.size, area, rng)
    crop = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
    return image_to_tensor(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop)


def center_crop_resized(image: Image.Image, size: int, resize: float = CENTER_CROP_RESIZE) -> Tensor:
    """Resize the short side to size * resize, bilinearly, and crop the center. Returns uint8 [3, size,
    size].
    """
    short = int(size * resize)
    width, height = (int(short * n / min(image.size)) for n in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image_to_tensor(image.crop((left, top, left + size, top + size)))


def image_to_tensor(image: Image.Image) -> Tensor:
    """Convert a PIL RGB image to uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def tensor_to_image(image: Tensor) -> Image.Image:
    """Convert uint8 [3, H, W] to a PIL RGB image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
