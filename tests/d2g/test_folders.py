"""d2g.data.folders and captions: listing of image folders, reported omissions, and matching of captions."""

import io
import json
import logging
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from d2g.core.errors import SettingError, UserError
from d2g.core.png import save_png
from d2g.data.captions import Captions, check_template
from d2g.data.folders import FolderListing, list_folder
from d2g.data.prompt_files import prompt_cells
from distill.training.real_images import RealImages
from eval.images.folders import load_all, open_images, read_images
from eval.runner.session import read_list
from latent_lpips.training.labeled_images import open_labeled, open_unlabeled
from pairgen.prompts import read_prompts
from teacher_training.config import TeacherConfig
from teacher_training.data import captioned_images, read_captions

PNG = io.BytesIO()
Image.new("RGB", (8, 8), "red").save(PNG, "PNG")


def put(root: Path, *names: str) -> Path:
    """Write files below `root`: pictures, and texts with their own name in them."""
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(PNG.getvalue() if file.suffix in (".png", ".jpg") else f"of {file.stem}\n".encode())
    return root


def names(listing: FolderListing) -> list[str]:
    return [str(picture.relative_to(listing.root)) for picture in listing.pictures]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("d2g"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


HIDDEN = [
    ".a.png",
    ".cache/b.png",
    "__MACOSX/._c.png",
    ".ipynb_checkpoints/d.png",
    "sub/@eaDir/e.png",
    "._f.png",
]


def test_hidden_files_are_skipped_and_reported(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "a.png", "sub/b.png", *HIDDEN)
    assert names(list_folder(tmp_path)) == ["a.png", "sub/b.png"]
    assert len(open_images(tmp_path)) == len(open_unlabeled(str(tmp_path))) == 2
    assert len([r for r in log.records if "left out" in r.message]) == 1, "both say the same, once"
    assert f"{tmp_path}: left out 6 hidden (" in log.text


def test_a_hidden_folder_may_be_the_root(tmp_path: Path) -> None:
    assert names(list_folder(put(tmp_path / ".cache" / "__MACOSX", "a.png"))) == ["a.png"]


def test_hidden_folders_are_not_classes(tmp_path: Path) -> None:
    for folder in ("cats", "dogs", ".ipynb_checkpoints", "__MACOSX", "$RECYCLE.BIN"):
        put(tmp_path, f"{folder}/0.png", f"{folder}/1.png")
    assert list(open_labeled(str(tmp_path))[0].classes) == ["cats", "dogs"]
    _, captions = captioned_images(str(tmp_path), 8, 100, 0, "a photo of {}")
    assert captions == ["a photo of cats"] * 2 + ["a photo of dogs"] * 2


def test_links_to_folders_are_followed_once(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    real, data = put(tmp_path / "real", "0.png", "deep/1.png"), put(tmp_path / "data", "a.png", "own/b.png")
    (data / "more").symlink_to(real)
    (data / "again").symlink_to(real / "deep")  # lies below `more` too
    (data / "loop").symlink_to(data)
    (data / "aa").symlink_to(data / "own")  # sorts before the folder itself
    (data / "file.png").symlink_to(real / "0.png")
    (data / "broken.png").symlink_to(tmp_path / "nowhere.png")
    listing = list_folder(data)
    assert names(listing) == ["a.png", "again/1.png", "file.png", "more/0.png", "own/b.png"]
    assert listing.left_out == {
        "broken links or special files": ["broken.png"],
        "links to folders that are read already": ["aa", "loop", "more/deep"],
    }
    assert len(open_images(data)) == len(open_unlabeled(str(data))) == 5
    assert "left out" in log.text and "broken.png" in log.text


def test_pipes_and_folders_named_like_pictures_are_left_out(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png/c.png")
    os.mkfifo(tmp_path / "pipe.png")
    listing = list_folder(tmp_path)
    assert names(listing) == ["a.png", "b.png/c.png"]
    assert listing.left_out == {"broken links or special files": ["pipe.png"]}


def test_the_order_is_that_of_sorted_paths(tmp_path: Path) -> None:
    put(tmp_path, "b.png", "a/z.png", "a.png", "a b/c.png", "B.png", "a/10.png", "a/9.png")
    expected = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert list(list_folder(tmp_path).pictures) == expected


def test_other_files_are_counted_by_ending(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "a.png", "a.txt", "x.heic", "y.HEIC", "README", "z.parquet")
    open_images(tmp_path)
    reasons = ["2 to be saved as JPEG or PNG first (.heic)", "2 that are no pictures (.parquet, README)"]
    assert f"{tmp_path}: left out {', '.join(reasons)}" in log.text


def test_an_ordinary_folder_logs_nothing(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "a.png", "b.jpg", "c/d.png")
    open_images(tmp_path)
    open_unlabeled(str(tmp_path))
    assert log.text == ""


def test_the_grid_of_d2g_sample_is_left_out(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    from d2g.core.png import image_grid
    from eval.images.folders import read_image

    put(tmp_path, "grid.png")
    image = read_image(tmp_path / "grid.png")
    for number in range(2):
        save_png(image, tmp_path / f"{number:05d}.png", {"prompt": "a", "index": str(number)})
    save_png(image_grid(image.repeat(4, 1, 1, 1)), tmp_path / "grid.png", {})
    assert load_all(read_images(tmp_path))[0].shape == (2, 3, 8, 8)
    assert "left out 1 grids of d2g sample (grid.png)" in log.text
    other = put(tmp_path / "other", "grid.png", "00000.png")
    assert names(list_folder(other)) == ["00000.png", "grid.png"], "a user's own file of that name"


def test_an_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root can read every folder, so the system call is replaced."""
    put(tmp_path, "a.png", "locked/b.png")
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_folder(tmp_path)
    assert names(listing) == ["a.png"] and listing.left_out == {"folders that cannot be read": ["locked"]}
    with pytest.raises(
        UserError, match=r"locked cannot be read: Permission denied; check its name and rights"
    ):
        list_folder(tmp_path / "locked")


# Captions.

ROWS = {"a.png": "one\u2028line", "sub/b.png": 'two, with "quotes"', "é.png": "three"}


def metadata(kind: str) -> dict[str, bytes]:
    """File name -> content of one kind of metadata for ROWS."""
    lines = [json.dumps({"file_name": k, "text": v}, ensure_ascii=False) for k, v in ROWS.items()]
    table = ["file_name,caption", *(f'{k},"{v.replace(chr(34), chr(34) * 2)}"' for k, v in ROWS.items())]
    per_folder = [json.dumps({"file_name": "b.png", "prompt": ROWS["sub/b.png"]})]
    mac = unicodedata.normalize("NFD", "\n".join(lines[:1] + lines[2:]))
    return {
        "jsonl": {"metadata.jsonl": "\n".join(lines).encode()},
        "blank lines and a BOM": {"metadata.jsonl": b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode()},
        "utf-16": {"metadata.jsonl": "\n".join(lines).encode("utf-16")},
        "csv": {"metadata.csv": "\n".join(table).encode()},
        "semicolons": {
            "metadata.csv": "\r\n".join(t.replace(",", ";", 1) for t in table).encode("utf-8-sig")
        },
        "a file in each folder": {
            "metadata.jsonl": mac.encode(),
            "sub/metadata.jsonl": "\n".join(per_folder).encode(),
        },
        "backslashes": {"metadata.jsonl": "\n".join(lines).replace("sub/", "sub\\\\").encode()},
        "text files": {f"{k[:-4]}.txt": f"{v}\n".encode() for k, v in ROWS.items()},
    }[kind]


KINDS = (
    "jsonl",
    "blank lines and a BOM",
    "utf-16",
    "csv",
    "semicolons",
    "a file in each folder",
    "backslashes",
)


@pytest.mark.parametrize("kind", [*KINDS, "text files"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_every_reader_gives_the_same_captions(kind: str, form: str, tmp_path: Path) -> None:
    """macOS stores file names in decomposed form (NFD)."""
    put(tmp_path, *(unicodedata.normalize(form, name) for name in ROWS))
    for name, content in metadata(kind).items():
        (tmp_path / name).write_bytes(content)
    expected = sorted(ROWS.values())
    assert sorted(load_all(read_images(tmp_path))[1]) == expected
    assert sorted(captioned_images(str(tmp_path), 8, 9, 0, "{}")[1]) == expected
    assert sorted(RealImages(str(tmp_path), (8, 8)).read(range(3))[1]) == expected


def test_the_column_can_be_named(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "a.png")
    row = {"file_name": "a.png", "text": "wrong", "prompt": "usual", "blip": "right"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert load_all(read_images(open_images(tmp_path)))[1] == ["usual"]
    assert "captions are read from prompt, not from text" in log.text
    assert load_all(read_images(open_images(tmp_path, "blip")))[1] == ["right"]
    assert captioned_images(str(tmp_path), 8, 9, 0, "{}", column="blip")[1] == ["right"]
    assert RealImages(str(tmp_path), (8, 8), "blip").read([0])[1] == ["right"]
    with pytest.raises(
        UserError, match=r"expected a column named blib, found .*'blip'.*gan.real_column=NAME"
    ):
        RealImages(str(tmp_path), (8, 8), "blib")


def test_captions_of_classes_and_of_kohya_folders(tmp_path: Path) -> None:
    """Text files beside the images take precedence over folder names."""
    put(tmp_path, "10_dog/a.png", "10_dog/b.png")
    assert captioned_images(str(tmp_path), 8, 9, 0, "a {}")[1] == ["a 10 dog"] * 2
    put(tmp_path, "10_dog/a.txt", "10_dog/b.txt")
    assert captioned_images(str(tmp_path), 8, 9, 0, "a {}")[1] == ["of a", "of b"]


@pytest.mark.parametrize("reader", ["images", "gan.real", "prompts"])
def test_missing_listed_files_are_left_out_with_a_message(
    reader: str, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "a.png")
    rows = [{"file_name": name, "caption": "b"} for name in ("gone.png", "a.png", "no/c.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if reader == "images":
        captions = load_all(read_images(tmp_path))[1]
    elif reader == "gan.real":
        images = RealImages(str(tmp_path), (8, 8))
        captions = images.read(range(len(images)))[1]
    else:
        captions = list(prompt_cells(tmp_path))
    assert captions == ["b"]
    files = f"{tmp_path}/gone.png, {tmp_path}/no/c.png"
    assert log.messages == [f"{tmp_path}: left out 2 files that captions name and that are missing ({files})"]
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="holds no images"):
        RealImages(str(tmp_path), (8, 8))


def test_listed_files_may_be_in_other_folders(tmp_path: Path) -> None:
    data, other = put(tmp_path / "data", "a.png", ".hidden/b.png"), put(tmp_path / "other", "c.png")
    paths = ["a.png", ".hidden/b.png", "../other/c.png", str(other / "c.png")]
    rows = [{"file_name": name, "caption": name} for name in paths]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert sorted(RealImages(str(data), (8, 8)).read(range(4))[1]) == sorted(paths)


def test_another_metadata_csv_is_left_out(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "a.png", "a.txt")
    (tmp_path / "metadata.csv").write_text("id,split\n1,train\n")
    assert load_all(read_images(tmp_path))[1] == ["of a"]
    assert Captions(list_folder(tmp_path)).metadata == [] and "no pictures (.csv)" in log.text


def test_images_without_a_caption_are_reported(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}')
    assert len(RealImages(str(tmp_path), (8, 8))) == 1
    assert "left out 1 without a line in the metadata (b.png)" in log.text


def test_images_of_an_earlier_sample_call_are_reported(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    from distill.saved_samples import log_earlier_samples

    put(tmp_path, "00000.png", "00001.png", "00002.png", "grid.png", "notes.png")
    log_earlier_samples(tmp_path, 3)
    assert log.text == ""
    log_earlier_samples(tmp_path, 1)
    assert "also holds 2 images of an earlier call, from 00001.png on; remove them" in log.text


# Captions of a folder as prompts.


def as_metadata(root: Path, ending: str) -> None:
    rows = [("a.png", "a red disc"), ("b.png", "a blue box")]
    lines = (
        [json.dumps({"file_name": name, "caption": caption}) for name, caption in rows]
        if ending == "jsonl"
        else ["file_name,caption", *(f"{name},{caption}" for name, caption in rows)]
    )
    put(root, "a.png", "b.png")
    (root / f"metadata.{ending}").write_text("\n".join(lines))


def as_texts(root: Path) -> None:
    put(root, "a.png", "b.png")
    (root / "a.txt").write_text("a red disc\n")
    (root / "b.txt").write_text("a blue box")


def as_parquet(root: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"image": {"bytes": PNG.getvalue()}, "caption": text} for text in ("a red disc", "a blue box")]
    pq.write_table(pa.Table.from_pylist(rows), root / "train.parquet")


def as_png_texts(root: Path) -> None:
    for name, text in (("a", "a red disc"), ("b", "a blue box")):
        save_png(torch.zeros(3, 8, 8, dtype=torch.uint8), root / f"{name}.png", {"prompt": text})


WRITERS: dict[str, Callable[[Path], None]] = {
    "metadata.jsonl": lambda root: as_metadata(root, "jsonl"),
    "metadata.csv": lambda root: as_metadata(root, "csv"),
    "NAME.txt": as_texts,
    "parquet": as_parquet,
    "PNG texts": as_png_texts,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_folder_gives_prompts(kind: str, tmp_path: Path) -> None:
    """For pairs, evaluation and samples, which read prompts by two functions."""
    WRITERS[kind](tmp_path)
    assert list(read_prompts(tmp_path)) == ["a red disc", "a blue box"]
    assert read_list(tmp_path) == ["a red disc", "a blue box"]


def test_class_folders_give_the_captions_that_teachers_train_on(tmp_path: Path) -> None:
    put(tmp_path, "red_disc/1.png", "red_disc/2.png", "box/3.png")
    assert list(read_prompts(tmp_path)) == ["a photo of a box", "a photo of a red disc"]
    captions = captioned_images(str(tmp_path), 8, 10, 0, "a photo of a {}")[1]
    assert read_list(tmp_path) == captions == ["a photo of a box", *["a photo of a red disc"] * 2]


def test_captions_that_are_names_of_folders_are_said(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """Folders may be called train and test, and captions may lie in files of another ending."""
    put(tmp_path, "train/1.png", "test/2.png")
    assert read_list(tmp_path) == ["a photo of a test", "a photo of a train"]
    line = "captions are made of the names of its folders: a photo of a test, a photo of a train"
    assert f"{tmp_path}: {line}" in log.text


def test_a_caption_in_a_png_comes_before_the_name_of_its_folder(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        as_png_texts(tmp_path / folder)
    put(tmp_path, "two/c.png")
    expected = [*["a red disc", "a blue box"] * 2, "a photo of a two"]
    assert read_list(tmp_path) == expected
    assert captioned_images(str(tmp_path), 8, 10, 0, "a photo of a {}")[1] == expected
    assert read_captions(TeacherConfig(data=str(tmp_path))) == expected


def test_the_graph_that_comfyui_writes_into_a_png_is_no_caption(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    image, graph = torch.zeros(3, 8, 8, dtype=torch.uint8), {"3": {"inputs": {"seed": 1}, "class_type": "K"}}
    save_png(image, tmp_path / "a.png", {"prompt": json.dumps(graph)})
    save_png(image, tmp_path / "b.png", {"prompt": "{red|blue} cube"})
    assert list(read_prompts(tmp_path)) == ["{red|blue} cube"]
    assert "1 of 2 pictures have no caption" in log.text
    assert [texts for _, texts in read_images(tmp_path)] == [["", "{red|blue} cube"]]


def test_pictures_without_a_caption_are_counted(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "a.png", "b.png", "c.png", "b.txt")
    assert list(read_prompts(tmp_path)) == ["of b"]
    assert f"{tmp_path}: 2 of 3 pictures have no caption, left out" in log.text
    (tmp_path / "b.txt").unlink()
    with pytest.raises(UserError, match=r"holds no prompts, expected at least one; check --prompts"):
        read_prompts(tmp_path)


@pytest.mark.parametrize(
    "template", ["{", "{x}", "{}{}", "{0.__class__}", "{:>1000000000}", "{:{}}", "{!r:Q}", "\ud800{}"]
)
def test_caption_templates_that_take_no_class_name_are_refused(template: str) -> None:
    with pytest.raises(SettingError, match=r"caption_template is .*; expected text with \{\} in place"):
        check_template(template)


def test_caption_templates_that_take_a_class_name() -> None:
    for template in ("a photo of a {}", "{0}, {0}", "{:>20}", "{{}}", "no name"):
        check_template(template)


def test_captions_name_pictures_by_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By absolute paths, in a folder that is given by a relative one, and by paths through other folders."""
    for folder in ("pictures", "captions"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (4, 4)).save(tmp_path / "data" / "pictures" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    absolute, through = str(tmp_path / "data" / "pictures" / "0.png"), "../pictures/1.png"
    lines = [{"file_name": name, "caption": name[-5:]} for name in (absolute, through)]
    (tmp_path / "data" / "captions" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for root in (Path("data"), tmp_path / "data"):
        assert read_list(root) == ["0.png", "1.png"]
        assert load_all(read_images(open_images(root)))[1] == ["0.png", "1.png"]
        assert len(RealImages(str(root), (4, 4))) == 2


@pytest.mark.parametrize("beside", ["class folders", "texts", "metadata.csv"])
def test_a_column_that_no_metadata_file_has_is_refused(tmp_path: Path, beside: str) -> None:
    """Otherwise a slip in its name would give other captions."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
        if beside == "texts":
            (tmp_path / name / "0.txt").write_text("an animal")
    if beside == "metadata.csv":
        (tmp_path / "metadata.csv").write_text("file_name,blip\ncat/0.png,right\ndog/0.png,right\n")
    for read, setting in (
        (lambda: read_prompts(tmp_path, "blib"), "column"),
        (lambda: captioned_images(str(tmp_path), 4, 9, 0, "{}", column="blib"), "column"),
        (lambda: RealImages(str(tmp_path), (4, 4), "blib"), "gan.real_column"),
    ):
        with pytest.raises(UserError, match=rf"{setting} is 'blib', but no metadata file .* leave it out"):
            read()
