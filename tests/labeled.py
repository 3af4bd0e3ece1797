"""Small data sets of image files for training and calibrating LatentLPIPS."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

CLASSES = ("blue", "green", "red")


def picture(label: int, number: int, width: int = 40, height: int = 36) -> Image.Image:
    """A smooth random image whose strongest channel encodes its class."""
    rng = torch.Generator().manual_seed(1000 * label + number)
    small = 90 * torch.rand(1, 3, 4, 4, generator=rng)
    small[:, 2 - label] += 130
    large = F.interpolate(small, (height, width), mode="bilinear")[0]
    return Image.fromarray(large.permute(1, 2, 0).byte().numpy())


def save_classes(folder: Path, count: int = 12, classes: tuple[str, ...] = CLASSES) -> Path:
    """Save `count` images per class as FOLDER/CLASS/NN.png."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            picture(label, number).save(folder / name / f"{number:02d}.png")
    return folder


def save_table(file: Path, count: int = 12, label: object = None) -> Path:
    """Save the images as parquet. `label`: None for the class, False for no column, else a constant."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells, labels = [], []
    for number in range(count):
        for kind in range(3):
            buffer = io.BytesIO()
            picture(kind, number).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
            labels.append(kind if label is None else label)
    columns = {"image": cells} | ({"label": labels} if label is not False else {})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)
    return file


def save_judgments(folder: Path, count: int = 12, seed: int = 0) -> Path:
    """Save a 2AFC split: p0 and p1 are ref plus noise, and the judgment prefers the one with less noise."""
    rng = np.random.default_rng(seed)
    for name in ("ref", "p0", "p1", "judge"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        ref = np.asarray(picture(number % 3, number, 16, 16)).astype(float)
        levels = rng.permutation([4.0, 30.0])
        for name, level in (("ref", 0.0), ("p0", levels[0]), ("p1", levels[1])):
            noisy = np.clip(ref + level * rng.standard_normal(ref.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / name / f"{number:03d}.png")
        np.save(folder / "judge" / f"{number:03d}.npy", np.array([float(levels[1] < levels[0])]))
    return folder


def save_differences(folder: Path) -> Path:
    """Save a JND split: pairs with little noise (90 % of people judge "same") and with much (0 %)."""
    rng = np.random.default_rng(1)
    for name in ("p0", "p1", "same"):
        (folder / name).mkdir(parents=True)
    for number in range(10):
        first = np.asarray(picture(number % 3, number, 16, 16)).astype(float)
        level = 2.0 if number % 2 else 40.0
        second = np.clip(first + level * rng.standard_normal(first.shape), 0, 255)
        Image.fromarray(first.astype(np.uint8)).save(folder / "p0" / f"{number}.png")
        Image.fromarray(second.astype(np.uint8)).save(folder / "p1" / f"{number}.png")
        np.save(folder / "same" / f"{number}.npy", np.array([0.9 if number % 2 else 0.0]))
    return folder
