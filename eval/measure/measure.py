"""Measure a source image by image, in parts that survive a kill, on any number of processes."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from d2g.core.distributed import process_group
from d2g.core.errors import Interrupted, UserError
from d2g.core.png import save_png
from d2g.core.progress import Progress, quiet
from d2g.core.signals import StopFlag
from eval.images.resize import NATIVE
from eval.measure.rows import MeasuredRows, MeasureOptions, gather_parts, load_part, save_part
from eval.measure.source import ImageSource, SampledBatch

FILE_SHA256 = "file sha256"
"""Name of the rows [N, 32] that hold the sha256 of the measured files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """A measure of single images.

    `function`: (uint8 images [B, 3, H, W] preprocessed as `size` says, B prompts) -> rows [B] or [B, D].
    """

    size: str
    function: Callable[[Tensor, list[str]], Tensor]
    needs_prompts: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class PairMeasure:
    """A measure of pairs. `function`: (images, images of the other source with the same numbers) -> [B]."""

    size: str
    function: Callable[[Tensor, Tensor], Tensor]


def measure_source(
    source: ImageSource,
    numbers: range,
    measures: Mapping[str, Measure],
    *,
    pairs: Mapping[str, PairMeasure] | None = None,
    other: ImageSource | None = None,
    work: MeasureOptions | None = None,
    progress: Progress = quiet,
) -> MeasuredRows:
    """Measure the images `numbers` of a source. Call it on every rank; every rank gets all rows.

    measures, pairs: measures of single images, and of images beside those of the source `other`, by the name
    of their rows. work: batch size, size of a part, and the folder of finished parts. A part is sampled,
    measured and saved as a unit, so a killed run resumes with the same rows.

    Raises UserError for an image without the prompt that a measure needs, a source with too few images, and
    rows that are not finite. Raises Interrupted on Ctrl-C, after saving the finished parts.
    """
    work, pairs = work or MeasureOptions(), pairs or {}
    done: list[MeasuredRows] = []
    with StopFlag() as stop:
        for part in work.parts(numbers)[process_group.rank() :: process_group.world_size()]:
            # Load the part if it was measured before.
            path = work.path(part)
            if path is not None and work.finished(part):
                done.append(load_part(path))
            else:
                rows = _measure_part(source, part, measures, pairs, other, work, stop)
                if rows is None:
                    raise Interrupted(_stop_message(work, numbers))
                if path is not None:
                    save_part(path, rows)
                done.append(rows)
            progress(
                f"measure {source.name}",
                min(sum(map(len, done)) * process_group.world_size(), len(numbers)),
                len(numbers),
            )
    # Exchange the rows of all processes.
    return gather_parts(done, numbers)


def _stop_message(work: MeasureOptions, numbers: range) -> str:
    if work.folder is None:
        return "stopped; nothing was kept, give --out a folder to be able to go on"
    saved = sum(len(part) for part in work.parts(numbers) if (path := work.path(part)) and path.is_file())
    return (
        f"stopped; the measures of {saved} of {len(numbers)} images are safe in {work.folder}; run the same "
        "command again to go on"
    )


def _measure_part(
    source: ImageSource,
    part: range,
    measures: Mapping[str, Measure],
    pairs: Mapping[str, PairMeasure],
    other: ImageSource | None,
    work: MeasureOptions,
    stop: StopFlag,
) -> MeasuredRows | None:
    """The rows of one part; None when stopped before its end."""
    # Ask both sources for every preprocessing that some measure needs.
    sizes = sorted({m.size for m in measures.values()} | {p.size for p in pairs.values()})
    if work.keep and NATIVE not in sizes:
        sizes.append(NATIVE)
    batches = source.draw(part, work.batch_size, sizes)
    other_batches: Iterator[SampledBatch | None] = iter(lambda: None, 0)
    if pairs:
        assert other is not None
        other_batches = iter(other.draw(part, work.batch_size, sorted({p.size for p in pairs.values()})))
    columns: dict[str, list[Tensor]] = {name: [] for name in (*measures, *pairs)}
    prompts: list[str] = []
    converted: Counter[str] = Counter()
    for batch in batches:
        if stop:
            return None
        # Measure each image, and each pair.
        _check_prompts(batch, measures)
        for name, measure in measures.items():
            columns[name].append(measure.function(batch.views[measure.size], batch.prompts).cpu())
        if pairs:
            other_batch = next(other_batches, None)
            assert other is not None and other_batch is not None and len(other_batch) == len(batch)
            _check_same_prompts(source, batch, other, other_batch)
            for name, pair in pairs.items():
                images = batch.views[pair.size]
                other_images = other_batch.views[pair.size].to(images.device)  # files are on the CPU
                _check_sizes(source, images, other, other_images)
                columns[name].append(pair.function(images, other_images).cpu())
        if work.keep:
            _save_images(batch, work)
        # Remember which files were measured and what was converted.
        if batch.digests is not None:
            columns.setdefault(FILE_SHA256, []).append(batch.digests)
        prompts += batch.prompts
        converted.update(batch.converted)
    if len(prompts) != len(part):
        raise UserError(
            f"{source.name} gave {len(prompts)} images for numbers {part.start} to {part.stop - 1}"
        )
    values = {name: torch.cat(rows) for name, rows in columns.items()}
    _check_finite(source, part, values, prompts)
    return MeasuredRows(numbers=part, values=values, prompts=prompts, converted=converted)


def _check_finite(source: ImageSource, part: range, values: Mapping[str, Tensor], prompts: list[str]) -> None:
    for name, rows in values.items():
        broken = (~rows.isfinite()).reshape(len(rows), -1).any(1).nonzero()
        if len(broken):
            first = int(broken[0])
            raise UserError(
                f"{source.name}: {name} of image {part[first]} ({prompts[first][:80]!r}) is not finite; look "
                "for a broken image or broken weights"
            )


def _check_sizes(source: ImageSource, images: Tensor, other: ImageSource, other_images: Tensor) -> None:
    if images.shape != other_images.shape:
        (height, width), (other_height, other_width) = images.shape[2:], other_images.shape[2:]
        raise UserError(
            f"{source.name} gives {width}x{height} pixels and {other.name} {other_width}x{other_height}; "
            "pairs must be of one size"
        )


def _check_same_prompts(
    source: ImageSource, batch: SampledBatch, other: ImageSource, other_batch: SampledBatch
) -> None:
    """Both images of a pair must show one prompt, where both are known: a folder of kept images may come from
    another protocol.
    """
    for offset, (text, other_text) in enumerate(zip(batch.prompts, other_batch.prompts, strict=True)):
        if text and other_text and text != other_text:
            raise UserError(
                f"image {batch.first + offset} of {source.name} shows {text[:80]!r}, of {other.name} "
                f"{other_text[:80]!r}; pairs are of one prompt and noise, make both under one protocol and "
                "seed"
            )


def _check_prompts(batch: SampledBatch, measures: Mapping[str, Measure]) -> None:
    for name, measure in measures.items():
        if measure.needs_prompts and not all(batch.prompts):
            number = batch.first + batch.prompts.index("")
            raise UserError(
                f"image {number} has no prompt, so it has no {name}; give captions with --prompts, or leave "
                f"{name} out of the metrics"
            )


def _save_images(batch: SampledBatch, work: MeasureOptions) -> None:
    for offset, (image, prompt) in enumerate(zip(batch.views[NATIVE], batch.prompts, strict=True)):
        number = batch.first + offset
        save_png(image, work.image(number), {"prompt": prompt, "index": str(number)})
