"""eval.images: folders, parquet, sizes, and what is said about broken input."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from core.errors import UserError
from core.seeds import generator
from eval.images import load_all, read_images, resize_batch, resize_clean, resize_tensorflow, to_pil


def pictures(count: int, height: int = 8, width: int = 8) -> Tensor:
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


def test_a_folder_in_sorted_order_in_batches(tmp_path: Path) -> None:
    images = pictures(5)
    write_folder(tmp_path, images)
    batches = list(read_images(tmp_path, batch_size=2))
    assert [len(batch) for batch, _ in batches] == [2, 2, 1]
    together, captions = load_all(batches)
    assert torch.equal(together, images)
    assert captions == [f"own {number}" for number in range(5)]
    assert torch.equal(load_all(read_images(tmp_path, limit=3))[0], images[:3])


def test_metadata_comes_before_a_pictures_own_prompt(tmp_path: Path) -> None:
    write_folder(tmp_path, pictures(2))
    line = json.dumps({"file_name": "001.png", "text": "a snowy owl"})
    (tmp_path / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")
    assert load_all(read_images(tmp_path))[1] == ["own 0", "a snowy owl"]
    (tmp_path / "metadata.jsonl").write_text(line + '\n{"file_name": "000.png"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"metadata.jsonl line 2 lacks"):
        load_all(read_images(tmp_path))


def test_parquet_with_captions(tmp_path: Path) -> None:
    images = pictures(4)
    cells = [{"bytes": png(image), "path": None} for image in images]
    table = pa.table({"image": cells, "caption": ["a", "b", "c", "d"], "label": [0, 1, 2, 3]})
    pq.write_table(table, tmp_path / "train.parquet")
    for source in (tmp_path, tmp_path / "train.parquet"):
        read, captions = load_all(read_images(source, batch_size=3))
        assert torch.equal(read, images) and captions == ["a", "b", "c", "d"]


def test_broken_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        load_all(read_images(tmp_path / "gone"))
    with pytest.raises(UserError, match="holds no images"):
        load_all(read_images(tmp_path))
    write_folder(tmp_path, pictures(2))
    data = (tmp_path / "001.png").read_bytes()
    (tmp_path / "001.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"001.png is no readable image"):
        load_all(read_images(tmp_path))
    (tmp_path / "note.txt").write_text("x")
    with pytest.raises(UserError, match="neither a folder of images nor"):
        load_all(read_images(tmp_path / "note.txt"))


def test_broken_parquet_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(UserError, match=r"a.parquet is no readable parquet file"):
        load_all(read_images(file))
    pq.write_table(pa.table({"picture": [b"x"]}), file)
    with pytest.raises(UserError, match=r"a.parquet has columns picture; expected `image`"):
        load_all(read_images(file))
    pq.write_table(pa.table({"image": [{"bytes": png(pictures(1)[0])}, {"bytes": b"junk"}]}), file)
    with pytest.raises(UserError, match=r"a.parquet row 1 is no readable image"):
        load_all(read_images(file))
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "x.png"}]}), file)
    with pytest.raises(UserError, match=r"a.parquet row 0: `image` holds no bytes"):
        load_all(read_images(file))


def test_mixed_sizes_are_refused_across_batches_unless_resized(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(pictures(1, 8, 8)[0]))
    (tmp_path / "b.png").write_bytes(png(pictures(1, 8, 12)[0]))
    with pytest.raises(UserError, match=r"b.png has \(12, 8\) pixels, the images before it \(8, 8\)"):
        load_all(read_images(tmp_path, batch_size=1))
    assert load_all(read_images(tmp_path, resize="crop4-lanczos"))[0].shape == (2, 3, 4, 4)


def test_the_centre_of_the_long_edge_is_kept(tmp_path: Path) -> None:
    wide = pictures(1, 6, 10)
    assert torch.equal(resize_batch(wide, "crop6-bicubic"), wide[..., 2:8])
    assert torch.equal(resize_batch(wide, "native"), wide)
    (tmp_path / "a.png").write_bytes(png(wide[0]))
    read = load_all(read_images(tmp_path, resize="crop3-lanczos"))[0]
    expected = to_pil(wide[0, :, :, 2:8]).resize((3, 3), Image.Resampling.LANCZOS)
    assert torch.equal(read[0], torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    assert not torch.equal(resize_batch(wide, "crop3-lanczos"), resize_batch(wide, "crop3-bicubic"))


@pytest.mark.parametrize("size", [20, 64])
def test_the_clean_resize_is_pils_in_floating_point(size: int) -> None:
    images = pictures(2, 32, 32)
    ours = resize_clean(images, size)
    for image, got in zip(images, ours, strict=True):
        for channel, plane in zip(image, got, strict=True):
            pil = Image.fromarray(channel.float().numpy()).resize((size, size), Image.Resampling.BICUBIC)
            np.testing.assert_allclose(plane.numpy(), np.asarray(pil), atol=2e-3)
    if size > 32:
        assert ours.max() > 255 and ours.min() < 0, "noise overshoots, and clean-fid does not clip"


def test_the_tensorflow_resize_reads_at_whole_steps() -> None:
    ramp = torch.arange(8, dtype=torch.uint8).mul(20).expand(1, 3, 8, 8)
    got = resize_tensorflow(ramp, 20)[0, 0, 0]
    expected = (torch.arange(20) * 8 / 20).clamp(max=7) * 20
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
