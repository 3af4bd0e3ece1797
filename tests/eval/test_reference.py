"""eval.measure.reference and build_reference: reference statistics from folders, files and the cache."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from d2g.core.config import digest
from d2g.core.errors import UserError
from d2g.core.seeds import generator
from eval.images.coco import chosen_images, read_coco
from eval.images.folders import load_all, open_images, read_images
from eval.measure.build_reference import (
    build_reference,
    cache_folder,
    open_reference,
    reference_files,
    save_reference,
)
from eval.measure.reference import Reference
from eval.measure.rows import MeasureOptions
from eval.measure.source import image_source
from eval.networks.base import FeatureNet
from eval.protocols.protocol import PROTOCOLS, Protocol


def quarters(images: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(images.float(), 2).flatten(1)


NET = FeatureNet(name="quarters", dim=12, sha256="0a" * 32, function=quarters)
SETS = {"features": NET}
COCO = dataclasses.replace(
    PROTOCOLS["coco2014-30k-d2gan"], images=6, reference_images=10, size=8, features="quarters", pr_images=8
)


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images of different sizes, one of them gray, with two captions each."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "val2014").mkdir()
    (folder / "annotations").mkdir()
    images, annotations = [], []
    for i in range(10):
        name = f"COCO_val2014_{i:012}.jpg"
        pixels = torch.randint(0, 256, (20 + i, 30, 3), generator=generator(i), dtype=torch.uint8)
        image = Image.fromarray(pixels.numpy())
        (image.convert("L") if i == 4 else image).save(folder / "val2014" / name, quality=95)
        images.append({"id": i, "file_name": name})
        annotations += [{"id": 10 * i + n, "image_id": i, "caption": f"photo {i}, {n}"} for n in (1, 0)]
    content = {"images": images, "annotations": annotations}
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(content))
    return folder


def test_statistics_of_a_coco_folder_are_saved_and_loaded(coco: Path, tmp_path: Path) -> None:
    reference = open_reference(coco, COCO, SETS)
    chosen = chosen_images(read_coco(coco, "val2014"), 6, COCO.seed)
    assert reference.prompts == [f"photo {i}, 0" for i in chosen]
    assert reference.count == 10 and reference.facts["converted"] == {"gray": 1}
    rows = quarters(load_all(read_images(coco / "val2014", resize="crop8-bicubic"))[0]).double()
    stats = reference.stats["features"]
    torch.testing.assert_close(stats.mean, rows.mean(0))
    torch.testing.assert_close(stats.covariance, rows.T.cov())
    assert len(stats.rows) == 8, "as many rows as the protocol samples"
    reference.save(tmp_path / "shared.safetensors")
    shared = open_reference(tmp_path / "shared.safetensors", COCO, SETS)
    assert shared.prompts == reference.prompts and shared.facts == reference.facts
    assert torch.equal(shared.stats["features"].covariance, stats.covariance)


def test_a_reference_of_the_prompted_images_only(coco: Path) -> None:
    """coco2014-10k-sdxl compares with the images of its prompts."""
    protocol = dataclasses.replace(COCO, reference="coco2014-val-prompted", reference_images=6)
    files, prompts = reference_files(coco, protocol)
    chosen = chosen_images(read_coco(coco, "val2014"), 6, COCO.seed)
    assert [path.name for path in files.pictures] == [f"COCO_val2014_{i:012}.jpg" for i in sorted(chosen)]
    assert prompts == [f"photo {i}, 0" for i in chosen]
    assert open_reference(coco, protocol, SETS).count == 6


def test_a_folder_of_images_without_annotations(coco: Path) -> None:
    files, prompts = reference_files(coco / "val2014", COCO)
    assert len(files) == 10 and prompts == []


def test_statistics_are_cached_by_network_and_protocol(
    coco: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("D2G_CACHE", str(tmp_path))
    calls: list[int] = []

    def counting(images: Tensor) -> Tensor:
        calls.append(len(images))
        return quarters(images)

    sets = {"features": dataclasses.replace(NET, function=counting)}
    first = open_reference(coco, COCO, sets)
    assert sum(calls) == 10
    again = open_reference(coco, COCO, sets)
    assert sum(calls) == 10 and torch.equal(first.stats["features"].mean, again.stats["features"].mean)
    files = list((tmp_path / "reference").iterdir())
    assert [file.suffix for file in files] == [".safetensors"], "the parts are deleted"
    others = (
        (COCO, {"features": dataclasses.replace(NET, sha256="0b" * 32, function=counting)}),
        (dataclasses.replace(COCO, resize="lanczos"), sets),
        (dataclasses.replace(COCO, seed=1), sets),
        (dataclasses.replace(COCO, pr_images=9), sets),
    )
    for number, (protocol, networks) in enumerate(others, 2):
        open_reference(coco, protocol, networks)
        assert sum(calls) == 10 * number, "another network, resize, choice of prompts or number of rows"
    assert cache_folder() == tmp_path
    monkeypatch.delenv("D2G_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/diffusion2gan")


def test_a_changed_folder_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2G_CACHE", str(tmp_path / "cache"))
    folder, protocol = tmp_path / "images", Protocol(name="x", size=8, resize="box")
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(folder / f"{number}.png")
    before = open_reference(folder, protocol, SETS)
    Image.new("RGB", (10, 10), (200, 0, 0)).save(folder / "3.png")
    after = open_reference(folder, protocol, SETS)
    assert after.stats["features"].mean[0] > before.stats["features"].mean[0] + 40
    assert after.facts["files_sha256"] != before.facts["files_sha256"]


def test_captions_beside_the_images_of_a_reference_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2G_CACHE", str(tmp_path / "cache"))
    folder, protocol = tmp_path / "images", Protocol(name="x", size=8, resize="box")
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(folder / f"{number}.png")
    open_reference(folder, protocol, SETS)
    (folder / "0.txt").write_text("a photo")
    open_reference(folder, protocol, SETS)
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 1


def test_the_digest_covers_the_bytes_of_all_files_in_order(coco: Path) -> None:
    """Equal digests show that two people have the same reference, wherever their folders are."""
    import hashlib

    reference = build_reference(image_source(open_images(coco / "val2014")), COCO, SETS)
    digests = [hashlib.sha256(file.read_bytes()).digest() for file in sorted((coco / "val2014").iterdir())]
    assert reference.facts["files_sha256"] == digest(b"".join(digests).hex())
    assert reference.facts["source"] == "val2014", "only the name of the folder"


def test_another_number_of_images_than_the_protocols_is_refused(coco: Path) -> None:
    more = dataclasses.replace(COCO, reference_images=12)
    source = image_source(open_images(coco / "val2014"))
    with pytest.raises(
        UserError, match="holds 10 images, protocol coco2014-30k-d2gan compares with 12; fetch the rest"
    ):
        build_reference(source, more, SETS)
    assert build_reference(source, more, SETS, allow_fewer=True).count == 10
    fewer = dataclasses.replace(COCO, reference_images=9)
    with pytest.raises(UserError, match=r"holds 10 images, .* compares with 9; give the folder of just"):
        build_reference(source, fewer, SETS)


def test_statistics_of_another_protocol_are_refused(coco: Path, tmp_path: Path) -> None:
    open_reference(coco, COCO, SETS).save(tmp_path / "a.safetensors")
    for protocol, message in (
        (dataclasses.replace(COCO, resize="lanczos"), "preprocessing .'crop8-bicubic' -> 'crop8-lanczos'"),
        (dataclasses.replace(COCO, reference="given"), "reference .'coco2014-val' -> 'given'"),
    ):
        with pytest.raises(UserError, match=rf"reference val2014 was measured another way: .*{message}"):
            open_reference(tmp_path / "a.safetensors", protocol, SETS)
    other = {"features": dataclasses.replace(NET, name="halves")}
    with pytest.raises(UserError, match=r"features.features \('quarters' -> 'halves'\)"):
        open_reference(tmp_path / "a.safetensors", COCO, other)
    with pytest.raises(UserError, match="has no statistics of quarters features; make it again"):
        open_reference(tmp_path / "a.safetensors", COCO, {"dinov2": NET})


def test_missing_and_foreign_statistics_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"a.safetensors: no such statistics file; make one with `d2g eval stats`"
    ):
        Reference.load(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"a.safetensors is no reference statistics file"):
        Reference.load(tmp_path / "a.safetensors")
    from safetensors.torch import save_file

    for metadata in (
        {},
        {"d2g_reference": "{}"},
        {"d2g_reference": '{"version": 99, "facts": {}, "origins": {}}'},
    ):
        save_file({"prompts": torch.zeros(1)}, tmp_path / "a.safetensors", metadata)
        with pytest.raises(UserError, match=r"a.safetensors is no reference statistics file"):
            Reference.load(tmp_path / "a.safetensors")


def test_another_protocol_is_checked_although_the_cache_has_the_images(coco: Path) -> None:
    photographs, folder = coco / "val2014", dataclasses.replace(PROTOCOLS["folder"], size=8, pr_images=8)
    assert open_reference(photographs, folder, SETS).count == 10
    fewer, more = (dataclasses.replace(folder, reference_images=number) for number in (9, 11))
    with pytest.raises(UserError, match="holds 10 images, protocol folder compares with 9; give the folder"):
        open_reference(photographs, fewer, SETS)
    with pytest.raises(UserError, match="holds 10 images, protocol folder compares with 11; fetch the rest"):
        open_reference(photographs, more, SETS)


def test_a_work_folder_keeps_what_others_have_put_there(coco: Path, tmp_path: Path) -> None:
    work = MeasureOptions(folder=tmp_path / "work")
    for note in (False, True):
        built = build_reference(image_source(open_images(coco / "val2014")), COCO, SETS, work=work)
        if note:
            (tmp_path / "work" / "note.txt").write_text("mine")
        save_reference(built, tmp_path / "a.safetensors", work, 0)
        assert (tmp_path / "work").exists() == note
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["note.txt"]


def test_a_file_keeps_all_rows_for_cmmd(coco: Path, tmp_path: Path) -> None:
    sets = {"features": NET, "cmmd": dataclasses.replace(NET, name="clip")}
    built = build_reference(image_source(open_images(coco / "val2014")), COCO, sets)
    built.save(tmp_path / "a.safetensors", keep=3)
    read = Reference.load(tmp_path / "a.safetensors")
    assert (len(read.stats["features"].rows), len(read.stats["cmmd"].rows)) == (3, 10)


def test_a_statistics_file_is_readable_by_all_users(coco: Path, tmp_path: Path) -> None:
    built = build_reference(image_source(open_images(coco / "val2014")), COCO, SETS)
    before = os.umask(0o022)
    try:
        built.save(tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644
    with pytest.raises(UserError, match=r"cannot write .*a.safetensors/b.safetensors: .*; choose another"):
        built.save(tmp_path / "a.safetensors" / "b.safetensors")
    assert os.listdir(tmp_path) == ["a.safetensors"]
