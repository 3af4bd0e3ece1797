"""The folder layout of BAPPS: finding and reading splits; errors of incomplete or damaged ones."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d2g.core.errors import UserError
from labeled import save_differences, save_judgments
from latent_lpips.training.bapps import find_splits, image_batches, open_split, upsample_pixels
from latent_lpips.training.crops import image_to_tensor


@pytest.fixture
def split(tmp_path: Path) -> Path:
    return save_judgments(tmp_path / "noise", 5)


@pytest.mark.parametrize("root", ["", "2afc"])
def test_parts_and_splits_are_found_with_and_without_the_task_folder(tmp_path: Path, root: str) -> None:
    for name in ("train/cnn", "train/mix", "val/cnn"):
        save_judgments(tmp_path / root / name, 3)
    save_differences(tmp_path / ("jnd" if root else "") / "val" / "traditional")
    assert [s.name for s in find_splits(tmp_path, "2afc", "train")] == ["cnn", "mix"]
    assert [s.name for s in find_splits(tmp_path, "2afc", "val")] == ["cnn"]
    (same,) = find_splits(tmp_path, "jnd", "val")
    assert (same.name, len(same)) == ("traditional", 10) and same.answers.max() == pytest.approx(0.9)


def test_a_folder_without_parts_is_used_as_train_and_val(split: Path, tmp_path: Path) -> None:
    for root in (split, tmp_path):
        for part in ("train", "val"):
            (listed,) = find_splits(root, "2afc", part)  # type: ignore[arg-type]
            assert (listed.name, len(listed)) == ("noise", 5)
    assert find_splits(split, "jnd", "val") == []


def test_batches_keep_the_order_and_the_pixels(split: Path) -> None:
    loaded = open_split(split)
    parts = list(image_batches(loaded, 0, 2))
    assert [len(part[0]) for part in parts] == [2, 2, 1] and parts[0][0].shape == (2, 3, 16, 16)
    p1 = torch.cat([part[2] for part in parts])
    with Image.open(split / "p1" / "003.png") as opened:
        assert torch.equal(((p1[3] + 1) * 127.5).round().byte(), image_to_tensor(opened))
    selected = list(image_batches(loaded, 0, 9, [3, 1]))
    assert torch.equal(selected[0][2], p1[[3, 1]])
    assert next(image_batches(loaded, 8, 2))[0].shape == (2, 3, 8, 8)


def test_upsampling_is_bicubic_within_range_and_optional() -> None:
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    assert upsample_pixels(x, 0) is x
    large = upsample_pixels(x, 32)
    assert large.shape == (2, 3, 32, 32) and large.abs().max() <= 1
    flat = torch.full((1, 3, 8, 8), 0.25)
    torch.testing.assert_close(upsample_pixels(flat, 20), torch.full((1, 3, 20, 20), 0.25))


def save_half(split: Path) -> None:
    np.save(split / "judge" / "002.npy", np.array([1.5]))


BAD = {
    "missing": (lambda s: shutil.rmtree(s), "no such folder"),
    "no judge": (lambda s: shutil.rmtree(s / "judge"), "noise: no judge/, expected ref, p0, p1 and judge"),
    "no p1": (lambda s: shutil.rmtree(s / "p1"), "noise: no p1/"),
    "one judge": (lambda s: (s / "judge" / "002.npy").unlink(), r"judge/ lacks 002 \(1 of 5 are missing\)"),
    "one picture": (lambda s: (s / "p0" / "004.png").unlink(), "p0/ lacks 004"),
    "no share": (save_half, r"002.npy holds \[1.5\], expected one share between 0 and 1"),
    "no npy": (lambda s: (s / "judge" / "002.npy").write_bytes(b"no"), "002.npy is not a readable .npy file"),
    "empty": (lambda s: [f.unlink() for f in s.rglob("*.*")], "noise holds no judgments"),
    "nothing": (lambda s: [shutil.rmtree(p) for p in s.iterdir()], "noise holds no judgments; expected ref/"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_one_line_errors(split: Path, case: str) -> None:
    damage, message = BAD[case]
    damage(split)
    with pytest.raises(UserError, match=message) as caught:
        find_splits(split, "2afc", "train")
    assert "\n" not in str(caught.value)


def test_bad_images_are_one_line_errors(split: Path) -> None:
    Image.new("RGB", (8, 16)).save(split / "p0" / "003.png")
    with pytest.raises(UserError, match=r"p0/003.png has 8x16 pixels, .*ref/000.png 16x16; .* patch.load"):
        list(image_batches(open_split(split), 0, 2))
    assert len(list(image_batches(open_split(split), 16, 2))) == 3
    (split / "p1" / "001.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"p1/001.png is not a readable image"):
        list(image_batches(open_split(split), 16, 2))
