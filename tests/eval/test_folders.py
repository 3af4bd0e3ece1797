"""eval.images.folders: folders, parquet, sizes, and errors for broken input."""

import hashlib
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from d2g.core.errors import UserError
from d2g.core.seeds import generator
from eval.images.folders import Reading, load_all, open_images, read_images
from eval.images.resize import prepare_batch, to_pil


def random_images(count: int, height: int = 8, width: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator(count))


def png(image: Tensor, prompt: str | None = None) -> bytes:
    stream, info = io.BytesIO(), PngImagePlugin.PngInfo()
    if prompt is not None:
        info.add_text("prompt", prompt)
    to_pil(image).save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def write_folder(folder: Path, images: Tensor) -> None:
    for number, image in enumerate(images):
        (folder / f"{number:03}.png").write_bytes(png(image, f"own {number}"))


def test_a_folder_is_read_in_sorted_order_in_batches(tmp_path: Path) -> None:
    images = random_images(5)
    write_folder(tmp_path, images)
    batches = list(read_images(tmp_path, batch_size=2))
    assert [len(batch) for batch, _ in batches] == [2, 2, 1]
    together, captions = load_all(batches)
    assert torch.equal(together, images)
    assert captions == [f"own {number}" for number in range(5)]
    assert torch.equal(load_all(read_images(tmp_path, limit=3))[0], images[:3])


def test_metadata_takes_precedence_over_the_prompt_in_a_png(tmp_path: Path) -> None:
    write_folder(tmp_path, random_images(2))
    line = json.dumps({"file_name": "001.png", "text": "a snowy owl"})
    (tmp_path / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")
    assert load_all(read_images(tmp_path))[1] == ["own 0", "a snowy owl"]
    (tmp_path / "metadata.jsonl").write_text(line + '\n{"file_name": "000.png"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"metadata.jsonl line 2: expected a column .*, found file_name"):
        load_all(read_images(tmp_path))


def test_parquet_with_captions(tmp_path: Path) -> None:
    images = random_images(4)
    cells = [{"bytes": png(image), "path": None} for image in images]
    table = pa.table({"image": cells, "caption": ["a", "b", "c", "d"], "label": [0, 1, 2, 3]})
    pq.write_table(table, tmp_path / "train.parquet")
    for source in (tmp_path, tmp_path / "train.parquet"):
        read, captions = load_all(read_images(source, batch_size=3))
        assert torch.equal(read, images) and captions == ["a", "b", "c", "d"]


def test_captions_of_a_table_are_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cells = [{"bytes": png(image), "path": None} for image in random_images(3)]
    columns = {"image": cells, "label": [0, 1, None], "score": [0.5, 1.5, 2.5], "caption": [["a", "b"]] * 3}
    pq.write_table(pa.table(columns), file := tmp_path / "train.parquet")
    assert load_all(read_images(open_images(file, column="label")))[1] == ["0", "1", ""]
    with pytest.raises(UserError, match=r"row 0: column score holds '0\.5'; expected text or whole numbers"):
        load_all(read_images(open_images(file, column="score")))
    # Metrics that read no captions need none.
    caplog.set_level("INFO", "d2g")
    assert load_all(read_images(file))[1] == [""] * 3
    (message,) = caplog.messages
    assert message.endswith("train.parquet: column caption holds no text, so its images have no captions")


def test_broken_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        load_all(read_images(tmp_path / "gone"))
    with pytest.raises(UserError, match="holds no images"):
        load_all(read_images(tmp_path))
    write_folder(tmp_path, random_images(2))
    data = (tmp_path / "001.png").read_bytes()
    (tmp_path / "001.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"001.png is not a readable image"):
        load_all(read_images(tmp_path))
    (tmp_path / "note.txt").write_text("x")
    with pytest.raises(UserError, match="neither a folder of images nor"):
        load_all(read_images(tmp_path / "note.txt"))


def test_broken_parquet_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(UserError, match=r"a.parquet is not a readable parquet file"):
        load_all(read_images(file))
    pq.write_table(pa.table({"picture": [b"x"]}), file)
    with pytest.raises(UserError, match=r"a.parquet has columns picture; expected `image`"):
        load_all(read_images(file))
    pq.write_table(pa.table({"image": [{"bytes": png(random_images(1)[0])}, {"bytes": b"junk"}]}), file)
    with pytest.raises(UserError, match=r"a.parquet row 1 is not a readable image"):
        load_all(read_images(file))
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "x.png"}]}), file)
    with pytest.raises(UserError, match=r"row 0: `image` names a file \(x.png\) and holds no bytes"):
        load_all(read_images(file))


def test_mixed_sizes_are_refused_across_batches_unless_resized(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(random_images(1, 8, 8)[0]))
    (tmp_path / "b.png").write_bytes(png(random_images(1, 8, 12)[0]))
    with pytest.raises(UserError, match=r"b.png has \(12, 8\) pixels, the images before it \(8, 8\)"):
        load_all(read_images(tmp_path, batch_size=1))
    assert load_all(read_images(tmp_path, resize="crop4-lanczos"))[0].shape == (2, 3, 4, 4)


def test_images_are_resized_as_by_prepare_batch(tmp_path: Path) -> None:
    wide = random_images(3, 6, 10)
    write_folder(tmp_path, wide)
    read = load_all(read_images(tmp_path, resize="crop3-lanczos"))[0]
    assert torch.equal(read, prepare_batch(wide, "crop3-lanczos"))


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_threads_keep_the_order(tmp_path: Path, workers: int) -> None:
    """The first images take longest to decode."""
    for number in range(24):
        side = 200 if number < 4 else 2
        Image.new("RGB", (side, side), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    images, _ = load_all(read_images(tmp_path, resize="crop2-box", batch_size=5, workers=workers))
    assert images[:, 0, 0, 0].tolist() == list(range(24))


@pytest.mark.parametrize(("start", "limit"), [(0, None), (3, None), (2, 4), (0, 0), (6, 9), (9, 3), (4, 1)])
def test_start_and_limit_of_folders_and_parquet(tmp_path: Path, start: int, limit: int | None) -> None:
    """`start` may lie in any file and any row group."""
    images = random_images(10)
    folder, tables = tmp_path / "folder", tmp_path / "tables"
    folder.mkdir()
    tables.mkdir()
    write_folder(folder, images)
    for number, part in enumerate(images.split([4, 6])):
        cells = [{"bytes": png(image), "path": None} for image in part]
        pq.write_table(pa.table({"img": cells}), tables / f"{number}.parquet", row_group_size=2)
    expected = images[start:] if limit is None else images[start : start + limit]
    for source in (folder, tables):
        files = open_images(source)
        assert len(files) == 10
        batches = list(read_images(files, start=start, limit=limit, batch_size=3))
        got = torch.cat([batch for batch, _ in batches]) if batches else images[:0]
        assert torch.equal(got, expected)


def test_reading_records_conversions_and_digests(tmp_path: Path) -> None:
    write_folder(tmp_path, random_images(3))
    Image.new("L", (8, 8)).save(tmp_path / "003.png")
    Image.new("CMYK", (8, 8)).save(tmp_path / "004.jpg")
    reading = Reading()
    load_all(read_images(tmp_path, reading=reading))
    assert dict(reading.converted) == {"gray": 1, "CMYK": 1}
    files = sorted(tmp_path.iterdir())
    assert reading.digests == [hashlib.sha256(file.read_bytes()).digest() for file in files]


def test_the_listing_changes_with_a_file(tmp_path: Path) -> None:
    write_folder(tmp_path, random_images(2))
    before = open_images(tmp_path).listing()
    assert open_images(tmp_path).listing() == before
    (tmp_path / "001.png").write_bytes(png(random_images(3)[2], "longer than before"))
    assert open_images(tmp_path).listing() != before
