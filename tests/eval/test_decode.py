"""eval.images.decode: conversion of every kind of image to RGB, and refused images."""

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from d2g.core.errors import UserError
from eval.images.decode import Decoded, decode_image

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLORS = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def read(data: bytes) -> Decoded:
    return decode_image(lambda: data, "x.png")


def pixels(decoded: Decoded) -> np.ndarray[Any, Any]:
    return decoded.image.transpose(1, 2, 0)


def test_rgb_is_unchanged() -> None:
    image_read = read(encoded(Image.fromarray(COLORS)))
    assert (
        np.array_equal(pixels(image_read), COLORS) and image_read.converted == () and image_read.caption == ""
    )


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA", "RGBA"])
def test_other_modes_are_converted_as_by_pillow_and_noted(mode: str) -> None:
    image = Image.fromarray(COLORS).convert(mode)
    image_read = read(encoded(image, "TIFF" if mode == "CMYK" else "PNG"))
    expected = np.array(image.convert("RGB"))
    assert np.array_equal(pixels(image_read), expected)
    assert image_read.converted, mode


def test_cmyk_jpeg() -> None:
    image_read = read(encoded(Image.fromarray(COLORS).convert("CMYK"), "JPEG"))
    assert image_read.converted == ("CMYK",) and image_read.image.shape == (3, 16, 16)


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    wide = (RAMP.astype(np.uint32) * 257).astype(np.uint16)
    image = Image.fromarray(wide)
    assert image.mode.startswith("I;16")
    image_read = read(encoded(image))
    assert image_read.converted == ("16-bit gray",)
    assert np.array_equal(pixels(image_read)[..., 0], RAMP), "65535 becomes 255, and 257 becomes 1"
    clipped = np.array(Image.open(io.BytesIO(encoded(image))).convert("RGB"))
    assert (clipped == 255).mean() > 0.9, "Pillow's own conversion clips nearly all pixels"


def test_16_bit_color_keeps_its_upper_bytes() -> None:
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    wide = (COLORS.astype(">u2") * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    image_read = read(b"\x89PNG\r\n\x1a\n" + body)
    assert np.array_equal(pixels(image_read), COLORS)


def test_transparent_pixels_are_refused() -> None:
    opaque = np.dstack([COLORS, np.full((16, 16), 255, np.uint8)])
    assert np.array_equal(pixels(read(encoded(Image.fromarray(opaque)))), COLORS)
    opaque[3, 4, 3] = 254
    with pytest.raises(UserError, match=r"^x.png has transparent pixels.*flatten it$"):
        read(encoded(Image.fromarray(opaque)))
    palette = Image.fromarray(COLORS).convert("P")
    with pytest.raises(UserError, match="transparent pixels"):
        read(encoded(palette, "PNG", transparency=int(np.array(palette)[0, 0])))
    with pytest.raises(UserError, match="transparent pixels"):  # a color key in an RGB file
        read(encoded(Image.fromarray(COLORS), "PNG", transparency=tuple(COLORS[0, 0].tolist())))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animations_are_refused(kind: str) -> None:
    frames = [Image.fromarray(COLORS), Image.fromarray(255 - COLORS)]
    moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match=r"^x.png is animated; .*still pictures"):
        read(moving)
    assert read(encoded(frames[0], kind)).image.shape == (3, 16, 16)


def test_the_first_image_of_an_mpo_file_is_decoded() -> None:
    frames = [Image.fromarray(COLORS), Image.fromarray(255 - COLORS)]
    image_read = read(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]))
    assert np.abs(pixels(image_read).astype(int) - COLORS).mean() < 40


@pytest.mark.parametrize(
    "image", [Image.new("F", (4, 4), float("nan")), Image.fromarray(np.zeros((4, 4), np.int32))]
)
def test_pixels_without_a_known_range_are_refused(image: Image.Image) -> None:
    """A float image may hold NaN, and its value of white is unknown."""
    with pytest.raises(UserError, match=rf"^x.png holds {image.mode} pixels"):
        read(encoded(image, "TIFF"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_named(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    for share in (0.0, 0.3, 0.6, 0.9):
        with pytest.raises(UserError, match=r"^x.png is not a readable image \(.+\); remove or replace it"):
            read(data[: int(len(data) * share)])


def test_damaged_bytes_raise_only_user_errors() -> None:
    """Random wrong bytes give an image or a UserError of one line, never another exception."""
    rng, refused = random.Random(0), 0
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        complete = encoded(Image.fromarray(COLORS), kind)
        for _ in range(40):
            data = bytearray(complete)
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                read(bytes(data))
            except UserError as error:
                refused += 1
                assert str(error).startswith("x.png ") and "\n" not in str(error)
    assert refused > 40


def test_the_prompt_in_a_png_resizing_and_the_digest(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("prompt", "ein großer Würfel")
    data = encoded(Image.fromarray(COLORS), pnginfo=info)
    image_read = decode_image(lambda: data, "x.png", "crop8-lanczos")
    assert image_read.caption == "ein großer Würfel" and image_read.image.shape == (3, 8, 8)
    (tmp_path / "a").write_bytes(data)
    assert decode_image((tmp_path / "a").read_bytes, "a").sha256 == image_read.sha256
    with pytest.raises(UserError, match="b is not a readable image"):
        decode_image((tmp_path / "b").read_bytes, "b")
