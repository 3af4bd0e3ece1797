"""d2g.data.pictures: reading images of every format, for evaluation and training."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from d2g.core.errors import UserError
from d2g.data.pictures import MAX_PIXELS, decode_picture
from distill.training.real_images import RealImages
from eval.images.folders import load_all, open_images, read_image, read_images
from latent_lpips.training.labeled_images import open_unlabeled

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLORS = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decoded(data: bytes, exact: bool = False) -> np.ndarray[Any, Any]:
    return np.asarray(decode_picture(data, "x.png", exact=exact).image)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_ordinary_images_equal_pillow(kind: str, exact: bool) -> None:
    data = encoded(Image.fromarray(COLORS), kind)
    assert np.array_equal(decoded(data, exact), np.asarray(Image.open(io.BytesIO(data))))


def three_readers(folder: Path) -> list[list[float]]:
    """The mean of each channel of the only picture, as `eval`, `lpips` and `gan.real` read it."""
    array = np.asarray(open_unlabeled(str(folder)).open(0)).astype(float)
    real = (RealImages(str(folder), array.shape[:2]).read([0])[0][0] + 1) * 127.5
    teacher = load_all(read_images(folder, exact=False))[0][0].float()
    return [array.mean((0, 1)).tolist(), real.mean((1, 2)).tolist(), teacher.mean((1, 2)).tolist()]


RED = Image.new("RGB", (1, 1), "red").convert("P").getpixel((0, 0))
GRAY_16 = Image.fromarray(np.full((8, 8), 30_000, np.uint16))
PICTURES: dict[str, tuple[bytes, list[int]]] = {
    "16 bits": (encoded(GRAY_16), [117, 117, 117]),
    "16 bits, TIFF": (encoded(GRAY_16, "TIFF"), [117, 117, 117]),
    "16 bits with a color key": (encoded(GRAY_16, "PNG", transparency=30_000), [255, 255, 255]),
    "16 bits with an unused color key": (encoded(GRAY_16, "PNG", transparency=5), [117, 117, 117]),
    "transparent": (encoded(Image.new("RGBA", (8, 8), (255, 0, 255, 0))), [255, 255, 255]),
    "half transparent": (encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 51))), [255, 204, 204]),
    "transparent palette": (
        encoded(Image.new("RGB", (8, 8), "red").convert("P"), "PNG", transparency=RED),
        [255, 255, 255],
    ),
    "gray with alpha": (encoded(Image.new("LA", (8, 8), (0, 0))), [255, 255, 255]),
    "CMYK": (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), [255, 0, 0]),
    "one bit": (encoded(Image.new("1", (8, 8), 1)), [255, 255, 255]),
    "32 bits in the range of 8": (encoded(Image.new("I", (8, 8), 200), "TIFF"), [200, 200, 200]),
    "animated": (
        encoded(
            Image.new("RGB", (8, 8), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8))]
        ),
        [255, 0, 0],
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_all_readers_give_the_same_pixels(name: str, tmp_path: Path) -> None:
    data, expected = PICTURES[name]
    (tmp_path / "a.png").write_bytes(data)  # readers go by content
    (tmp_path / "a.txt").write_text("a wall")
    for channels in three_readers(tmp_path):
        assert channels == pytest.approx(expected, abs=0.51)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_training_images_are_rotated_by_exif(kind: str, orientation: int) -> None:
    """Reference: Pillow's `exif_transpose`. Evaluation keeps the stored orientation."""
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(COLORS[:, :8]), kind, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        upright, lying = ImageOps.exif_transpose(opened), opened.convert("RGB")
    assert np.array_equal(decoded(data), np.asarray(upright))
    assert np.array_equal(decoded(data, exact=True), np.asarray(lying))
    noted = "without their EXIF rotation" in decode_picture(data, "a picture", exact=True).converted
    assert noted == (orientation > 1 and kind != "TIFF"), "Pillow itself turns a TIFF upright"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*" + b"\xff" * 64]
)
def test_damaged_exif_is_ignored(exif: bytes) -> None:
    data = encoded(Image.fromarray(COLORS), "JPEG", exif=exif)
    assert decoded(data).shape == (16, 16, 3) and decoded(data, exact=True).shape == (16, 16, 3)


def png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims any size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("size", [(20_000, 10_000), (1 << 20, 1 << 20), (MAX_PIXELS + 1, 1)])
def test_decompression_bombs_are_refused_before_they_are_decoded(size: tuple[int, int], exact: bool) -> None:
    with pytest.raises(UserError, match=r"x.png has more than 178 million pixels; make it smaller"):
        decode_picture(png(*size), "x.png", exact=exact)


def test_a_bomb_in_the_text_of_a_png_is_refused() -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("prompt", "a" * 80_000_000, zip=True)
    with pytest.raises(UserError, match=r"x.png is not a readable image"):
        decode_picture(encoded(Image.new("L", (2, 2)), pnginfo=info), "x.png", exact=True)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<svg xmlns='http://www.w3.org/2000/svg'><rect/></svg>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
        b"<!DOCTYPE html>",
        b"version https://git-lfs.github.com/spec/v1",
        encoded(Image.fromarray(COLORS))[:60],
    ],
)
@pytest.mark.parametrize("exact", [True, False])
def test_other_files_are_refused(data: bytes, exact: bool) -> None:
    """EPS is refused because Pillow would start Ghostscript."""
    with pytest.raises(UserError, match=r"^x.png is not a readable image \(.+\); remove or replace it$"):
        decode_picture(data, "x.png", exact=exact)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
            "HEIC, for which there is no decoder; save it as JPEG or PNG",
        ),
        (b"<?xml version='1.0'?>\n<svg xmlns='x'/>", "SVG, a drawing without pixels; save it as PNG"),
        (b"\n<!DOCTYPE html><html>", "a web page, perhaps the answer of a failed download"),
        (b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS; run `git lfs pull`"),
        (b"", "it is empty"),
        (b"\x89PNG", "of no known kind, or cut off"),
    ],
)
def test_a_file_that_is_no_picture_is_named(data: bytes, reason: str, tmp_path: Path) -> None:
    """The content decides, not the name: phones store HEIC under other names."""
    with pytest.raises(UserError) as caught:
        decode_picture(data, "x.jpg", exact=False)
    assert str(caught.value) == f"x.jpg is not a readable image ({reason}); remove or replace it"


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize(
    "profile", [b"x", b"\0" * 200, bytes(range(256)) * 280], ids=["short", "zeros", "long"]
)
def test_broken_color_profiles_are_ignored(kind: str, profile: bytes, exact: bool) -> None:
    image = Image.fromarray(COLORS)
    assert np.array_equal(
        decoded(encoded(image, kind, icc_profile=profile), exact), decoded(encoded(image, kind), exact)
    )


def test_a_color_profile_that_does_not_decompress_is_ignored() -> None:
    data = encoded(Image.fromarray(COLORS))
    name, body = b"iCCP", b"x\0\0" + b"no deflate"
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    assert np.array_equal(decoded(data[:33] + chunk + data[33:], True), COLORS)


def test_a_table_that_names_files_instead_of_holding_images_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "a.parquet"
    (tmp_path / "secret.png").write_bytes(encoded(Image.fromarray(COLORS)))
    cells = [{"path": str(tmp_path / "secret.png"), "bytes": None}]
    pq.write_table(pa.table({"image": cells, "caption": ["a"], "label": [0]}), file)
    readers: list[Callable[[], object]] = [
        lambda: load_all(read_images(file)),
        lambda: RealImages(str(file), (8, 8)).read([0]),
        lambda: open_unlabeled(str(file)),
    ]
    for read in readers:
        with pytest.raises(UserError, match=r"row 0: `image` names a file \(.* and holds no bytes"):
            read()


def test_evaluation_refuses_transparency_that_training_puts_on_white(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PICTURES["transparent"][0])
    with pytest.raises(UserError, match=r"a.png has transparent pixels.*flatten it"):
        read_image(tmp_path / "a.png")
    assert torch.equal(load_all(read_images(tmp_path, exact=False))[0], torch.full((1, 3, 8, 8), 255).byte())


ENDINGS = {
    "a.png": "PNG",
    "b.jfif": "JPEG",
    "c.avif": "AVIF",
    "d.tif": "TIFF",
    "e.gif": "GIF",
    "f.JPG": "JPEG",
}
ENDINGS |= {
    "g.jpe": "JPEG",
    "h.webp": "WEBP",
    "i.bmp": "BMP",
    "j.ppm": "PPM",
    "k.tga": "TGA",
    "l.jp2": "JPEG2000",
}


def test_every_reader_accepts_every_file_extension(tmp_path: Path) -> None:
    for name, kind in ENDINGS.items():
        (tmp_path / name).write_bytes(encoded(Image.new("RGB", (8, 8), (9, 99, 9)), kind))
        (tmp_path / name).with_suffix(".txt").write_text("a wall")
    images = RealImages(str(tmp_path), (8, 8))
    assert len(open_images(tmp_path)) == len(open_unlabeled(str(tmp_path))) == len(images) == len(ENDINGS)
    pixels = (images.read(range(len(ENDINGS)))[0] + 1) * 127.5
    assert (pixels.mean((2, 3)) - torch.tensor([9, 99, 9])).abs().max() < 4
    assert load_all(read_images(tmp_path))[0].shape == (len(ENDINGS), 3, 8, 8)
