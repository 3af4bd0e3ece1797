"""Decode one image of any kind to 8-bit RGB, or say why not."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from d2g.core.errors import UserError
from eval.images.resize import NATIVE, Pixels, prepare, to_array

_KINDS = {"RGB": "", "RGBX": "", "RGBA": "", "1": "grey", "L": "grey", "LA": "grey", "P": "palette"}
_KINDS |= {"PA": "palette", "CMYK": "CMYK", "YCbCr": "YCbCr", "I;16": "16-bit grey", "I;16B": "16-bit grey"}
"""The accepted Pillow modes, and what the notes of a result call them ("": 8-bit RGB already)."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """uint8 [3, H, W] after preprocessing, the PNG's own prompt, what was converted, sha256 of the file."""

    image: Pixels
    caption: str
    converted: tuple[str, ...]
    sha256: bytes


def decode_image(read: Callable[[], bytes], name: str, resize: str = NATIVE) -> Decoded:
    """Read, decode and preprocess one image (`eval.images.resize.prepare`).

    Gray, palette and CMYK images become RGB; 16-bit gray ones are scaled to 8 bits. Raises UserError, with
    `name`, for damaged bytes, animations, transparent pixels and pixels without a known range.
    """
    try:
        data = read()
        with Image.open(io.BytesIO(data)) as opened:
            prompt = opened.info.get("prompt", "")
            image, converted = _as_rgb(opened, name)
    except UserError:
        raise
    except Exception as error:  # on damaged bytes Pillow's readers raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} is no readable image ({reason}); remove it or make it again") from error
    pixels = to_array(prepare(image, resize))
    caption = prompt if isinstance(prompt, str) else ""
    return Decoded(pixels, caption, converted, hashlib.sha256(data).digest())


def _as_rgb(opened: Image.Image, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    """The image as 8-bit RGB, and what it was before. EXIF rotations are ignored, as in all FID code."""
    mode = opened.mode
    # Pillow counts a phone's MPO as animated, but it is a JPEG with appended data.
    if opened.format != "MPO" and getattr(opened, "is_animated", False):
        raise UserError(
            f"{name} is animated; an evaluation takes still pictures, remove it or keep one frame"
        )
    if mode not in _KINDS:
        raise UserError(
            f"{name} holds {mode} pixels, and nothing says which are black and white; expected 8 or 16 bits "
            "per channel, save it as PNG"
        )
    kinds = (_KINDS[mode],) if _KINDS[mode] else ()
    if mode in ("RGBA", "LA", "PA") or "transparency" in opened.info:
        alpha = opened.convert("RGBA")
        if np.asarray(alpha)[..., 3].min() < 255:
            raise UserError(
                f"{name} has transparent pixels, whose color depends on what lies below; flatten it"
            )
        return alpha.convert("RGB"), (*kinds, "with an opaque alpha channel")
    if mode.startswith("I;16"):  # Pillow's own conversion clips at 255 and gives a white image
        opened = _scale_to_8_bits(opened)
    return opened.convert("RGB"), kinds


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    gray = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((gray * 255 + 32_767) // 65_535).astype(np.uint8))
