"""The reader of pictures: any kind of picture becomes 8-bit RGB, or one line says why not."""

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from d2g.core.errors import UserError
from d2g.core.logs import log_once

MAX_PIXELS = 178_956_970
"""Largest picture that is decoded, Pillow's own limit: a small file may claim billions of pixels."""
_EXECUTING_FORMATS = ("EPS", "WMF")  # EPS runs Ghostscript, WMF asks Windows to draw
_KINDS = {"RGB": "", "RGBX": "", "RGBA": "", "1": "gray", "L": "gray", "LA": "gray", "P": "palette"}
_KINDS |= {"PA": "palette", "CMYK": "CMYK", "YCbCr": "YCbCr"}
_KINDS |= dict.fromkeys(("I;16", "I;16B", "I;16L", "I;16N"), "16-bit gray")
"""The accepted Pillow modes, and what the notes of a result call them ("": 8-bit RGB already)."""
# Pillow's own warnings, on which nobody can act: damaged EXIF data, and pictures above half of MAX_PIXELS.
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the picture upright."""


@dataclass(frozen=True, slots=True)
class DecodedPicture:
    """An RGB image, the PNG's own prompt ("" without one), and what was converted."""

    image: Image.Image
    prompt: str
    converted: tuple[str, ...]


def decode_picture(data: bytes, name: str, *, exact: bool) -> DecodedPicture:
    """Decode an encoded picture to 8-bit RGB. Gray, palette and CMYK become RGB; 16 bits are scaled to 8.

    `exact` is for measurements: EXIF orientations are ignored, as in all FID code, and what depends on a
    choice is refused: transparent pixels, animations, pixels without a known range. Else, for training,
    pictures are turned upright, transparent ones are put on white, and of animated ones the first frame is
    taken; the log says so once.
    Raises UserError, with `name`, for what is refused, damaged, or larger than MAX_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as opened:
            prompt = picture_prompt(opened.info)
            image, converted = _as_rgb(opened, name, exact)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{name} has more than {MAX_PIXELS // 1_000_000} million pixels; make it smaller or remove it"
        ) from error
    except Exception as error:  # on damaged bytes Pillow's readers raise almost anything
        reason = _other_kind(data) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} is not a readable image ({reason}); remove or replace it") from error
    return DecodedPicture(image, prompt, converted)


def _other_kind(data: bytes) -> str:
    """Describe bytes that Pillow cannot identify; "" if Pillow's own error says what is wrong."""
    try:
        with Image.open(io.BytesIO(data), formats=_formats()):
            return ""
    except UnidentifiedImageError:
        pass
    except Exception:  # damaged: the first error says how
        return ""
    if not data:
        return "it is empty"
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
        return "HEIC, for which there is no decoder; save it as JPEG or PNG"
    start = data[:1024].lower()
    for sign, kind in _OTHER_KINDS.items():
        if sign in start:
            return kind
    return "of no known kind, or cut off"


_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_OTHER_KINDS = {
    b"<!doctype html": "a web page, perhaps the answer of a failed download",
    b"<html": "a web page, perhaps the answer of a failed download",
    b"<svg": "SVG, a drawing without pixels; save it as PNG",
    b"%!ps": "PostScript, which is a program; save it as PNG",
    b"%pdf": "PDF; save its pages as PNG",
    b"git-lfs": "a pointer of Git LFS; run `git lfs pull`",
}
"""What a file that is no picture begins with, in lower case, and what it is then."""


def png_text(file: Path) -> dict[str, str]:
    """The text in the header of a picture file; empty where there is none or the file cannot be read."""
    try:
        with Image.open(file, formats=_formats()) as opened:
            return {str(key): str(value) for key, value in opened.info.items()}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # decoding it says what is wrong
        return {}


def picture_prompt(text: Mapping[Any, Any]) -> str:
    """The prompt in the text of a PNG, as `d2g sample` writes it; "" without one.

    ComfyUI writes its graph, a JSON object, under the same name.
    """
    prompt = text.get("prompt", "")
    return prompt if isinstance(prompt, str) and not prompt.startswith('{"') else ""


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in Image.ID if name not in _EXECUTING_FORMATS]


def _as_rgb(opened: Image.Image, name: str, exact: bool) -> tuple[Image.Image, tuple[str, ...]]:
    """Convert a picture to 8-bit RGB; returns it and the kinds of its original format.

    With `exact`, animated and transparent pictures raise UserError, and EXIF rotations are only noted.
    """
    # Pillow counts a phone's MPO as animated, but it is a JPEG with appended data.
    if opened.format != "MPO" and getattr(opened, "is_animated", False):
        if exact:
            raise UserError(
                f"{name} is animated; an evaluation takes still pictures, remove it or keep one frame"
            )
        _log_choice("of animated pictures the first frame is taken", name)
    # Reduce to 8 bits, then remove the alpha channel.
    opened.load()
    image, kinds = _to_8_bits(opened, name, exact)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if np.asarray(image)[..., 3].min() == 255:
            kinds = (*kinds, "with an opaque alpha channel")
        elif exact:
            raise UserError(
                f"{name} has transparent pixels, whose color depends on what lies below; flatten it"
            )
        else:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            _log_choice("transparent pictures are put on white", name)
    # The rotation that EXIF asks for.
    image, turn = image.convert("RGB"), _orientation(opened, name, exact)
    if turn is None:
        return image, kinds
    if exact:
        return image, (*kinds, "without their EXIF rotation")
    _log_choice("pictures are turned upright, as their EXIF data says", name)
    return image.transpose(turn), kinds


def _to_8_bits(opened: Image.Image, name: str, exact: bool) -> tuple[Image.Image, tuple[str, ...]]:
    """The picture with 8 bits per channel. Raises UserError for pixels of unknown range."""
    mode = opened.mode
    if mode in _KINDS:
        kinds = (_KINDS[mode],) if _KINDS[mode] else ()
        # Pillow's own conversion of 16 bits clips at 255 and gives a white image.
        return (_scale_to_8_bits(opened) if mode.startswith("I;16") else opened), kinds
    if not exact and mode in ("I", "F"):
        values = np.asarray(opened)
        if ((values >= 0) & (values <= 255)).all():
            return Image.fromarray(values.astype(np.uint8)), ()
    raise UserError(
        f"{name} holds {mode} pixels, and nothing says which are black and white; expected 8 or 16 bits "
        "per channel, save it as PNG"
    )


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    wide: NDArray[np.uint32] = np.asarray(image).astype(np.uint32)
    gray = Image.fromarray(((wide * 255 + 32_767) // 65_535).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # a PNG's color key, in 16 bits
        gray.putalpha(Image.fromarray(np.where(wide == transparent, 0, 255).astype(np.uint8)))
    return gray


def _orientation(opened: Image.Image, name: str, exact: bool) -> Image.Transpose | None:
    """What turns a picture upright, as its EXIF data says; None if it lies right or the data is damaged."""
    try:
        return _UPRIGHT.get(opened.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow raises almost anything on damaged EXIF
        if not exact:
            _log_choice("pictures with damaged EXIF data are taken as they lie", name)
        return None


def _log_choice(choice: str, name: str) -> None:
    """Say once what training does to some pictures, and name the first of them."""
    log_once(f"{choice}; the first is {name}", key=choice)
