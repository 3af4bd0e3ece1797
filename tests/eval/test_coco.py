"""eval.images.coco: captions and images are selected from a small folder in the layout of COCO."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from d2g.core.errors import UserError
from eval.images.coco import SPLITS, chosen_captions, chosen_images, image_files, read_coco

IDS = [7, 100, 23, 5, 61]


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Five images with two captions each; neither ids nor annotations are sorted."""
    (tmp_path / "val2014").mkdir()
    (tmp_path / "annotations").mkdir()
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012}.jpg"} for i in IDS]
    annotations = [
        {"id": 1000 - n, "image_id": i, "caption": f" later  {i}\n"} for n, i in enumerate(IDS)
    ] + [{"id": n, "image_id": i, "caption": f"A  photo of\n{i}. "} for n, i in enumerate(IDS)]
    for image in images:
        Image.new("RGB", (12, 8), (int(str(image["id"])), 0, 0)).save(
            tmp_path / "val2014" / str(image["file_name"])
        )
    content = json.dumps({"images": images, "annotations": annotations})
    (tmp_path / "annotations" / "captions_val2014.json").write_text(content)
    return tmp_path


def test_images_are_ordered_by_the_hash_of_seed_and_id(coco: Path) -> None:
    """The order is that of sha256("SEED:ID"); an image has the caption with the lowest annotation id."""
    read = read_coco(coco, "val2014")
    expected = sorted(IDS, key=lambda i: hashlib.sha256(f"0:{i}".encode()).hexdigest())
    assert chosen_images(read, 0, 0) == expected == [61, 7, 23, 100, 5]
    assert chosen_images(read, 3, 0) == expected[:3], "a smaller selection is the beginning of a larger one"
    assert chosen_images(read, 0, 1) != expected
    assert chosen_captions(read, [23, 5]) == ["A photo of 23.", "A photo of 5."]


def test_files_are_sorted_by_name_and_have_captions(coco: Path) -> None:
    read = read_coco(coco, "val2014")
    files = image_files(read, [61, 5])
    assert [path.name for path in files.pictures] == [f"COCO_val2014_{i:012}.jpg" for i in (5, 61)]
    assert files.captions[files.pictures[0]] == "A photo of 5." and len(files) == 2


def test_missing_or_damaged_files_are_named(coco: Path) -> None:
    read = read_coco(coco, "val2014")
    with pytest.raises(
        UserError, match="has 5 captioned images, the protocol draws 6; fetch the whole split"
    ):
        chosen_images(read, 6, 0)
    gone = coco / "val2014" / f"COCO_val2014_{23:012}.jpg"
    gone.unlink()
    with pytest.raises(UserError, match=rf"^{gone} is missing; fetch val2014 again$"):
        image_files(read, IDS)
    with pytest.raises(UserError, match=r"captions_val2017.json is missing|val2017 is missing"):
        read_coco(coco, "val2017")
    file = coco / "annotations" / "captions_val2014.json"
    content = json.loads(file.read_text())
    content["annotations"].append({"id": 3, "image_id": 4, "caption": "x"})
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="does not list image 4, which has captions"):
        read_coco(coco, "val2014")
    for text in ("{", "[]", '{"images": []}'):
        file.write_text(text)
        with pytest.raises(UserError, match=r"captions_val2014.json is no COCO captions file"):
            read_coco(coco, "val2014")
    shutil.rmtree(coco / "val2014")
    with pytest.raises(UserError, match=r"val2014 is missing; expected COCO as downloaded: val2014/\*.jpg"):
        read_coco(coco, "val2014")


def test_the_sizes_of_the_coco_splits() -> None:
    assert SPLITS["coco2014-val"] == ("val2014", 40_504) and SPLITS["coco2017-val"] == ("val2017", 5_000)
