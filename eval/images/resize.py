"""Resizing: PIL's filters on images and, bit for bit equal, on tensors; and the two resizes of FID."""

import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Pixels = NDArray[np.uint8]

FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}
NATIVE = "native"
PREPROCESSING = re.compile(rf"(?P<crop>crop|squash)(?P<size>[1-9][0-9]*)-(?P<filter>{'|'.join(FILTERS)})")
"""Names of preprocessings: `native` (unchanged), `crop256-lanczos` (cropped to the center square, then
resized) or `squash256-lanczos` (resized without cropping)."""

_FIXED_POINT = 2.0**22  # PIL's: 32 bits minus 8 for the pixel and 2 for overshoot
_TALL = 1024  # rows of pixels per matrix product


def prepare(image: Image.Image, how: str) -> Image.Image:
    """Preprocess a PIL image (RGB), real or generated, as `how` says.

    Center crop to the short edge, rounded as torchvision's center_crop, then PIL's resize, as in GigaGAN's
    evaluation code (method.md "FID"). An image that has the size already is returned unchanged.
    """
    if how == NATIVE:
        return image
    crop, size, name = _parse(how)
    if image.size == (size, size):
        return image
    if crop:
        short = min(image.size)
        left, top = (round((length - short) / 2) for length in image.size)
        image = image.crop((left, top, left + short, top + short))
    # Horizontally, then vertically: Pillow 13 picks the order by cost, and rounding makes the orders differ.
    return image.resize((size, image.height), FILTERS[name]).resize((size, size), FILTERS[name])


def prepare_batch(images: Tensor, how: str) -> Tensor:
    """`prepare` for uint8 [B, 3, H, W]: with PIL on the CPU, with equal arithmetic on other devices."""
    if how == NATIVE:
        return images
    if images.device.type == "cpu":
        with ThreadPoolExecutor(thread_count(len(images))) as pool:
            prepared = pool.map(lambda image: to_array(prepare(to_pil(image), how)), images)
            return torch.from_numpy(np.stack(list(prepared)))
    crop, size, name = _parse(how)
    if images.shape[2:] == (size, size):
        return images
    if crop:
        height, width = images.shape[2:]
        short = min(height, width)
        top, left = round((height - short) / 2), round((width - short) / 2)
        images = images[:, :, top : top + short, left : left + short]
    return resize_uint8(images, (size, size), name)


def _parse(how: str) -> tuple[bool, int, str]:
    match = PREPROCESSING.fullmatch(how)
    assert match is not None, how
    return match["crop"] == "crop", int(match["size"]), match["filter"]


def to_pil(image: Tensor) -> Image.Image:
    """uint8 [3, H, W] -> PIL RGB."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def to_tensor(image: Image.Image) -> Tensor:
    """PIL RGB -> uint8 [3, H, W]."""
    return torch.from_numpy(to_array(image))


def to_array(image: Image.Image) -> Pixels:
    """PIL RGB -> uint8 [3, H, W]."""
    return np.stack([np.asarray(plane) for plane in image.split()])


# Filters of PIL as functions of the distance in pixels.


def _bicubic(x: float) -> float:
    """Keys' cubic kernel with a = -1/2."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


def _lanczos(x: float) -> float:
    def sinc(y: float) -> float:
        return math.sin(y * math.pi) / (y * math.pi) if y else 1.0

    return sinc(x) * sinc(x / 3) if -3 <= x < 3 else 0.0


_KERNELS: dict[str, tuple[Callable[[float], float], float]] = {
    "lanczos": (_lanczos, 3.0),
    "bicubic": (_bicubic, 2.0),
    "bilinear": (lambda x: max(0.0, 1 - abs(x)), 1.0),
    "box": (lambda x: 1.0 if -0.5 < x <= 0.5 else 0.0, 0.5),
}


@lru_cache(maxsize=64)
def filter_matrix(old: int, new: int, name: str) -> Tensor:
    """[new, old] float64: the weight of each old pixel in each new one. The filter widens with the scale,
    which avoids aliasing.
    """
    kernel, support = _KERNELS[name]
    scale = old / new
    widened = max(scale, 1.0)
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for row in range(new):
        # The old pixels under the filter around the position of the new one.
        center = (row + 0.5) * scale
        first = max(int(center - support * widened + 0.5), 0)
        last = min(int(center + support * widened + 0.5), old)
        taps = [kernel((x - center + 0.5) / widened) for x in range(first, last)]
        matrix[row, first:last] = torch.tensor(taps, dtype=torch.float64) / sum(taps)
    return matrix


@lru_cache(maxsize=64)
def _integer_weights(old: int, new: int, name: str, device: torch.device) -> Tensor:
    scaled = filter_matrix(old, new, name) * _FIXED_POINT
    return (scaled + scaled.sign() / 2).trunc().to(device)


def resize_uint8(images: Tensor, size: tuple[int, int], name: str) -> Tensor:
    """PIL's resize, bit for bit: uint8 [..., H, W] -> uint8 [..., *size], on any device with float64.

    PIL sums pixels times 22-bit integer weights and rounds after each direction; here horizontally first.
    The sums stay below 2^53, so float64 products give the same integers.
    """
    for axis, new in ((-1, size[1]), (-2, size[0])):
        old = images.shape[axis]
        if old != new:
            matrix = _integer_weights(old, new, name, images.device)
            images = _multiply_along(
                images, matrix, axis, lambda x: (x / _FIXED_POINT + 0.5).floor().clamp(0, 255).byte()
            )
    return images


def _multiply_along(images: Tensor, matrix: Tensor, axis: int, finish: Callable[[Tensor], Tensor]) -> Tensor:
    """Multiply each line of pixels along `axis` by the matrix, in pieces, because float64 takes 8x memory."""
    lines = images.transpose(axis, -1)
    parts = [
        finish(part.double() @ matrix.T) for part in lines.reshape(-1, lines.shape[-1]).split(_TALL * 16)
    ]
    return torch.cat(parts).reshape(*lines.shape[:-1], len(matrix)).transpose(axis, -1)


def resize_clean(images: Tensor, size: int = 299) -> Tensor:
    """clean-fid's resize: uint8 [B, 3, H, W] -> fp32 [B, 3, size, size] in [0, 255], not rounded.

    PIL's antialiased bicubic filter on each channel as floats, then clipped, as in clean-fid from 0.1.35 on.
    Earlier versions did not clip and differ where edges overshoot.
    """
    if images.device.type == "cpu":
        return torch.from_numpy(_resize_clean_by_pil(images.numpy(), size))
    resized = images.float()
    for axis in (-1, -2):
        matrix = filter_matrix(resized.shape[axis], size, "bicubic").to(images.device)
        resized = _multiply_along(resized, matrix, axis, Tensor.float)
    return resized.clamp(0, 255)


def _resize_clean_by_pil(images: Pixels, size: int) -> NDArray[np.float32]:
    """`resize_clean` by PIL in threads. NumPy, because PyTorch's own threads would multiply with these."""
    out = np.empty((len(images), 3, size, size), np.float32)

    def fill(number: int) -> None:
        for channel, plane in enumerate(images[number].astype(np.float32)):
            resized = Image.fromarray(plane).resize((size, size), FILTERS["bicubic"])
            out[number, channel] = np.asarray(resized)
        np.clip(out[number], 0, 255, out=out[number])

    with ThreadPoolExecutor(thread_count(len(images))) as pool:
        list(pool.map(fill, range(len(images))))
    return out


def thread_count(tasks: int) -> int:
    """Number of threads for `tasks` independent tasks."""
    return max(1, min(tasks, torch.get_num_threads()))


def resize_tensorflow(images: Tensor, size: int = 299) -> Tensor:
    """TensorFlow 1's bilinear resize, part of FID's graph: output pixel i is read at i * H / size."""
    height, width = images.shape[2:]
    shift = torch.tensor([[1, 0, 1 / width - 1 / size], [0, 1, 1 / height - 1 / size]], device=images.device)
    grid = F.affine_grid(shift.expand(len(images), 2, 3), [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
