"""Reads and writes human judgments in BAPPS' layout (Zhang et al. 2018).

2AFC: SPLIT/{ref,p0,p1}/NAME.png and SPLIT/judge/NAME.npy, the share of people who judge p1 closer to ref.
JND:  SPLIT/{p0,p1}/NAME.png and SPLIT/same/NAME.npy, the share of people who see no difference.
Names of the form PICTURE.N, N = 0, 1, ..., are judgments of patches of one picture. Splits are folders in
DATA/train and DATA/val (for JND also in DATA/jnd/val), or DATA is a split itself.
"""

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from d2g.core.environment import usable_cores
from d2g.core.errors import UserError
from d2g.core.machine_errors import raise_machine_error
from d2g.data.folders import is_hidden, is_picture
from d2g.diffusion.latents import from_uint8
from latent_lpips.training.crops import image_to_tensor
from latent_lpips.training.labeled_images import decode_rgb

IMAGE_FOLDERS = {"2afc": ("ref", "p0", "p1"), "jnd": ("p0", "p1")}
ANSWER_FOLDERS = {"2afc": "judge", "jnd": "same"}
JudgmentTask = Literal["2afc", "jnd"]


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgmentSplit:
    """One kind of distortion: the images and the answer of each judgment."""

    name: str
    pictures: Sequence[tuple[Path, ...]]
    """(ref, p0, p1), or (p0, p1) for JND."""
    answers: Tensor
    """[N] fp32 in [0, 1]."""

    def __len__(self) -> int:
        return len(self.pictures)

    def picture_names(self) -> list[tuple[str, str]]:
        """Return, per judgment, the PICTURE part of its name and the sha256 of its first image file."""
        firsts = [paths[0] for paths in self.pictures]
        with ThreadPoolExecutor(usable_cores() + 2) as pool:
            hashes = pool.map(lambda path: hashlib.sha256(path.read_bytes()).hexdigest(), firsts)
            return [(path.stem.split(".")[0], sha256) for path, sha256 in zip(firsts, hashes, strict=True)]


def picture_numbers(splits: Sequence[JudgmentSplit]) -> dict[str, Tensor]:
    """Return, per split, the number [N] int64 of the picture that each judgment shows, over all splits.

    Judgments show the same picture if their first files are equal, or if they are in one split and have the
    same PICTURE in their names.
    """
    # Union-find over file hashes and (split, PICTURE) names.
    parent: dict[object, object] = {}

    def root(x: object) -> object:
        while parent.setdefault(x, x) != x:
            x = parent[x]
        return x

    names = {split.name: split.picture_names() for split in splits}
    for name, judgments in names.items():
        for picture, sha256 in judgments:
            parent[root(sha256)] = root((name, picture))
    # Number the components in order of first use.
    numbers: dict[object, int] = {}
    return {
        name: torch.tensor([numbers.setdefault(root(sha256), len(numbers)) for _, sha256 in judgments])
        for name, judgments in names.items()
    }


def find_splits(data: str | Path, task: JudgmentTask, part: Literal["train", "val"]) -> list[JudgmentSplit]:
    """Return the splits of a part, sorted by name; all splits if the data has no parts.

    For JND the list may be empty. Raises UserError for a folder without 2AFC judgments, and as `open_split`.
    """
    root = Path(data)
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder; expected BAPPS' layout, with {', '.join(IMAGE_FOLDERS['2afc'])}"
        )
    # The data is one split, a folder of splits, or has the parts train/ and val/.
    base = root / task if (root / task).is_dir() else root
    if _is_split(base, task):
        return [open_split(base, task)]
    has_parts = (base / "train").is_dir() or (base / "val").is_dir()
    folders = sorted((base / part).glob("*")) if has_parts else sorted(base.glob("*"))
    folders = [folder for folder in folders if not is_hidden(folder.name)]
    splits = [open_split(folder, task) for folder in folders if _is_split(folder, task)]
    if not splits and task == "2afc" and not (has_parts and part == "val"):
        raise UserError(
            f"{base / part if has_parts else base} holds no judgments; expected ref/, p0/, p1/ and judge/, "
            "or folders that hold them, perhaps in train/ and val/"
        )
    return splits


def _is_split(folder: Path, task: JudgmentTask) -> bool:
    """Whether a folder is a split of the task: it has the task's answers, or for 2AFC ref/ (JND has none)."""
    return (folder / ANSWER_FOLDERS[task]).is_dir() or (task == "2afc" and (folder / "ref").is_dir())


def open_split(folder: Path, task: JudgmentTask = "2afc") -> JudgmentSplit:
    """List the images of a split and read its answers.

    Raises UserError for missing files, an empty split, and answers that are not shares in [0, 1].
    """
    image_folders, answers = IMAGE_FOLDERS[task], ANSWER_FOLDERS[task]
    # Check that all folders are there.
    for name in (*image_folders, answers):
        if not (folder / name).is_dir():
            raise UserError(
                f"{folder}: no {name}/, expected {', '.join(image_folders)} and {answers}; copy it again"
            )
    # List the files by stem, and check that every judgment is complete.
    files = {
        name: {f.stem: f for f in sorted((folder / name).iterdir()) if is_picture(f)}
        for name in image_folders
    }
    answer_files = {f.stem: f for f in sorted((folder / answers).glob("*.npy")) if not is_hidden(f.name)}
    stems = sorted(set(answer_files).union(*files.values()))
    if not stems:
        raise UserError(f"{folder} holds no judgments; expected pictures and .npy files of the same names")
    for name, listed in {**files, answers: answer_files}.items():
        if missing := [stem for stem in stems if stem not in listed]:
            raise UserError(
                f"{folder}: {name}/ lacks {missing[0]} ({len(missing)} of {len(stems)} are missing); "
                "copy it again or remove the others"
            )
    return JudgmentSplit(
        name=folder.name,
        pictures=[tuple(files[name][stem] for name in image_folders) for stem in stems],
        answers=torch.tensor([_read_answer(answer_files[stem]) for stem in stems]),
    )


def _read_answer(file: Path) -> float:
    try:
        value = np.load(file, allow_pickle=False).astype(np.float64).reshape(-1)
    except (OSError, ValueError, EOFError) as error:
        raise_machine_error(error)
        raise UserError(f"{file} is not a readable .npy file ({error}); copy it again") from error
    if value.shape != (1,) or not 0 <= value[0] <= 1:
        raise UserError(f"{file} holds {value.tolist()}, expected one share between 0 and 1; correct it")
    return float(value[0])


def write_triplet(folder: Path, stem: str, pictures: dict[str, Image.Image], judge: float) -> None:
    """Write one 2AFC judgment: images ref, p0 and p1 as PNG, and the share `judge`, which is written last."""
    try:
        for name, image in pictures.items():
            image.save(buffer := io.BytesIO(), "PNG")
            _write_atomically(folder / name / f"{stem}.png", buffer.getvalue())
        np.save(buffer := io.BytesIO(), np.array([judge], dtype=np.float32))
        _write_atomically(
            folder / "judge" / f"{stem}.npy", buffer.getvalue()
        )  # last: it completes the judgment
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; free space") from error


def _write_atomically(file: Path, data: bytes) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def image_batches(
    split: JudgmentSplit, load: int, size: int, rows: Sequence[int] | None = None
) -> Iterator[list[Tensor]]:
    """Yield batches of `size` judgments: per image of a judgment a tensor [B, 3, H, W] in [-1, 1].

    `load` is PatchConfig.load; `rows` selects judgments. Raises UserError for unreadable images and for
    images of different sizes.
    """
    # Threads decode the images of one batch at a time.
    selected = [split.pictures[row] for row in rows] if rows is not None else split.pictures
    first: tuple[Path, Tensor] | None = None
    with ThreadPoolExecutor(usable_cores() + 2) as pool:
        pending = iter(selected)
        while group := list(islice(pending, size)):
            patches = list(
                pool.map(partial(_load_patch, load=load), [path for paths in group for path in paths])
            )
            # All images must have one size, because they are stacked.
            for path, patch in zip([path for paths in group for path in paths], patches, strict=True):
                first = first or (path, patch)
                if patch.shape != first[1].shape:
                    raise UserError(
                        f"{path} has {patch.shape[2]}x{patch.shape[1]} pixels, "
                        f"{first[0]} {first[1].shape[2]}x{first[1].shape[1]}; "
                        "make them one size, or set patch.load"
                    )
            stacked = from_uint8(torch.stack(patches)).unflatten(0, (len(group), len(group[0])))
            yield list(stacked.unbind(1))


def _load_patch(path: Path, load: int) -> Tensor:
    image = decode_rgb(path.read_bytes, str(path))
    if load and image.size != (load, load):
        image = image.resize((load, load), Image.Resampling.BILINEAR)
    return image_to_tensor(image)


def upsample_pixels(pixels: Tensor, size: int) -> Tensor:
    """Resize pixels [B, 3, H, W] in [-1, 1] to `size` x `size`, bicubically; 0 leaves them unchanged."""
    if not size:
        return pixels
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
