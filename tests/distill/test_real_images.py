"""distill.training.real_images: all formats give the same images, in a seeded order."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from d2g.core.errors import UserError
from distill.training.real_images import RealImages
from distill.training.real_rows import _PixelRows
from pairgen.store.dataset import PairSampler, pair_loader

NAMES = [f"{number:02d}.png" for number in range(7)]


def make_image(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (12, 8, 3), dtype=np.uint8))


def png_bytes(number: int) -> bytes:
    buffer = io.BytesIO()
    make_image(number).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module", params=["txt", "jsonl", "parquet", "parquets"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("real")
    captions = [f"picture {number}" for number in range(7)]
    if request.param in ("txt", "jsonl"):
        for number, name in enumerate(NAMES):
            (folder / name).write_bytes(png_bytes(number))
            if request.param == "txt":
                (folder / name).with_suffix(".txt").write_text(captions[number] + "\n")
        rows = [{"file_name": n, "text": c} for n, c in zip(NAMES, captions, strict=True)]
        if request.param == "jsonl":
            (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows[::-1])))
        return str(folder)
    images = [{"bytes": png_bytes(number), "path": None} for number in range(7)]
    table = pa.table({"image": images, "caption": captions})
    if request.param == "parquet":
        pq.write_table(table, folder / "all.parquet", row_group_size=2)
        return str(folder / "all.parquet")
    pq.write_table(table.slice(0, 3), folder / "a.parquet", row_group_size=2)
    pq.write_table(table.slice(3), folder / "b.parquet")
    return str(folder)


def test_images_and_captions_match(source: str) -> None:
    dataset = RealImages(source, (12, 8))
    assert len(dataset) == 7
    pixels, captions = dataset.read([6, 0, 3, 0])
    assert captions == ["picture 6", "picture 0", "picture 3", "picture 0"]
    for row, number in enumerate((6, 0, 3, 0)):
        expected = torch.from_numpy(np.array(make_image(number))).permute(2, 0, 1).float() / 127.5 - 1
        torch.testing.assert_close(pixels[row], expected)


def test_images_of_other_shapes_are_center_cropped(source: str) -> None:
    dataset = RealImages(source, (8, 8))
    pixels, _ = dataset.read([2])
    expected = torch.from_numpy(np.array(make_image(2))).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(pixels[0], expected[:, 2:10])
    assert RealImages(source, (16, 24)).read([1])[0].shape == (1, 3, 16, 24)


def test_order_depends_on_seed_and_images_so_far_only(source: str) -> None:
    images = RealImages(source, (12, 8))
    _, two_epochs = images.batch(3, 0, 14)
    assert sorted(two_epochs[:7]) == sorted(two_epochs[7:]) == [f"picture {n}" for n in range(7)]
    assert images.batch(3, 5, 4)[1] == two_epochs[5:9]
    assert RealImages(source, (12, 8)).batch(3, 5, 4)[1] == two_epochs[5:9]
    assert images.batch(4, 0, 14)[1] != two_epochs


def test_another_process_opens_the_same_images(source: str) -> None:
    """Loader processes start by spawn on macOS, and get a pickle."""
    images = RealImages(source, (8, 8))
    copy = pickle.loads(pickle.dumps(images))
    (pixels, captions), (copied, copied_captions) = (each.read([6, 0, 3]) for each in (images, copy))
    assert torch.equal(pixels, copied) and captions == copied_captions


def test_unusable_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        RealImages(str(tmp_path / "none"), (8, 8))
    with pytest.raises(UserError, match="holds no images"):
        RealImages(str(tmp_path), (8, 8))
    (tmp_path / "a.png").write_bytes(png_bytes(0))
    with pytest.raises(UserError, match=r"a.png has no caption; write it to a.txt"):
        RealImages(str(tmp_path), (8, 8))
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"a.txt is empty; write the caption of a.png to it"):
        RealImages(str(tmp_path), (8, 8))
    (tmp_path / "a.txt").write_bytes(b"B\xe4r")
    with pytest.raises(UserError, match=r"a.txt is not UTF-8: line 1, byte offset 1 .*; convert it"):
        RealImages(str(tmp_path), (8, 8))
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"a.png is not a readable image"):
        RealImages(str(tmp_path), (8, 8)).read([0])
    bad_rows = {
        '{"file_name": "a.png"}': "line 1: expected a column named .*, found file_name",
        "{": "line 1 is not JSON",
        '{"text": "a"}': "line 1 lacks file_name, found text",
        '{"file_name": "a.png", "caption": null}': "gives .*a.png no caption",
        '{"file_name": "a.png", "caption": " "}': "gives .*a.png no caption",
        '{"file_name": "a.png", "caption": 3}': "line 1: a caption must be text, found '3'",
    }
    for row, message in bad_rows.items():
        (tmp_path / "metadata.jsonl").write_text(row)
        with pytest.raises(UserError, match=rf"metadata.jsonl:? {message}"):
            RealImages(str(tmp_path), (8, 8))
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "caption": "B\xe4r"}')
    with pytest.raises(UserError, match=r"metadata.jsonl is not UTF-8: line 1, byte offset 36"):
        RealImages(str(tmp_path), (8, 8))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "b"}')
    images = RealImages(str(tmp_path), (8, 8))
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"a.png cannot be read: No such file"):
        images.read([0])
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"picture": [b""], "caption": ["x"]}), file)
    with pytest.raises(UserError, match="has columns picture, caption; expected `image`"):
        RealImages(str(file), (8, 8))
    pq.write_table(pa.table({"image": [png_bytes(0)], "caption": [None]}), file)
    with pytest.raises(UserError, match="row 0 has no caption"):
        RealImages(str(file), (8, 8)).read([0])
    file.write_bytes(b"no parquet")
    with pytest.raises(UserError, match="is not a readable parquet file"):
        RealImages(str(file), (8, 8))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_table_is_one_line(workers: int, tmp_path: Path) -> None:
    """Also where a loader process reads it, and for captions that are no text."""
    images = [{"bytes": png_bytes(number), "path": None} for number in range(7)]
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": images, "caption": ["a"] * 7}), file, compression="snappy")
    data = bytearray(file.read_bytes())
    data[400:800] = b"\xff" * 400  # in the page of images
    file.write_bytes(data)
    rows = _PixelRows(RealImages(str(file), (8, 8)))
    loader = pair_loader(rows, PairSampler(7, 1, 0), workers=workers)
    with pytest.raises(UserError, match=r"a.parquet is not a readable parquet file \(.*\); fetch it again$"):
        next(loader)
    captions = pa.Array.from_buffers(pa.string(), 1, pa.array([b"B\xe4r"], pa.binary()).buffers())
    pq.write_table(pa.table({"image": images[:1], "caption": captions}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"row 0: its caption is not UTF-8 .*; correct or drop the row"):
        RealImages(str(tmp_path / "b.parquet"), (8, 8)).read([0])


@pytest.mark.parametrize("caption", [b"a cube", ["a cube", "a red cube"], 3])
def test_captions_in_a_table_must_be_text(caption: object, tmp_path: Path) -> None:
    """They were trained on as Python writes them: b'a cube', ['a cube', ...]."""
    image = {"bytes": png_bytes(0), "path": None}
    pq.write_table(pa.table({"image": [image], "caption": [caption]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"row 0: a caption must be text, found .*; write the column again"):
        RealImages(str(tmp_path / "a.parquet"), (8, 8)).read([0])
