"""Measure a source image by image: in parts that survive a kill, over any number of processes."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

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
"""The rows [N, 32] that tell which files were measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """One row per image. `function`: (uint8 images [B, 3, H, W] at `size`, B prompts) -> [B] or [B, D]."""

    size: str
    function: Callable[[Tensor, list[str]], Tensor]
    needs_prompts: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class PairMeasure:
    """One row per pair. `function`: (images, the other source's images of the same numbers) -> [B]."""

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
    """Measure the images `numbers` of a source, shared out among the processes; every process gets all rows.

    A part is drawn, measured and stored as a whole, so that a run that was killed goes on where it stood,
    with the same rows. Raises UserError for a picture without the prompt that a measure needs, a source with
    too few images, and rows that are not finite; Interrupted on Ctrl-C, when finished parts are safe.
    """
    work, pairs = work or MeasureOptions(), pairs or {}
    done: list[MeasuredRows] = []
    with StopFlag() as stop:
        for part in work.parts(numbers)[process_group.rank() :: process_group.world_size()]:
            path = work.path(part)
            if path is not None and path.is_file():
                done.append(load_part(path))
            else:
                rows = _measured(source, part, measures, pairs, other, work, stop)
                if rows is None:
                    raise Interrupted(_stopped(work, numbers))
                if path is not None:
                    save_part(path, rows)
                done.append(rows)
            progress(
                f"measure {source.name}",
                min(sum(map(len, done)) * process_group.world_size(), len(numbers)),
                len(numbers),
            )
    return gather_parts(done, numbers)


def _stopped(work: MeasureOptions, numbers: range) -> str:
    if work.folder is None:
        return "stopped; nothing was kept, give --out a folder to be able to go on"
    safe = sum(len(part) for part in work.parts(numbers) if (path := work.path(part)) and path.is_file())
    return (
        f"stopped; the measures of {safe} of {len(numbers)} images are safe in {work.folder}; run the same "
        "command again to go on"
    )


def _measured(
    source: ImageSource,
    part: range,
    measures: Mapping[str, Measure],
    pairs: Mapping[str, PairMeasure],
    other: ImageSource | None,
    work: MeasureOptions,
    stop: StopFlag,
) -> MeasuredRows | None:
    """The rows of one part; None when stopped before its end."""
    sizes = sorted({m.size for m in measures.values()} | {p.size for p in pairs.values()})
    if work.keep and NATIVE not in sizes:
        sizes.append(NATIVE)
    batches = source.draw(part, work.batch_size, sizes)
    others: Iterator[SampledBatch | None] = iter(lambda: None, 0)
    if pairs:
        assert other is not None
        others = iter(other.draw(part, work.batch_size, sorted({p.size for p in pairs.values()})))
    found: dict[str, list[Tensor]] = {name: [] for name in (*measures, *pairs)}
    prompts: list[str] = []
    converted: Counter[str] = Counter()
    for drawn in batches:
        if stop:
            return None
        _check_prompts(drawn, measures)
        for name, measure in measures.items():
            found[name].append(measure.function(drawn.views[measure.size], drawn.prompts).cpu())
        if pairs:
            twin = next(others, None)
            assert twin is not None and len(twin) == len(drawn)
            _check_twin(source, drawn, other, twin)
            for name, pair in pairs.items():
                images, theirs = drawn.views[pair.size], twin.views[pair.size]
                _check_sizes(source, images, other, theirs)
                found[name].append(pair.function(images, theirs).cpu())
        if work.keep:
            _keep(drawn, work.keep)
        if drawn.digests is not None:
            found.setdefault(FILE_SHA256, []).append(drawn.digests)
        prompts += drawn.prompts
        converted.update(drawn.converted)
    if len(prompts) != len(part):
        raise UserError(
            f"{source.name} gave {len(prompts)} images for numbers {part.start} to {part.stop - 1}"
        )
    values = {name: torch.cat(rows) for name, rows in found.items()}
    for name, rows in values.items():
        broken = (~rows.isfinite()).reshape(len(rows), -1).any(1).nonzero()
        if len(broken):
            first = int(broken[0])
            raise UserError(
                f"{source.name}: {name} of image {part[first]} ({prompts[first][:80]!r}) is not finite; look "
                "for a broken image or broken weights"
            )
    return MeasuredRows(numbers=part, values=values, prompts=prompts, converted=converted)


def _check_sizes(source: ImageSource, images: Tensor, other: ImageSource | None, others: Tensor) -> None:
    if images.shape != others.shape:
        (height, width), (high, wide) = images.shape[2:], others.shape[2:]
        name = other.name if other is not None else ""
        raise UserError(
            f"{source.name} gives {width}x{height} pixels and {name} {wide}x{high}; pairs must be of one size"
        )


def _check_twin(
    source: ImageSource, drawn: SampledBatch, other: ImageSource | None, twin: SampledBatch
) -> None:
    """Pairs are of one prompt, where both sides know theirs: a kept folder may be another protocol's."""
    for offset, (text, theirs) in enumerate(zip(drawn.prompts, twin.prompts, strict=True)):
        if text and theirs and text != theirs:
            name = other.name if other is not None else ""
            raise UserError(
                f"image {drawn.first + offset} of {source.name} shows {text[:80]!r}, of {name} "
                f"{theirs[:80]!r}; pairs are of one prompt and noise, make both under one protocol and seed"
            )


def _check_prompts(drawn: SampledBatch, measures: Mapping[str, Measure]) -> None:
    for name, measure in measures.items():
        if measure.needs_prompts and not all(drawn.prompts):
            number = drawn.first + drawn.prompts.index("")
            raise UserError(
                f"image {number} has no prompt, so it has no {name}; give captions with --prompts, or leave "
                f"{name} out of the metrics"
            )


def _keep(drawn: SampledBatch, folder: Path) -> None:
    for offset, (image, prompt) in enumerate(zip(drawn.views[NATIVE], drawn.prompts, strict=True)):
        number = drawn.first + offset
        save_png(image, folder / f"{number:08d}.png", {"prompt": prompt, "index": str(number)})
