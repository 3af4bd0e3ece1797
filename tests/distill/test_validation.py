"""distill.training.validation and distill.training.preview: results do not depend on batch size or ranks."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from d2g.core.distributed import process_group
from d2g.core.errors import SettingError
from d2g.core.seeds import noise
from d2g.diffusion.latents import decode, to_uint8
from d2g.diffusion.pretrained import load_conditioner, load_vae
from distill.models.ema import EMA
from distill.models.student import student_from_teacher
from distill.monitoring.best_point import best_validation, comparable_reports, record_measure
from distill.training.preview import decode_images, preview, preview_latents, preview_statistics, preview_text
from distill.training.validation import held_out, measure, psnr_from_mse, sample_across_ranks, use_ema_weights
from forks import reserve_port
from jobs import make_pairs
from latent_lpips.distance import ELatentLPIPS
from latent_lpips.weights import load_lpips
from pairgen.store.reader import PairReader

ROWS = range(4, 11)


@pytest.fixture(scope="module")
def reader(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> PairReader:
    return PairReader(make_pairs(teacher, tmp_path_factory.mktemp("validate")))


@pytest.fixture(scope="module")
def distance(teacher: Path) -> ELatentLPIPS:
    return ELatentLPIPS(load_lpips(str(teacher / "latent_lpips"), 4), "bgco", draws=2)


@pytest.fixture(scope="module")
def draw(teacher: Path) -> Any:
    student, text = student_from_teacher(str(teacher)), load_conditioner(str(teacher))
    return lambda noise, prompts, prior: student(noise, text.encode(prompts))


def perfect_student(reader: PairReader) -> Any:
    """A student that returns the stored latents."""
    stored = reader.read(range(len(reader)))

    def draw(noise: Tensor, prompts: Sequence[str], prior: None) -> Tensor:
        rows = [next(i for i, z in enumerate(stored.noise) if torch.equal(z, row)) for row in noise]
        return stored.latents[rows]

    return draw


def test_the_last_pairs_are_held_out() -> None:
    assert held_out(100, 10) == range(90, 100) and held_out(100, 0) == range(100, 100)
    with pytest.raises(SettingError, match=r"train\.validate_pairs is 12 of 12 pairs; expected fewer"):
        held_out(12, 12)


def test_a_perfect_student_has_no_distance(reader: PairReader, distance: ELatentLPIPS) -> None:
    numbers = measure(perfect_student(reader), reader, ROWS, distance, batch_size=3)
    assert numbers == {"val/e_latent_lpips": pytest.approx(0, abs=1e-7), "val/psnr": pytest.approx(200)}


def test_damaged_held_out_pairs_are_named_when_others_replace_them(
    teacher: Path, tmp_path: Path, draw: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = make_pairs(teacher, tmp_path)
    (pairs / "shards" / "pairs-00002.h5").write_bytes(b"damage")
    reader = PairReader(pairs, skip_bad=True)
    measure(draw, reader, held_out(12, 2), None, batch_size=1)
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "pairs-00002.h5: truncated" in message and "its held-out pairs are replaced" in message


def test_psnr_matches_its_definition(reader: PairReader, distance: ELatentLPIPS) -> None:
    target = reader.read(ROWS).latents
    numbers = measure(lambda z, p, prior: z, reader, ROWS, None, batch_size=4)
    noise, peak = reader.read(ROWS).noise, float(target.max() - target.min())
    square = (noise - target).square().mean((1, 2, 3))
    expected = sum(10 * math.log10(peak**2 / float(s)) for s in square) / len(ROWS)
    assert numbers == {"val/psnr": pytest.approx(expected, rel=1e-5)}
    assert float(psnr_from_mse(torch.tensor(0.01), 1.0)) == pytest.approx(20)


def test_measurements_do_not_depend_on_the_batch_size(
    reader: PairReader, distance: ELatentLPIPS, draw: Any
) -> None:
    expected = measure(draw, reader, ROWS, distance, batch_size=7)
    for size in (1, 2, 3, 100):
        assert measure(draw, reader, ROWS, distance, batch_size=size) == pytest.approx(expected, rel=1e-5)
    torch.manual_seed(5)
    assert measure(draw, reader, ROWS, distance, batch_size=7) == expected, (
        "the global generator has no effect"
    )
    assert measure(draw, reader, ROWS, distance, batch_size=7, seed=1) != expected
    single_rows = [measure(draw, reader, range(i, i + 1), distance, batch_size=1) for i in ROWS]
    mean = sum(values["val/e_latent_lpips"] for values in single_rows) / len(ROWS)
    assert mean == pytest.approx(expected["val/e_latent_lpips"], rel=1e-5), (
        "augmentations depend on the row only"
    )


PROMPTS = ["a", "b", "c", "d", "e"]


def add_prompt_code(noise: Tensor, prompts: Sequence[str]) -> Tensor:
    return noise + torch.tensor([float(ord(prompt)) for prompt in prompts]).view(-1, 1, 1, 1)


def _measure_on_rank(rank: int, port: int, folder: str, teacher: str, out: str) -> None:
    import os

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3", "RANK": str(rank)}
    torch.set_num_threads(1)
    process_group.init()
    calls = []

    def draw(noise: Tensor, prompts: Sequence[str], prior: None) -> Tensor:
        calls.append(len(noise))
        return noise * 0.5

    metric = ELatentLPIPS(load_lpips(str(Path(teacher) / "latent_lpips"), 4), "bgco", draws=2)
    numbers = measure(draw, PairReader(folder), ROWS, metric, batch_size=2)
    samples = sample_across_ranks(add_prompt_code, (4, 2, 2), 5, PROMPTS, batch_size=2)
    torch.save((numbers, calls, samples), f"{out}/{rank}.pt")
    process_group.finish()


def test_ranks_share_the_rows_and_sample_equally_often(
    teacher: Path, reader: PairReader, distance: ELatentLPIPS, tmp_path: Path
) -> None:
    """Seven rows on three ranks. With FSDP2 a rank with fewer batches would make the others wait forever."""
    torch.multiprocessing.start_processes(
        _measure_on_rank,
        (reserve_port(), str(reader.folder), str(teacher), str(tmp_path)),
        nprocs=3,
        start_method="fork",
    )
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    single_process = measure(lambda z, p, prior: z * 0.5, reader, ROWS, distance, batch_size=2)
    assert all(values == pytest.approx(single_process, rel=1e-6) for values, *_ in ranks)
    assert ranks[0][0] == ranks[1][0] == ranks[2][0]
    assert [calls for _, calls, _ in ranks] == [[2, 1]] * 3
    expected = torch.cat(
        [add_prompt_code(noise(5, [i], (4, 2, 2)), [text]) for i, text in enumerate(PROMPTS)]
    )
    assert all(torch.equal(samples, expected) for *_, samples in ranks)


def test_ema_weights_are_swapped_in_and_out_exactly() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    ema = EMA(module, 0.9)
    with torch.no_grad():
        module[0].weight.add_(1)
        module[1].num_batches_tracked.add_(7)
    own = {k: v.clone() for k, v in module.state_dict().items()}
    average = {k: v.clone() for k, v in ema.tensors.items()}
    with use_ema_weights(module, ema.tensors):
        assert all(torch.equal(v, average[k]) for k, v in module.state_dict().items())
    for _ in range(2):
        assert all(torch.equal(v, own[k]) for k, v in module.state_dict().items())
        assert all(torch.equal(v, average[k]) for k, v in ema.tensors.items())
        with pytest.raises(ZeroDivisionError), use_ema_weights(module, ema.tensors):
            _ = 1 / 0


def test_best_validation_among_saved_points() -> None:
    lines = [
        {"nimg": 10, "val/e_latent_lpips": 0.5, "val/psnr": 9.0},
        {"nimg": 20, "val/e_latent_lpips": 0.3, "val/psnr": 8.0},
        {"nimg": 30, "loss/g": 1.0},
        {"nimg": 40, "val/e_latent_lpips": 0.3, "val/psnr": 9.5},
    ]
    assert best_validation(lines, {10, 20, 30, 40}) == (20, "val/e_latent_lpips", 0.3), (
        "the earliest point wins a tie"
    )
    assert best_validation(lines, {10, 40}) == (40, "val/e_latent_lpips", 0.3)
    assert best_validation(lines, {30}) is None and best_validation([], {10}) is None
    psnr_only = [{k: v for k, v in line.items() if k != "val/e_latent_lpips"} for line in lines]
    assert best_validation(psnr_only, {10, 20, 40}) == (40, "val/psnr", 9.5), "higher PSNR is better"
    fid = [{**line, "val/fid": line["nimg"]} for line in lines]
    assert best_validation(fid, {10, 20, 40}) == (10, "val/fid", 10), "FID takes precedence"


def test_validations_before_a_change_of_the_measure_do_not_count(tmp_path: Path) -> None:
    lines = [{"nimg": n, "val/fid": float(n)} for n in (10, 20, 30)] + [{"nimg": 10, "loss/g": 1.0}]

    def counted() -> list[float]:
        return [line["nimg"] for line in comparable_reports(tmp_path, lines) if "val/fid" in line]

    assert comparable_reports(tmp_path, lines) == lines, "no record: of an older run"
    few, many = {"metric": "val/fid", "images": 4}, {"metric": "val/fid", "images": 8}
    assert record_measure(tmp_path, few, 10) == [] and counted() == [10, 20, 30]
    assert record_measure(tmp_path, many, 30) == ["images (4 -> 8)"] and counted() == [30]
    assert record_measure(tmp_path, many, 40) == [] and counted() == [30]
    assert {"nimg": 10, "loss/g": 1.0} in comparable_reports(tmp_path, lines), "losses stay"
    # The run has gone back to an earlier checkpoint.
    assert record_measure(tmp_path, many, 20) == [] and counted() == [20, 30]


# Previews.


def test_preview_shows_the_teacher_above_the_student(teacher: Path, reader: PairReader, draw: Any) -> None:
    vae, pairs = load_vae(str(teacher)), reader.read(range(3))
    student, stored = preview_latents(draw, pairs, "cpu", batch_size=2)
    assert torch.equal(stored, pairs.latents)
    picture = preview(decode_images(vae, student, 2), decode_images(vae, stored, 2))
    assert picture.shape == (3, 2 * 18, 3 * 18) and picture.dtype == torch.uint8
    for row, latents in enumerate((stored, student)):
        with torch.no_grad():
            images = to_uint8(decode(vae, latents))
        for column in range(3):
            cell = picture[:, 18 * row : 18 * row + 16, 18 * column : 18 * column + 16]
            assert (cell.int() - images[column].int()).abs().max() <= 1
    assert (
        preview_text(pairs.prompts, 5)["nimg"] == "5"
        and tiny.CAPTIONS[0] in preview_text(pairs.prompts, 5)["prompts"]
    )


def test_preview_of_more_than_eight_pairs(teacher: Path) -> None:
    images = decode_images(load_vae(str(teacher)), torch.zeros(10, 4, 4, 4))
    picture = preview(images, images)
    assert picture.shape == (3, 4 * 18, 8 * 18)
    assert (picture[:, 2 * 18 :, 2 * 18 :] == 255).all() and (picture[:, 36:52, :16] != 255).any()


def test_preview_statistics_show_contrast_color_and_grid() -> None:
    teacher = torch.randint(
        64, 192, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    same = preview_statistics(teacher, teacher, 8)
    assert same == pytest.approx({"preview/contrast": 1.0, "preview/color": 0.0, "preview/grid": 1.0})
    assert "preview/grid" not in preview_statistics(teacher, teacher, 1)

    strong = ((teacher.double() - 128) * 1.3 + 128).round().to(torch.uint8)
    assert preview_statistics(strong, teacher, 8)["preview/contrast"] == pytest.approx(1.3, rel=0.01)
    red = teacher.clone()
    red[:, 0] += 51
    assert preview_statistics(red, teacher, 8)["preview/color"] == pytest.approx(0.2)

    # A checkerboard adds steps only at the borders of its cells.
    cells = (torch.arange(32) // 8 % 2)[:, None] ^ (torch.arange(32) // 8 % 2)[None]
    assert preview_statistics(teacher + 60 * cells.to(torch.uint8), teacher, 8)["preview/grid"] > 1.3
    shifted = torch.roll(cells, (4, 4), (0, 1)).to(torch.uint8)
    assert preview_statistics(teacher + 60 * shifted, teacher, 8)["preview/grid"] < 1.0
