"""The GAN stage of U-Nets without text and of EDM, with pairs and without: resume, processes, refusals."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

import tiny
import tiny_teachers
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import Stream, generator, noise
from d2g.diffusion import pretrained
from d2g.diffusion.latents import encode
from distill.config.export import ExportConfig
from distill.config.run import DistillConfig
from distill.export.export import export
from distill.sampling import load_student
from distill.training.real_images import CaptionKind, RealImages
from distill.training.real_rows import ImageRows
from distill.training.train import train
from jobs import d2g, d2g_ranks, distill_arguments, distill_config, succeed
from pairgen.generate import generate_pairs
from pairgen.store.reader import PairReader
from runs import assert_resumes_exactly, losses, state_at

KINDS = ("unet2d", "edm", "ldm")
GAN = ("regression.losses=mse:1", "gan.r1_interval=2", "gan.optim.lr=1e-3", "optim.lr=1e-3")
WITHOUT_PAIRS = (
    "regression.losses=[]",
    "gan.real_fraction=1",
    "gan.z_conditioning=false",
    "gan.mix_z=0",
    "gan.r1_interval=2",
    "gan.optim.lr=1e-3",
    "optim.lr=1e-3",
)
CLASSES = (0, 5, 2, 2, 4, 1, 3)


@pytest.fixture(
    scope="module",
    params=[
        "unet2d",
        pytest.param("edm", marks=pytest.mark.slow),
        pytest.param("ldm", marks=(pytest.mark.slow, pytest.mark.long)),
    ],
)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    for kind in (*KINDS, "sd"):
        tiny_teachers.save_kind(kind, root / kind)
    return {kind: root / kind for kind in (*KINDS, "sd")}


@pytest.fixture(scope="module")
def stores(teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twelve pairs of every kind but text."""
    root = tmp_path_factory.mktemp("pairs")
    for kind in KINDS:
        solver: Any = "euler" if kind == "edm" else "ddim"
        settings = tiny.pair_config(str(teachers[kind]), "", solver=solver, guidance=1.0)
        generate_pairs(settings, root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven images of 16 px in the folders of their classes."""
    root = tmp_path_factory.mktemp("images")
    for number, label in enumerate(CLASSES):
        (root / str(label)).mkdir(exist_ok=True)
        picture(number).save(root / str(label) / f"{number}.png")
    return root


def picture(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))


def mixing(kind: str) -> str:
    return f"gan.mix_fraction={0 if kind == 'ldm' else 0.5}"


@pytest.mark.slow
def test_the_gan_stage_resumes_bit_for_bit(
    kind: str, teachers: dict[str, Path], stores: dict[str, Path], tmp_path: Path
) -> None:
    settings = (*GAN, mixing(kind))
    config, shorter = (
        distill_config(
            teachers[kind], stores[kind], *settings, f"train.images={n}", stage="gan", init="teacher"
        )
        for n in (12, 4)
    )
    assert_resumes_exactly(config, shorter, tmp_path)
    start, end = state_at(tmp_path / "twice", 4), state_at(tmp_path / "once", 12)
    assert any(name.startswith("discriminator.projections") for name in end) == (kind != "ldm")
    moved = [name for name in end if not torch.equal(start[name], end[name])]
    assert len(moved) > 0.8 * len(end)
    # What it learned is drawn and exported as any student's.
    run = tmp_path / "once"
    assert export(ExportConfig(student=str(run), dtype="fp32"), tmp_path / "out")["parity_max_abs_err"] == 0.0
    prompts = ["", ""] if kind == "ldm" else ["5", "0"]
    assert load_student(str(run))(prompts).dtype == torch.uint8


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_train_like_one(
    teachers: dict[str, Path], stores: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    """With pairs of an EDM, and without pairs with classes."""
    cases = {
        "pairs": distill_config(teachers["edm"], stores["edm"], stage="gan", init="teacher"),
        "images": distill_config(teachers["unet2d"], Path(), stage="gan", init="teacher"),
    }
    for name, config in cases.items():
        settings = [*(GAN if name == "pairs" else WITHOUT_PAIRS), mixing("edm"), "train.images=12"]
        settings += [] if name == "pairs" else [f"gan.real={images}"]
        succeed(d2g(arguments(config, tmp_path / name / "one", *settings), tmp_path / "log"))
        curves = dict[str, list[float]]()
        for engine in ("ddp", "fsdp"):
            command = arguments(config, tmp_path / name / engine, *settings, f"engine.parallel={engine}")
            succeed(*d2g_ranks(command, tmp_path / f"log-{engine}"))
        for run in ("one", "ddp", "fsdp"):
            lines = losses(tmp_path / name / run)
            curves[run] = [line[key] for line in lines for key in ("loss/d", "loss/g_gan", "loss/g")]
        assert len(curves["one"]) == 9
        assert curves["ddp"] == pytest.approx(curves["one"], rel=1e-4)
        assert curves["fsdp"] == pytest.approx(curves["one"], rel=1e-4)


def arguments(config: DistillConfig, out: Path, *settings: str) -> list[str]:
    """The command line of a config; without --pairs if it has none."""
    command = distill_arguments(config, out, *settings)
    return command if config.pairs != "." else [*command[:2], *command[4:]]


# Without pairs.


def without_pairs(teacher: Path, images: Path, *settings: str) -> DistillConfig:
    config = distill_config(teacher, Path(), stage="gan", init="teacher")
    more = ("pairs=", f"gan.real={images}", *WITHOUT_PAIRS, *settings)
    return distill_config(teacher, Path(config.pairs), *more, stage="gan", init="teacher")


def captioned(images: Path, folder: Path) -> Path:
    """The same images with captions for a teacher of text."""
    folder.mkdir()
    for number, file in enumerate(sorted(images.rglob("*.png"))):
        (folder / f"{number}.png").write_bytes(file.read_bytes())
        (folder / f"{number}.txt").write_text(tiny.CAPTIONS[number % len(tiny.CAPTIONS)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["unet2d", "edm", *(pytest.param(name, marks=pytest.mark.long) for name in ("ldm", "sd"))]
)
def test_runs_without_pairs_resume_bit_for_bit(
    name: str, teachers: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    """Also with another number of loader processes; previews show the real images."""
    source = captioned(images, tmp_path / "captioned") if name == "sd" else images
    settings = (mixing(name), "train.preview_prompts=2")
    config = without_pairs(teachers[name], source, *settings, "train.images=12")
    shorter = without_pairs(teachers[name], source, *settings, "train.images=4", "train.loader_workers=1")
    assert_resumes_exactly(config, shorter, tmp_path)
    last = losses(tmp_path / "once")[-1]
    assert {"loss/d", "loss/g_gan", "loss/g", "latent/spread"} <= last.keys()
    assert not any(key in last for key in ("loss/mse", "loss/e_latent_lpips"))
    (preview, *_) = (tmp_path / "once" / "previews").glob("*.png")
    with Image.open(preview) as drawn:
        assert drawn.info["rows"] == "real, student"
    written = json.loads((tmp_path / "once" / "config.json").read_text())
    assert written["pairs"] == "" and written["inputs"]["images"] == 7


def test_rows_are_images_with_their_classes_and_fresh_noise(teachers: dict[str, Path], images: Path) -> None:
    """Row n of the run: the n-th image of the random order, its class, and noise number n, in any split."""
    config = without_pairs(teachers["unet2d"], images)
    kind, shape = CaptionKind("label", 6), (3, 8, 8)
    rows = ImageRows(config.gan, config.teacher, 3, shape, kind, torch.device("cpu"))
    batches = rows.batches(4, 0, 0)
    first, second = next(batches), next(batches)
    source = RealImages(str(images), (8, 8), kind=kind)
    pixels, captions = source.batch(3, 0, 8)
    assert first.prompts + second.prompts == captions
    torch.testing.assert_close(torch.cat([first.latents, second.latents]), pixels)
    z = noise(generator(3, Stream.REAL_IMAGE_NOISE).initial_seed(), range(8), shape)
    assert torch.equal(torch.cat([first.noise, second.noise]), z)
    resumed = next(rows.batches(4, 4, 0))
    assert torch.equal(resumed.latents, second.latents) and torch.equal(resumed.noise, second.noise)
    assert sorted(captions[:7]) == sorted(map(str, CLASSES))


def test_latents_of_images_are_encoded(teachers: dict[str, Path], images: Path) -> None:
    config = without_pairs(teachers["ldm"], images, "gan.mix_fraction=0")
    rows = ImageRows(config.gan, config.teacher, 0, (3, 4, 4), CaptionKind("none"), torch.device("cpu"))
    batch = next(rows.batches(2, 0, 0))
    pixels, _ = RealImages(str(images), (16, 16), kind=CaptionKind("none")).batch(0, 0, 2)
    expected = encode(pretrained.load_vae(config.teacher), pixels)
    torch.testing.assert_close(batch.latents, expected)
    assert batch.prompts == ["", ""]


def save_source(form: str, folder: Path) -> str:
    """Seven images with their classes, in each form that holds classes."""
    folder.mkdir()
    if form == "parquet":
        cells = [{"bytes": png(n), "path": None} for n in range(7)]
        pq.write_table(pa.table({"img": cells, "label": list(CLASSES)}), folder / "all.parquet")
        return str(folder)
    for number, label in enumerate(CLASSES):
        place = folder / f"class {label}" if form == "names" else folder
        place.mkdir(exist_ok=True)
        (place / f"{number}.png").write_bytes(png(number))
        if form == "txt":
            (place / f"{number}.txt").write_text(f"{label}\n")
    lines = [{"file_name": f"{n}.png", "label": label} for n, label in enumerate(CLASSES)]
    if form == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    if form == "csv":
        rows = "\n".join(f"{line['file_name']},{line['label']}" for line in lines)
        (folder / "metadata.csv").write_text(f"file_name,label\n{rows}\n")
    return str(folder)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["txt", "jsonl", "csv", "names", "parquet"])
def test_classes_of_every_form_of_source(form: str, tmp_path: Path) -> None:
    source = RealImages(save_source(form, tmp_path / "source"), (16, 16), kind=CaptionKind("label", 6))
    pixels, captions = source.read(range(7))
    for number, label in enumerate(CLASSES):
        (row,) = (i for i, image in enumerate(pixels) if torch.allclose(image, png_pixels(number)))
        assert captions[row] == str(label)


def png_pixels(number: int) -> Tensor:
    return torch.from_numpy(np.array(picture(number))).permute(2, 0, 1).float() / 127.5 - 1


@pytest.mark.parametrize("form", ["txt", "jsonl", "csv", "parquet"])
def test_classes_out_of_range_are_refused_at_the_start(form: str, tmp_path: Path) -> None:
    source = save_source(form, tmp_path / "source")
    with pytest.raises(UserError, match=r": class '5'; expected a class number, 0 to 4$"):
        RealImages(source, (16, 16), kind=CaptionKind("label", 5))


def test_folders_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    source = save_source("names", tmp_path / "source")
    with pytest.raises(UserError, match=r"has 6 folders, but the teacher has 5 classes; name the folders"):
        RealImages(source, (16, 16), kind=CaptionKind("label", 5))
    (tmp_path / "source" / "7.png").write_bytes(png(7))
    with pytest.raises(UserError, match=r"7.png has no class; write it to the column label"):
        RealImages(source, (16, 16), kind=CaptionKind("label", 6))


def test_pairs_with_real_images_alone(
    teachers: dict[str, Path], stores: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    """gan.real_fraction=1 with pairs: regression on the pairs, a discriminator of images."""
    settings = (*GAN, "gan.mix_fraction=0", "gan.z_conditioning=false", "train.images=4")
    real = (f"gan.real={images}", "gan.real_fraction=1")
    for run, more in (("pairs", ()), ("images", real)):
        config = distill_config(teachers["edm"], stores["edm"], *settings, *more, stage="gan", init="teacher")
        train(config, tmp_path / run)
    plain, with_images = (losses(tmp_path / run)[0] for run in ("pairs", "images"))
    assert plain["loss/mse"] == with_images["loss/mse"] and plain["loss/d"] != with_images["loss/d"]
    assert len(PairReader(str(stores["edm"]))) == 12


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "regression": (
        ("regression.losses=mse:1",),
        "pairs is not set, but the regression loss mse compares .*; give --pairs, or .*set regression.losses",
    ),
    "images": (("gan.real=", "gan.real_fraction=0"), "pairs is not set; .*set gan.real=FOLDER, gan.real_fr"),
    "folder": (("gan.real=",), r"gan\.real is not set; give the folder of real images"),
    "held out": (
        ("train.validate_pairs=2", "train.validate_images=8"),
        r"train\.validate_pairs is 2, but there are no pairs",
    ),
    "interval": (("train.validate_images=8",), "validate_images needs pairs, or --validate PROTOCOL"),
    "guidance": (("student.guidance_conditioning=true",), "without pairs there are no guidance scales"),
    "batch": (("train.batch_size=8",), r"train\.batch_size is 8, but .* holds 7 images; add images"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_need_pairs_are_refused(
    case: str, teachers: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    settings, message = REFUSED[case]
    with pytest.raises((SettingError, UserError), match=message) as error:
        train(without_pairs(teachers["unet2d"], images, *settings), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "checkpoints").exists()


def test_an_unconditional_teacher_takes_no_text_and_no_mixing(
    teachers: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=r"mix_fraction is 0\.25, but .* is unconditional"):
        train(without_pairs(teachers["ldm"], images), tmp_path / "run")
    captions = without_pairs(teachers["ldm"], images, "gan.mix_fraction=0", "gan.real_column=text")
    with pytest.raises(SettingError, match=r"real_column is 'text', but the teacher is unconditional"):
        train(captions, tmp_path / "run")


def test_a_noise_input_contradicts_real_images_alone() -> None:
    for settings, message in (
        (("gan.z_conditioning=true",), "no real image belongs to its noise.*set gan.z_conditioning=false"),
        (("gan.mix_z=1",), "mix_z is 1, but z_conditioning is false: .*; set mix_z=0"),
    ):
        with pytest.raises(SettingError, match=message):
            without_pairs(Path("teacher"), Path("images"), *settings)


def test_a_resumed_run_needs_the_same_images(teachers: dict[str, Path], images: Path, tmp_path: Path) -> None:
    source = captioned(images, tmp_path / "captioned")
    settings = ("gan.mix_fraction=0", "train.images=4")
    train(without_pairs(teachers["ldm"], source, *settings), tmp_path / "run")
    (source / "0.png").unlink()
    with pytest.raises(UserError, match=r"holds 6 images, but 7 when the run in .* started; restore them"):
        train(without_pairs(teachers["ldm"], source, *settings, "train.images=8"), tmp_path / "run")
