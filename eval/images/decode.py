"""Decode one picture of any kind to 8-bit RGB, or say why not."""

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
"""Pillow's modes that we take, and what a result's notes call them."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """uint8 [3, H, W] at the size asked for; the PNG's own prompt; what it was before; sha256 of the file."""

    image: Pixels
    caption: str
    converted: tuple[str, ...]
    sha256: bytes


def decode_image(read: Callable[[], bytes], name: str, resize: str = NATIVE) -> Decoded:
    """Read and decode one picture and bring it to size (`eval.images.resize.prepare`).

    Grey, palette and CMYK pictures become RGB, 16-bit grey ones are scaled to 8 bits. Raises UserError, with
    `name`, for bytes that are no whole picture, an animation, transparency, and pixels without a known range.
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
    """8-bit RGB, and what it was before. EXIF rotations are left alone, as all code for FID does."""
    mode = opened.mode
    # A phone's MPO counts as animated, but is a JPEG with extras behind it.
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
                f"{name} has transparent pixels, whose colour depends on what lies below; flatten it"
            )
        return alpha.convert("RGB"), (*kinds, "with an opaque alpha channel")
    if mode.startswith("I;16"):  # Pillow's own conversion clips at 255 and leaves a white picture
        opened = _scaled_down(opened)
    return opened.convert("RGB"), kinds


def _scaled_down(image: Image.Image) -> Image.Image:
    grey = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((grey * 255 + 32_767) // 65_535).astype(np.uint8))
