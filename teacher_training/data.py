"""Images for teacher training, with captions or classes: a registered source, a folder, or image-parquet."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.distributed import process_group
from d2g.core.errors import UserError, first_line
from d2g.core.json_files import read_json
from d2g.core.logs import logger
from d2g.core.machine_errors import raise_machine_error
from d2g.core.progress import Progress, quiet
from d2g.core.regular_files import require_regular
from d2g.core.shuffle import permuted_batch
from d2g.data.captions import class_captions
from d2g.data.columns import caption_column, find_caption_column
from d2g.data.folders import list_folder
from d2g.data.pictures import picture_prompt, png_text
from d2g.data.prompt_files import prompt_cells
from d2g.data.tables import open_table
from eval.images.folders import ImageFiles, Reading, load_all, open_images, read_images, spread_numbers
from teacher_training.config import TeacherConfig

DataSource = Callable[[int, int, int, Progress], tuple[Tensor, list[str]]]
"""`load(size, limit, seed, progress)` returns uint8 images [N, 3, size, size], N <= limit, and N captions."""

LABEL_COLUMN = "label"
"""The column of class numbers in tables, unless the settings name another."""


@dataclass(frozen=True, kw_only=True)
class TrainingPictures:
    """The pictures of a training: uint8 images [N, 3, S, S], and the prompt of each as its teacher takes it.

    prompts: captions, class numbers in decimal, or empty texts. classes: names of the classes, in order;
    None without classes.
    """

    images: Tensor
    prompts: list[str]
    classes: list[str] | None = None


_SOURCES: dict[str, DataSource] = {}


def register_data(name: str, load: DataSource) -> None:
    """Make `load` available as `d2g teacher train --data NAME`. A registered name hides a folder of that
    name. Registering the same function again changes nothing; another function under the same name is an
    error.
    """
    assert _SOURCES.setdefault(name, load) is load, f"data source {name!r} is already registered"


def is_registered(source: str) -> bool:
    """Whether this is the name of a registered data source."""
    return source in _SOURCES


def captioned_images(
    source: str,
    size: int,
    limit: int,
    seed: int,
    template: str,
    progress: Progress = quiet,
    column: str | None = None,
) -> tuple[Tensor, list[str]]:
    """Load uint8 images [N, 3, size, size], N <= limit, and their N captions.

    `source` is the name of a registered data source, a folder with captions (`d2g.data.captions`), a folder
    with one subfolder per class (captioned by `template`, such as "a photo of a {}"), or a .parquet file.
    `limit` images are evenly spread over all. Images from files are turned upright, cropped to a square and
    resized. `column`: the caption column. Raises UserError for a missing source and for images without a
    caption.
    """
    if source in _SOURCES:
        return _SOURCES[source](size, limit, seed, progress)
    _expect_source(source)
    files = open_images(source, column)
    captions = {} if files.captions else class_captions(Path(source), files.pictures, template)
    if captions:
        files = replace(files, captions=captions)
    images, texts = _load_squares(files, source, limit, size)
    expect_captions(source, texts)
    return images, texts


def expect_captions(source: str, texts: Sequence[str]) -> None:
    """Raise UserError if a picture has no caption, which is an empty text."""
    if "" in texts:
        raise UserError(
            f"{source}: {texts.count('')} of {len(texts)} images have no caption; "
            "expected a metadata.jsonl with file_name and caption, NAME.txt beside NAME.png, a caption "
            "column, or class-named subfolders"
        )


def read_captions(config: TeacherConfig) -> list[str]:
    """The captions of the pictures that `captioned_images` would load, without decoding one; empty texts for
    pictures without a caption.

    Raises UserError for a source that does not exist.
    """
    _expect_source(config.data)
    files, texts = open_images(config.data, config.column), list[str]()
    for table in files.tables:
        if find_caption_column(open_table(table).schema_arrow.names, config.column):
            texts += ["" if cell is None else str(cell) for cell in prompt_cells(table, config.column)]
        else:
            texts += [""] * open_table(table).metadata.num_rows
    captions = files.captions
    if not captions:
        captions = class_captions(Path(config.data), files.pictures, config.caption_template)
    texts += [_caption_of(picture, captions) for picture in files.pictures]
    return [texts[number] for number in spread_numbers(len(texts), config.images)]


def _caption_of(picture: Path, captions: Mapping[Path, str]) -> str:
    """The caption of a picture, else the one in a PNG itself, else an empty text."""
    return captions[picture] if picture in captions else picture_prompt(png_text(picture))


def warn_of_changed_pictures(config: TeacherConfig, prompts: Sequence[str], cache: Path) -> None:
    """Warn on rank 0 if the pictures in `config.data` have changed since a training read them.

    cache: the file or folder with the pictures of the first start. prompts: their captions or classes.
    The number of pictures and the captions are compared, not the pixels.
    """
    if process_group.rank() != 0 or config.data in _SOURCES or not Path(config.data).exists():
        return
    if config.denoiser.classes or config.denoiser.in_pixels:
        count = min(len(open_images(config.data, config.column)), config.images)
        same = count == len(prompts)
    else:
        captions = read_captions(config)
        count, same = len(captions), [*map(str.strip, captions)] == [*map(str.strip, prompts)]
    if not same:
        logger.warning(
            "%s has other pictures or captions than at the first start (%d pictures); the %d pictures in %s "
            "are used; give another --out to use the new ones",
            *(config.data, count, len(prompts), cache),
        )


def labeled_images(
    source: str,
    size: int,
    limit: int,
    seed: int,
    progress: Progress = quiet,
    column: str | None = None,
    classes: bool = True,
) -> TrainingPictures:
    """Load images as `captioned_images` does, with their classes, if they have any; without `classes` none.

    Classes are two or more subfolders, named by their numbers or numbered in sorted order, or the column
    `column` (`LABEL_COLUMN`) of tables. Raises UserError for class numbers with gaps, and for images beside
    class folders.
    """
    if source in _SOURCES:
        images, _ = _SOURCES[source](size, limit, seed, progress)
        return TrainingPictures(images=images, prompts=[""] * len(images))
    _expect_source(source)
    files = open_images(source, column)
    numbers, names = _class_numbers(files, source, column) if classes else ({}, None)
    # Tables hold the numbers themselves; pictures are in the folder of their class.
    if numbers:
        files = replace(files, captions=numbers)
    elif names:
        files = replace(files, column=column or LABEL_COLUMN)
    images, texts = _load_squares(files, source, limit, size)
    prompts = texts if names else [""] * len(images)
    return TrainingPictures(images=images, prompts=prompts, classes=names)


def _load_squares(files: ImageFiles, source: str, limit: int, size: int) -> tuple[Tensor, list[str]]:
    """At most `limit` pictures, evenly spread, cropped to their central squares and resized, with their
    captions."""
    reading, total = Reading(), len(files)
    loaded = load_all(
        read_images(
            files, limit=limit, spread=True, resize=f"crop{size}-lanczos", exact=False, reading=reading
        )
    )
    if total > limit and process_group.rank() == 0:
        logger.info("%s: %d of %d pictures, evenly spread; images=%d takes all", source, limit, total, total)
    if reading.elongated and process_group.rank() == 0:
        logger.warning(
            "%s: %d of %d pictures have one side more than twice as long as the other; the teacher sees "
            "their central squares, less than half of each; crop them yourself to choose another part",
            source,
            reading.elongated,
            len(loaded[1]),
        )
    return loaded


def _expect_source(source: str) -> None:
    """Raise UserError for a source that is no file or folder."""
    if not Path(source).exists():
        names = f"the data sources {', '.join(sorted(_SOURCES))}" if _SOURCES else "no data sources"
        raise UserError(
            f"{source}: no such file or folder; expected a folder of captioned images, a .parquet file, "
            f"or a registered name (there are {names})"
        )


def load_pictures(config: TeacherConfig, progress: Progress = quiet) -> TrainingPictures:
    """The pictures of a training, with the captions or classes that its network reads."""
    source = (config.data, config.size, config.images, config.seed)
    if config.denoiser.classes or config.denoiser.in_pixels:
        return labeled_images(*source, progress, config.column, config.denoiser.classes)
    images, captions = captioned_images(*source, config.caption_template, progress, config.column)
    return TrainingPictures(images=images, prompts=captions)


def class_names(source: str, column: str | None = None) -> list[str] | None:
    """Names of the classes of a source, as `labeled_images` finds them; None without classes."""
    if source in _SOURCES:
        return None
    _expect_source(source)
    return _class_numbers(open_images(source, column), source, column)[1]


def _class_numbers(
    files: ImageFiles, source: str, column: str | None
) -> tuple[dict[Path, str], list[str] | None]:
    """(class number of each picture, in decimal, names of the classes); ({}, names) for tables."""
    if files.tables:
        return {}, _table_classes(files, column)
    listing = list_folder(Path(source))
    folders = listing.by_class()
    if len(folders) < 2:
        return {}, None
    numbers = listing.class_numbers()
    _expect_no_gaps(source, sorted(numbers.values()))
    names = [name.replace("_", " ") for name in sorted(numbers, key=numbers.__getitem__)]
    return {picture: str(numbers[name]) for name, rows in folders.items() for picture in rows}, names


def _table_classes(files: ImageFiles, column: str | None) -> list[str] | None:
    """Class numbers of the tables as names; None if no table has them. Raises UserError if some lack them."""
    values: set[object] = set()
    columns = {file: open_table(file).schema_arrow.names for file in files.tables}
    if column is None and not any(LABEL_COLUMN in names for names in columns.values()):
        return None
    for file, names in columns.items():
        table = open_table(file)
        label = caption_column(file, names, column or LABEL_COLUMN)
        values |= set(table.read(columns=[label])[label].unique().to_pylist())
        if wrong := [value for value in values if type(value) is not int]:
            raise UserError(f"{file}: {label} is {wrong[0]!r}; expected class numbers from 0")
    numbers = sorted(value for value in values if isinstance(value, int))
    _expect_no_gaps(files.name, numbers)
    return [str(number) for number in numbers]


def _expect_no_gaps(source: str, numbers: Sequence[int]) -> None:
    """Raise UserError unless these class numbers are 0, 1, 2, ..."""
    if list(numbers) != list(range(len(numbers))):
        first = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
        raise UserError(f"{source}: class numbers are {first}; expected 0 to {len(numbers) - 1} without gaps")


def random_rows(count: int, limit: int) -> list[int]:
    """At most `limit` row numbers below `count`, at random and sorted: a sample of pictures that lie in any
    order. The same ones each time."""
    return sorted(permuted_batch(0, count, 0, min(count, limit)))


def cached_pictures(folder: Path, load: Callable[[], TrainingPictures]) -> TrainingPictures:
    """`load()`, cached in `folder`: rank 0 loads them once, other ranks and resumed runs read the cache."""
    texts = folder / "captions.json"
    if not texts.is_file() and process_group.rank() == 0:
        pictures = load()
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "images.npy", pictures.images.numpy())
        if pictures.classes is not None:
            write_atomically(folder / "classes.json", json.dumps(pictures.classes))
        # Written last: it marks a complete cache.
        write_atomically(texts, json.dumps(pictures.prompts))
    process_group.barrier()
    return read_cache(folder, f"delete {folder} and run again")


def read_cache(folder: Path, remedy: str) -> TrainingPictures:
    """The pictures that `cached_pictures` has written. Raises UserError, which ends with `remedy`, for files
    that are missing or damaged, or do not fit together.
    """
    prompts = read_json(folder / "captions.json", remedy, list[str])
    classes = folder / "classes.json"
    pictures = TrainingPictures(
        images=_read_pixels(folder / "images.npy", remedy),
        prompts=prompts,
        classes=read_json(classes, remedy, list[str]) if classes.is_file() else None,
    )
    if len(prompts) != len(pictures.images):
        raise UserError(f"{folder} has {len(pictures.images)} pictures and {len(prompts)} captions; {remedy}")
    return pictures


def _read_pixels(file: Path, remedy: str) -> Tensor:
    try:
        require_regular(file)
        # A map is refused if the file is shorter than it claims, before memory is taken.
        pixels = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise_machine_error(error)
        raise UserError(f"{file} is damaged ({first_line(error)}); {remedy}") from error
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.ndim != 4
        or pixels.shape[1] != 3
    ):
        raise UserError(f"{file} holds no pictures; {remedy}")
    return torch.from_numpy(np.array(pixels))
