"""Measure reference images once, from COCO's folder or any other, in resumable parts, and cache them."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from d2g.core.config import digest
from d2g.core.distributed import process_group
from d2g.core.errors import UserError
from d2g.core.progress import Progress, quiet
from eval.images.coco import SPLITS, chosen_captions, chosen_images, image_files, read_coco
from eval.images.folders import ImageFiles, open_images
from eval.measure.measure import FILE_SHA256, Measure, measure_source
from eval.measure.reference import VERSION, Reference
from eval.measure.rows import MeasureOptions, feature_stats, open_work
from eval.measure.source import ImageSource, image_source
from eval.networks.base import FeatureNet
from eval.protocols.protocol import Protocol


def reference_files(folder: Path, protocol: Protocol) -> tuple[ImageFiles, list[str]]:
    """The protocol's reference images and its prompts, from COCO's folder as downloaded or from any images.

    A COCO protocol also takes the folder of the images alone, without prompts.
    """
    split = protocol.reference.removesuffix("-prompted")
    if split not in SPLITS:
        return _images_alone(folder), []
    name, _ = SPLITS[split]
    if not (folder / "annotations").is_dir() and protocol.reference == split:
        return _images_alone(folder), []
    coco = read_coco(folder, name)
    selected = chosen_images(coco, protocol.images, protocol.seed)
    prompts = chosen_captions(coco, selected)
    images = selected if protocol.reference.endswith("-prompted") else sorted(coco.files)
    return image_files(coco, images), prompts


def _images_alone(folder: Path) -> ImageFiles:
    """The images of a folder. A reference does not use their captions, so changed ones do not matter."""
    return replace(open_images(folder), caption_files=())


def build_reference(
    source: ImageSource,
    protocol: Protocol,
    sets: Mapping[str, FeatureNet],
    *,
    prompts: Sequence[str] = (),
    allow_fewer: bool = False,
    work: MeasureOptions | None = None,
    progress: Progress = quiet,
) -> Reference:
    """Measure the protocol's reference images with the feature networks `sets`.

    Raises UserError for fewer images than the protocol's, unless `allow_fewer`, and for more.
    """
    count = _reference_count(source, protocol, allow_fewer)
    # One measurement per feature network, resumable in the work folder.
    measures = {
        name: Measure(size=protocol.preprocessing, function=lambda images, _, net=net: net(images).float())  # type: ignore[misc]
        for name, net in sets.items()
    }
    if work is not None and work.folder is not None:
        networks = {name: net.sha256 for name, net in sets.items()}
        open_work(
            work.folder, {**source.facts, "networks": networks, "preprocessing": protocol.preprocessing}
        )
    rows = measure_source(source, range(count), measures, work=work, progress=progress)
    # What later runs compare themselves with.
    title = Path(source.name).name
    facts = {
        "source": title,
        "reference": protocol.reference,
        "images": count,
        "preprocessing": protocol.preprocessing,
        "files_sha256": _digest_of(rows.values.get(FILE_SHA256)),
        "converted": dict(sorted(rows.converted.items())),
    }
    stats = feature_stats(rows, sets, protocol.preprocessing, title)
    return Reference(stats=stats, prompts=prompts, facts=facts)


def _reference_count(source: ImageSource, protocol: Protocol, allow_fewer: bool) -> int:
    """The images to measure: the protocol's, unless fewer are allowed. Raises UserError for other numbers."""
    count = protocol.reference_images or source.count or 0
    if source.count is not None and source.count < count:
        if not allow_fewer:
            raise UserError(
                f"{source.name} holds {source.count} images, protocol {protocol.name} compares with {count}; "
                "fetch the rest, or give --allow-fewer, and the result says so"
            )
        count = source.count
    elif source.count is not None and source.count > count:
        raise UserError(
            f"{source.name} holds {source.count} images, protocol {protocol.name} compares with {count}; "
            "give the folder of just these"
        )
    if count < 2:
        raise UserError(f"{source.name} holds {count} image(s); a reference needs at least 2")
    return count


def _digest_of(digests: Tensor | None) -> str:
    return "" if digests is None else digest(digests.numpy().tobytes().hex())


def cache_folder() -> Path:
    """Where references are cached: $D2G_CACHE, else diffusion2gan/ in the user's cache folder."""
    if folder := os.environ.get("D2G_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion2gan"


def open_reference(
    path: Path,
    protocol: Protocol,
    sets: Mapping[str, FeatureNet],
    *,
    allow_fewer: bool = False,
    batch_size: int = 64,
    progress: Progress = quiet,
) -> Reference:
    """Open a reference: a file of `d2g eval stats`, or images, which are measured once and then cached.

    The cache key is a digest of the files' names, sizes and times, the networks, how the protocol
    preprocesses images and chooses prompts, and the number of rows that it samples. Raises UserError as
    `build_reference` and `Reference.check` do.
    """
    # Statistics are read as they are; images are measured, unless the cache has them.
    if path.suffix == ".safetensors":
        reference = Reference.load(path)
    else:
        files, prompts = reference_files(path, protocol)
        source = image_source(files)
        _reference_count(source, protocol, allow_fewer)  # the cache may have it for another protocol
        networks = {name: [net.name, net.sha256] for name, net in sets.items()}
        decisive = ("prompts", "reference", "images", "seed", "pr_images")
        settings = {name: protocol.settings()[name] for name in decisive}
        # The name of the cached file says what it was made of.
        key = digest([VERSION, dict(source.facts), networks, settings, protocol.preprocessing, allow_fewer])
        file = cache_folder() / "reference" / f"{key}.safetensors"
        if not file.is_file():
            work = MeasureOptions(batch_size=batch_size, folder=file.with_suffix(".work"))
            reference = build_reference(
                source, protocol, sets, prompts=prompts, allow_fewer=allow_fewer, work=work, progress=progress
            )
            save_reference(reference, file, work, protocol.pr_images)
        reference = Reference.load(file)
    reference.check(protocol, sets)
    return reference


def save_reference(reference: Reference, file: Path, work: MeasureOptions, keep: int) -> None:
    """Save a reference on rank 0 and delete the parts it was made from; all processes wait for it.

    `keep`: random rows of each network to save (0: all).
    """
    if process_group.rank() == 0:
        reference.save(file, keep=keep)
        if work.folder is not None:
            _remove_parts(work.folder)
    process_group.barrier()


def _remove_parts(folder: Path) -> None:
    """Delete a work folder, but not what others have put there."""
    own = {"parts", "work.json"}
    if all(entry.name in own or entry.name.startswith(".") for entry in folder.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)
        return
    shutil.rmtree(folder / "parts", ignore_errors=True)
    (folder / "work.json").unlink(missing_ok=True)
