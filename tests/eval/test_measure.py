"""eval.measure.measure and rows: rows do not depend on batches, parts, processes or interruptions."""

import io
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from d2g.core.config import differing
from d2g.core.distributed import process_group
from d2g.core.errors import Interrupted, UserError
from d2g.core.seeds import noise
from eval.images.folders import open_images
from eval.images.resize import NATIVE
from eval.measure.measure import FILE_SHA256, Measure, PairMeasure, measure_source
from eval.measure.rows import MeasuredRows, MeasureOptions, load_part, open_work, save_part
from eval.measure.source import ImageSource, SampledBatch, batch_source, image_source, views_of
from forks import fork, on_ranks

PROMPTS = ["red", "green", "blue"]


def sampler(seed: int = 0, shift: int = 0, side: int = 4) -> ImageSource:
    """A sampler whose images depend on (seed, number)."""

    def draw(numbers: range, batch_size: int, sizes: Sequence[str]) -> Iterator[SampledBatch]:
        for first in range(numbers.start, numbers.stop, batch_size):
            part = range(first, min(first + batch_size, numbers.stop))
            images = (noise(seed, part, (3, side, side)) * 60 + 128 + shift).clamp(0, 255).to(torch.uint8)
            yield SampledBatch(
                first=first, views=views_of(images, sizes), prompts=[PROMPTS[i % 3] for i in part]
            )

    return ImageSource(name="sampler", facts={"kind": "test", "seed": seed}, draw=draw)


def mean_level(images: Tensor, prompts: list[str]) -> Tensor:
    return images.double().mean((1, 2, 3))


def colors(images: Tensor, prompts: list[str]) -> Tensor:
    return images.float().mean((2, 3))


MEASURES = {
    "level": Measure(size=NATIVE, function=mean_level),
    "colors": Measure(size="crop2-box", function=colors),
}


def same(a: MeasuredRows, b: MeasuredRows) -> bool:
    return (
        a.prompts == b.prompts
        and a.values.keys() == b.values.keys()
        and all(torch.equal(a.values[name], b.values[name]) for name in a.values)
        and a.converted == b.converted
    )


EXPECTED = measure_source(sampler(), range(50), MEASURES)


def test_images_are_kept_of_parts_that_were_measured_without_them(tmp_path: Path) -> None:
    work, keep = MeasureOptions(part=4, folder=tmp_path / "work"), tmp_path / "kept"
    measure_source(sampler(), range(10), MEASURES, work=work)
    kept = measure_source(sampler(), range(10), MEASURES, work=replace(work, keep=keep))
    names = [f"{number:08d}.png" for number in range(10)]
    assert sorted(path.name for path in keep.iterdir()) == names
    (keep / names[5]).unlink()
    again = measure_source(sampler(), range(10), MEASURES, work=replace(work, keep=keep))
    assert (keep / names[5]).is_file() and same(kept, again)


@pytest.mark.parametrize(("batch_size", "part"), [(1, 0), (7, 50), (64, 13), (3, 1)])
def test_rows_do_not_depend_on_batches_or_parts(batch_size: int, part: int, tmp_path: Path) -> None:
    work = MeasureOptions(batch_size=batch_size, part=part, folder=tmp_path)
    rows = measure_source(sampler(), range(50), MEASURES, work=work)
    assert same(rows, EXPECTED) and rows.values["colors"].shape == (50, 3)
    assert same(measure_source(sampler(), range(50), MEASURES, work=work), EXPECTED), (
        "read from the saved parts"
    )
    assert len(rows.prompts) == len(rows) == 50


def test_parts_cover_all_numbers_and_have_16_to_512_images() -> None:
    for count in (1, 15, 16, 1_000, 5_000, 30_000, 200_000):
        parts = MeasureOptions().parts(range(count))
        assert [n for part in parts for n in part] == list(range(count))
        assert max(map(len, parts)) <= 512 and (count < 32 or min(map(len, parts[:-1])) >= 16)
    assert [len(part) for part in MeasureOptions(part=4).parts(range(10, 20))] == [4, 4, 2]


def test_only_missing_parts_are_sampled(tmp_path: Path) -> None:
    work = MeasureOptions(part=10, folder=tmp_path)
    measure_source(sampler(), range(50), MEASURES, work=work)
    names = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert names == [f"{start:08}-{start + 10:08}.safetensors" for start in range(0, 50, 10)]
    (tmp_path / "parts" / names[2]).unlink()
    requested: list[range] = []
    inner = sampler()

    def draw(numbers: range, batch_size: int, sizes: Sequence[str]) -> Iterator[SampledBatch]:
        requested.append(numbers)
        return inner.draw(numbers, batch_size, sizes)

    again = measure_source(ImageSource(name="x", facts={}, draw=draw), range(50), MEASURES, work=work)
    assert same(again, EXPECTED) and requested == [range(20, 30)]


@pytest.mark.parametrize("ranks", [2, 3, 9])
def test_any_number_of_processes_gives_the_same_rows(ranks: int, tmp_path: Path) -> None:
    """With nine processes and seven parts, two processes have no part."""
    pairs = {"apart": PairMeasure(size=NATIVE, function=lambda a, b: (a != b).double().mean((1, 2, 3)))}

    def work(rank: int) -> None:
        process_group.init(long_waits=True)
        part = MeasureOptions(part=8, batch_size=rank + 3)
        rows = measure_source(sampler(), range(50), MEASURES, pairs=pairs, other=sampler(1), work=part)
        save_part(tmp_path / f"{rank}.safetensors", rows)
        process_group.barrier()
        process_group.finish()

    on_ranks(ranks, work)
    parts = [load_part(tmp_path / f"{rank}.safetensors") for rank in range(ranks)]
    for rows in parts:
        assert same(rows, parts[0])
        assert rows.prompts == EXPECTED.prompts and torch.equal(
            rows.values["level"], EXPECTED.values["level"]
        )
        assert rows.values["apart"].min() > 0.5


def test_killed_and_resumed_gives_the_same_rows(tmp_path: Path) -> None:
    """SIGKILL after 1, 3, 6 and 9 parts, before the next one is sampled; the last start finishes."""
    work = MeasureOptions(part=5, batch_size=5, folder=tmp_path)

    def killed_after(parts: int) -> None:
        def draw(numbers: range, batch_size: int, sizes: Sequence[str]) -> Iterator[SampledBatch]:
            if numbers.start >= 5 * parts:
                os.kill(os.getpid(), signal.SIGKILL)
            return sampler().draw(numbers, batch_size, sizes)

        measure_source(ImageSource(name="x", facts={}, draw=draw), range(50), MEASURES, work=work)

    for parts in (1, 3, 6, 9):
        child = fork(partial(killed_after, parts))
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        assert len(list((tmp_path / "parts").glob("0*"))) == parts
    rows = measure_source(sampler(), range(50), MEASURES, work=MeasureOptions(part=5, folder=tmp_path))
    assert same(rows, EXPECTED)


def test_the_message_of_an_interruption_says_what_is_saved(tmp_path: Path) -> None:
    def draw(numbers: range, batch_size: int, sizes: Sequence[str]) -> Iterator[SampledBatch]:
        for batch in sampler().draw(numbers, batch_size, sizes):
            if batch.first == 20:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    stopping = ImageSource(name="x", facts={}, draw=draw)
    work = MeasureOptions(part=10, batch_size=5, folder=tmp_path)
    with pytest.raises(
        Interrupted, match=rf"the measures of 20 of 50 images are safe in {tmp_path}; run the same"
    ):
        measure_source(stopping, range(50), MEASURES, work=work)
    with pytest.raises(Interrupted, match="nothing was kept, give --out a folder"):
        measure_source(stopping, range(50), MEASURES, work=MeasureOptions(part=10, batch_size=5))
    assert same(measure_source(sampler(), range(50), MEASURES, work=work), EXPECTED)


def test_a_work_folder_of_another_evaluation_is_refused(tmp_path: Path) -> None:
    facts = {"source": {"seed": 0}, "metrics": ("fid",)}
    open_work(tmp_path, facts)
    open_work(tmp_path, facts)
    with pytest.raises(
        UserError, match=r"holds parts of another evaluation: source.seed \(0 -> 1\); give the same"
    ):
        open_work(tmp_path, {**facts, "source": {"seed": 1}})


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    work = MeasureOptions(part=25, folder=tmp_path)
    measure_source(sampler(), range(50), MEASURES, work=work)
    file = sorted((tmp_path / "parts").iterdir())[1]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"^{file} is damaged .* delete it and run the same command again$"):
        measure_source(sampler(), range(50), MEASURES, work=work)


def test_saved_images_have_their_number_and_prompt(tmp_path: Path) -> None:
    measure_source(
        sampler(), range(7), {"c": MEASURES["colors"]}, work=MeasureOptions(keep=tmp_path / "kept")
    )
    files = sorted((tmp_path / "kept").iterdir())
    assert [file.name for file in files] == [f"{number:08}.png" for number in range(7)]
    with Image.open(files[4]) as image:
        assert image.info == {"prompt": "green", "index": "4"}
    again = image_source(open_images(tmp_path / "kept"))
    rows = measure_source(again, range(7), {"level": MEASURES["level"]})
    assert (
        torch.equal(rows.values["level"], EXPECTED.values["level"][:7])
        and rows.prompts == EXPECTED.prompts[:7]
    )


def test_the_error_for_rows_that_are_not_finite_names_the_image() -> None:
    def broken(images: Tensor, prompts: list[str]) -> Tensor:
        rows = images.float().mean((2, 3))
        rows[:, 1] = torch.where(rows[:, 0] == rows[:, 0].max(), torch.nan, rows[:, 1])
        return rows

    worst = int(EXPECTED.values["colors"][:16, 0].argmax())
    with pytest.raises(
        UserError, match=rf"^sampler: c of image {worst} \('{PROMPTS[worst % 3]}'\) is not finite"
    ):
        measure_source(sampler(), range(16), {"c": Measure(size="crop2-box", function=broken)})


def test_the_error_for_a_missing_prompt_names_the_image() -> None:
    source = batch_source("x", [(torch.zeros(3, 3, 2, 2, dtype=torch.uint8), ["a", "", "b"])])
    measures = {"clip_score": Measure(size=NATIVE, function=mean_level, needs_prompts=True)}
    with pytest.raises(UserError, match=r"^image 1 has no prompt, so it has no clip_score; give captions"):
        measure_source(source, range(3), measures)
    with pytest.raises(UserError, match="x gave 3 images for numbers 0 to 3"):
        measure_source(source, range(4), {"level": MEASURES["level"]})


def test_pairs_must_have_equal_sizes_and_prompts() -> None:
    pairs = {"shift": PairMeasure(size=NATIVE, function=lambda a, b: mean_level(b, []) - mean_level(a, []))}
    rows = measure_source(
        sampler(), range(20), MEASURES, pairs=pairs, other=sampler(shift=5), work=MeasureOptions(batch_size=3)
    )
    assert rows.values["shift"].min() > 4 and torch.equal(rows.values["level"], EXPECTED.values["level"][:20])
    with pytest.raises(
        UserError, match="sampler gives 4x4 pixels and sampler 6x6; pairs must be of one size"
    ):
        measure_source(sampler(), range(4), {}, pairs=pairs, other=sampler(side=6))
    images = torch.zeros(4, 3, 4, 4, dtype=torch.uint8)
    measure_source(sampler(), range(4), {}, pairs=pairs, other=batch_source("silent", [(images, [""] * 4)]))
    swapped = batch_source("swapped", [(images, ["red", "green", "red", "red"])])
    with pytest.raises(
        UserError, match="image 2 of sampler shows 'blue', of swapped 'red'; pairs are of one"
    ):
        measure_source(sampler(), range(4), {}, pairs=pairs, other=swapped, work=MeasureOptions(batch_size=2))


def test_prompts_do_not_go_to_numbered_images_in_the_order_of_text(tmp_path: Path) -> None:
    """10.png comes before 2.png, and the second prompt is that of the second line."""
    names = [f"{number}.png" for number in range(1, 11)]
    for name in names:
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    with pytest.raises(UserError, match=r"10\.png comes before 2\.png.*write the numbers with leading zeros"):
        image_source(open_images(tmp_path), names)
    for name in names:
        (tmp_path / name).rename(tmp_path / f"image-{name:>06}")
    assert image_source(open_images(tmp_path), names).count == 10


def test_changed_captions_are_another_source(tmp_path: Path) -> None:
    """An evaluation that resumes would else mix scores of the old captions with new ones."""
    folder = tmp_path / "files"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    (folder / "0.txt").write_text("a cube")
    facts = image_source(open_images(folder)).facts
    assert facts == image_source(open_images(folder)).facts
    with_prompts = image_source(open_images(folder), ["a cone"]).facts
    open_work(tmp_path / "work", {"source": facts})
    (folder / "0.txt").write_text("a sphere")
    with pytest.raises(UserError, match=r"parts of another evaluation: source.captions_sha256"):
        open_work(tmp_path / "work", {"source": image_source(open_images(folder)).facts})
    assert image_source(open_images(folder), ["a cone"]).facts == with_prompts, "they replace the captions"


def test_another_caption_column_is_another_source(tmp_path: Path) -> None:
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    row = {"image": {"bytes": png.getvalue(), "path": None}, "short": "a cube", "long": "a small red cube"}
    table = tmp_path / "images.parquet"
    pq.write_table(pa.Table.from_pylist([row]), table)
    short, long = (image_source(open_images(table, column)).facts for column in ("short", "long"))
    assert differing(short, long) and short == image_source(open_images(table, "short")).facts


def test_file_digests_and_conversions_are_recorded(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(5):
        mode = "L" if number == 3 else "RGB"
        Image.new(mode, (9, 7 + number), number * 10 if mode == "L" else (number * 10,) * 3).save(
            folder / f"{number}.png"
        )
    source = image_source(open_images(folder), ["a", "b", "c", "d", "e"])
    measures = {"colors": MEASURES["colors"]}
    rows = measure_source(
        source, range(5), measures, work=MeasureOptions(part=2, folder=tmp_path / "work", batch_size=1)
    )
    assert rows.values[FILE_SHA256].shape == (5, 32) and rows.converted == Counter(gray=1)
    assert rows.prompts == ["a", "b", "c", "d", "e"]
    again = measure_source(source, range(5), measures, work=MeasureOptions(part=2, folder=tmp_path / "work"))
    assert same(rows, again), "the counts of conversions are saved too"
    for count in (2, 6):  # of six prompts, nothing says which five the images show
        with pytest.raises(
            UserError, match=f"holds 5 images, and there are {count} prompts; give one for each"
        ):
            image_source(open_images(folder), ["a", "b", "c", "d", "e", "f"][:count])
    assert json.dumps(source.facts) and source.facts["images"] == 5
