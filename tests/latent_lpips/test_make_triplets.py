"""`d2g lpips triplets`: folders in the layout of BAPPS with correct judgments."""

import io
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d2g.core.errors import SettingError, UserError
from labeled import picture, save_classes, save_table
from latent_lpips.training.bapps import find_splits, write_triplet
from latent_lpips.training.config import DISTORTION_KINDS, TripletsConfig
from latent_lpips.training.crops import image_to_tensor, tensor_to_image
from latent_lpips.training.labeled_images import open_unlabeled
from latent_lpips.training.make_triplets import (
    cut_patch,
    distort_jpeg,
    distortion_functions,
    make_triplet,
    make_triplets,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classes(tmp_path_factory.mktemp("triplets") / "data", 4)


def read(path: Path) -> np.ndarray:  # type: ignore[type-arg]
    with Image.open(path) as opened:
        return np.asarray(opened).astype(float)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.*")) if f.is_file()}


def test_all_kinds_are_written_and_read_back(data: Path, teacher: Path, tmp_path: Path) -> None:
    config = TripletsConfig(data=str(data), decoders=(str(teacher),), size=32, patches=2, val=0.25)
    result = make_triplets(config, tmp_path)
    assert result.train == dict.fromkeys(DISTORTION_KINDS, 18) and result.val == dict.fromkeys(
        DISTORTION_KINDS, 6
    )
    for part, count in (("train", 18), ("val", 6)):
        splits = find_splits(tmp_path, "2afc", part)  # type: ignore[arg-type]
        assert {split.name for split in splits} == set(DISTORTION_KINDS) and {len(s) for s in splits} == {
            count
        }
        for split in splits:
            assert set(split.answers.tolist()) == {0.0, 1.0}
            for paths, judgment in zip(split.pictures, split.answers.tolist(), strict=True):
                ref, p0, p1 = (read(path) for path in paths)
                assert ref.shape == (32, 32, 3)
                if split.name != "warp":  # for warps the squared error may decrease
                    assert (((p1 - ref) ** 2).mean() < ((p0 - ref) ** 2).mean()) == bool(judgment), paths
    train, val = ({f.name for f in (tmp_path / part).rglob("*.png")} for part in ("train", "val"))
    assert not train & val


def test_an_incomplete_folder_is_completed_identically(data: Path, tmp_path: Path) -> None:
    config = TripletsConfig(data=str(data), size=16, kinds=("jpeg", "noise"))
    make_triplets(config, tmp_path / "complete")
    shutil.copytree(tmp_path / "complete", tmp_path / "incomplete")
    for file in sorted((tmp_path / "incomplete" / "train" / "noise").rglob("00000[37].0.*")):
        file.unlink()
    make_triplets(config, tmp_path / "incomplete")
    assert listing(tmp_path / "incomplete") == listing(tmp_path / "complete")
    assert make_triplets(replace(config, data=f"{data}/."), tmp_path / "incomplete").train
    make_triplets(replace(config, seed=1), tmp_path / "other")
    assert listing(tmp_path / "other") != listing(tmp_path / "complete")
    with pytest.raises(UserError, match="another config: seed"):
        make_triplets(replace(config, seed=1), tmp_path / "incomplete")


def test_both_distortions_share_random_numbers_and_differ_in_strength() -> None:
    strengths: list[tuple[float, float]] = []

    def record(x: torch.Tensor, strength: float, rng: torch.Generator) -> torch.Tensor:
        strengths.append((strength, float(torch.rand((), generator=rng))))
        return x * (1 - strength)

    ref = torch.full((3, 16, 16), 250, dtype=torch.uint8)
    judgments = []
    for seed in range(200):
        triplet = make_triplet(ref, record, 1.5, torch.Generator().manual_seed(seed))
        assert triplet is not None
        versions, judgment = triplet
        (weak, first), (strong, second) = strengths[-2:]
        assert 0.05 <= weak and 1.5 * weak <= strong * (1 + 1e-9) and strong <= 1 and first == second
        nearer = versions["p1"] if judgment else versions["p0"]
        farther = versions["p0"] if judgment else versions["p1"]
        assert (nearer.float() - ref).abs().mean() < (farther.float() - ref).abs().mean()
        judgments.append(judgment)
    assert 70 < sum(judgments) < 130


def test_jpeg_distortion_equals_pillow() -> None:
    image = picture(1, 3, 32, 32)
    x = image_to_tensor(image)[None].float() / 127.5 - 1
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=48)
    ours = distort_jpeg(x, 0.5, torch.Generator())
    theirs = image_to_tensor(Image.open(buffer).convert("RGB"))[None].float() / 127.5 - 1
    assert torch.equal(ours, theirs)
    assert set(distortion_functions([])) == set(DISTORTION_KINDS)


def test_patches_are_squares_of_the_picture(tmp_path: Path) -> None:
    board = np.zeros((40, 60, 3), np.uint8)
    board[:, :, 0], board[:, :, 1] = np.arange(60), np.arange(40)[:, None]
    (tmp_path / "data").mkdir()
    Image.fromarray(board).save(tmp_path / "data" / "a.png")
    pictures = open_unlabeled(str(tmp_path / "data"))
    config = TripletsConfig(data=str(tmp_path / "data"), size=40)
    lefts = set()
    for number in range(30):
        cut = cut_patch(pictures, 0, number, config)  # the patch has the full height, so nothing is resized
        assert cut.shape == (3, 40, 40)
        lefts.add(int(cut[0, 0, 0]))
        assert torch.equal(cut[0, 0], torch.arange(cut[0, 0, 0], cut[0, 0, 0] + 40).to(torch.uint8))
    assert min(lefts) < 5 and max(lefts) > 15
    assert tensor_to_image(cut_patch(pictures, 0, 0, replace(config, size=64))).size == (64, 64)


def test_parquet_input_and_one_line_errors(data: Path, tmp_path: Path) -> None:
    table = save_table(tmp_path / "a.parquet", 2, label=False)
    result = make_triplets(TripletsConfig(data=str(table), size=16, kinds=("blur",)), tmp_path / "out")
    assert result.train == {"blur": 5} and result.val == {"blur": 1}
    with pytest.raises(SettingError, match="no decoder is given; give --decoder"):
        TripletsConfig(kinds=("decoder",))
    with pytest.raises(SettingError, match="ratio"):
        TripletsConfig(ratio=1.0)
    with pytest.raises(SettingError, match="data is not set"):
        make_triplets(TripletsConfig(), tmp_path / "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        make_triplets(TripletsConfig(data=str(tmp_path / "empty")), tmp_path / "x")
    single = TripletsConfig(data=str(data / "red" / "00.png"))
    with pytest.raises(UserError, match="1 pictures, 1 for val/; give more, or set val=0"):
        make_triplets(single, tmp_path / "x2")


def test_equal_versions_are_resampled_or_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (40, 40), (90, 120, 30)).save(folder / "flat.png")
    picture(1, 0, 40, 40).save(folder / "other.png")
    config = TripletsConfig(data=str(folder), size=16, kinds=("blur", "noise", "color"), val=0)
    result = make_triplets(config, tmp_path / "out")
    assert result.train == {"blur": 1, "noise": 2, "color": 2} and result.left_out == 1
    (split,) = (s for s in find_splits(tmp_path / "out", "2afc", "train") if s.name == "blur")
    assert [paths[0].stem for paths in split.pictures] == ["000001.0"]
    assert make_triplets(config, tmp_path / "out") == result

    def steps(x: torch.Tensor, strength: float, rng: torch.Generator) -> torch.Tensor:
        return x - 0.5 * (strength > 0.9)  # only strengths above 0.9 have an effect

    ref = torch.full((3, 16, 16), 250, dtype=torch.uint8)
    triplets = [make_triplet(ref, steps, 1.3, torch.Generator().manual_seed(seed)) for seed in range(100)]
    versions = [result[0] for result in triplets if result is not None]
    assert 15 < len(versions) < 100 and not any(torch.equal(v["p0"], v["p1"]) for v in versions)
    once = sum(not torch.equal(v["p0"], v["p1"]) for v in map(first_draw, range(100)))
    assert len(versions) > 1.5 * once


def first_draw(seed: int) -> dict[str, torch.Tensor]:
    """The two distorted versions of the first attempt."""
    rng = torch.Generator().manual_seed(seed)
    weak = 0.05 + (1 / 1.3 - 0.05) * float(torch.rand((), generator=rng))
    strong = weak * (1.3 + (1 / weak - 1.3) * float(torch.rand((), generator=rng)))
    return {"p0": torch.tensor(weak > 0.9), "p1": torch.tensor(strong > 0.9)}


def test_judgments_are_written_atomically(tmp_path: Path) -> None:
    """The file is replaced by a rename, so open handles and hard links keep the old contents."""
    images = {name: picture(0, number, 16, 16) for number, name in enumerate(("ref", "p0", "p1"))}
    write_triplet(tmp_path, "a", images, 0.0)
    for name in ("judge/a.npy", "ref/a.png"):
        os.link(tmp_path / name, tmp_path / Path(name).name)
    old = (tmp_path / "a.png").read_bytes()
    write_triplet(tmp_path, "a", {**images, "ref": picture(2, 7, 16, 16)}, 1.0)
    assert np.load(tmp_path / "a.npy").item() == 0 and np.load(tmp_path / "judge" / "a.npy").item() == 1
    assert (tmp_path / "a.png").read_bytes() == old != (tmp_path / "ref" / "a.png").read_bytes()
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob(".*"))
