"""teacher_training.verdict: noise teachers are called not trained, and scores are of the saved weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from d2g.core.errors import UserError
from d2g.core.seeds import noise
from d2g.diffusion import pretrained
from d2g.diffusion.latents import encode, from_uint8
from d2g.diffusion.teacher import load_teacher
from own_pictures import CONFIG, image_folder
from teacher_training.config import FitConfig
from teacher_training.data import captioned_images
from teacher_training.train import train_teacher
from teacher_training.verdict import (
    TeacherNumbers,
    denoising_loss,
    gaussian_loss,
    measure_teacher,
    roughness,
    spread_rows,
    verdict_line,
)

STEPS, BATCH = 100, 4
STAGES = ("vae", "unet")


@pytest.fixture(scope="module")
def noise_teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A teacher trained for 100 steps with the average of the user who got noise, and its summary."""
    folder = tmp_path_factory.mktemp("noise")
    (folder / "data").mkdir()
    image_folder(folder / "data")
    fit = FitConfig(images=BATCH * STEPS, batch_size=BATCH, lr=1.5e-3, ema=0.9993)
    config = replace(CONFIG, data=str(folder / "data"), unet=replace(CONFIG.unet, fit=fit))
    return folder / "teacher", train_teacher(config, folder / "teacher", STAGES)


def test_a_hundred_steps_are_not_trained(noise_teacher: tuple[Path, Any], d2g: Any) -> None:
    out, summary = noise_teacher
    assert summary.trained is False and summary.verdict.startswith("this teacher is not trained: ")
    verdict = json.loads((out / "training" / "verdict.json").read_text())
    numbers = verdict["numbers"]
    assert f"{numbers['loss']:.3f}" in summary.verdict and f"{numbers['psnr']:.1f} dB" in summary.verdict
    # `teacher info` says the same, without measuring again.
    info = d2g("teacher", "info", out, "--json").json
    assert info["trained"] is False and info["verdict"] == summary.verdict and info["numbers"] == numbers
    # And whoever makes pairs with it is warned.
    words = ("pairs", "generate", "--teacher", out, "--prompts", out.parent / "data", "--dry-run")
    assert f"{out}: {summary.verdict}" in d2g(*words).stderr


def test_a_dry_run_measures_no_verdict(noise_teacher: tuple[Path, Any], d2g: Any, tmp_path: Path) -> None:
    """`pairs generate` does not repeat a verdict on other weights, and does not measure a new one."""
    out, file = shutil.copytree(noise_teacher[0], tmp_path / "teacher"), Path("training/verdict.json")
    changed = json.dumps(json.loads((out / file).read_text()) | {"weights_sha256": "0" * 64})
    (out / file).write_text(changed)
    data = noise_teacher[0].parent / "data"
    words = ("pairs", "generate", "--teacher", out, "--prompts", data, "--dry-run")
    result = d2g(*words)
    assert result.code == 0 and "not trained" not in result.stderr and (out / file).read_text() == changed
    # A damaged file is named.
    (out / file).write_text("{}")
    result = d2g(*words)
    assert result.code == 1 and "verdict.json is damaged" in result.error and "delete" in result.error


def test_the_scored_weights_are_the_saved_weights(noise_teacher: tuple[Path, Any]) -> None:
    """The scores can be measured again with the weights in OUT, which are the averaged ones."""
    out, summary = noise_teacher
    images, captions = captioned_images(str(out.parent / "data"), 16, 40, 0, "{}")
    rows, name = spread_rows(len(images)), str(out)
    latents = encode(pretrained.load_vae(name), from_uint8(images[rows]))
    teacher = load_teacher(name)
    unet = teacher.network
    loss = denoising_loss(teacher, teacher.conditioner.encode([captions[row] for row in rows]), latents)
    assert summary.scores["unet"]["loss"] == pytest.approx(loss, rel=1e-5)
    numbers = measure_teacher(out, images, captions)
    assert numbers.loss == pytest.approx(loss, rel=1e-5)
    assert summary.scores["vae"]["psnr"] == pytest.approx(numbers.psnr, rel=1e-5)
    # The weights are the average of the last checkpoint, not the raw ones.
    checkpoint = out / "training" / "unet" / "checkpoints" / f"{BATCH * STEPS:09d}"
    from safetensors.torch import load_file

    average, raw = (load_file(checkpoint / f"{kind}.safetensors") for kind in ("ema", "model"))
    for key, value in unet.state_dict().items():
        assert torch.equal(value, average[f"unet.{key}"]), key
    assert not torch.equal(average["unet.conv_in.weight"], raw["unet.conv_in.weight"])


def test_the_report_and_the_previews_are_written(noise_teacher: tuple[Path, Any]) -> None:
    out, summary = noise_teacher
    page = Path(summary.report).read_text()
    assert "this teacher is not trained" in page and page.count("<img") == 2 * 2 * 16
    assert "Denoiser: losses" in page and "Reconstruction PSNR, dB" in page
    names = sorted(path.name for path in (out / "previews").iterdir())
    assert names == ["reconstructions-000000064.png", "samples-000000400.png"]


def test_a_changed_teacher_gets_another_verdict(
    noise_teacher: tuple[Path, Any], tmp_path: Path, d2g: Any
) -> None:
    """The recorded verdict belongs to weights: others are measured again, on the pictures in training/."""
    out = shutil.copytree(noise_teacher[0], tmp_path / "teacher")
    unet = pretrained.load_unet(str(out))
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(0.5)
    pretrained.save_component(unet, out / "unet")
    before = json.loads((out / "training" / "verdict.json").read_text())
    info = d2g("teacher", "info", out, "--json").json
    assert info["trained"] is False and info["numbers"]["loss"] != before["numbers"]["loss"]


def test_a_trained_teacher_is_called_trained() -> None:
    """The shipped miniature, on the scenes that it was trained on."""
    from miniature.sampling import render_dataset

    images, captions = render_dataset(64, 1, "train")
    numbers = measure_teacher(pretrained.SHIPPED["miniature"] / "teacher", images, captions)
    assert numbers.faults() == [] and verdict_line(numbers).startswith("this teacher is trained: loss 0.0")
    assert numbers.loss < 0.2 * numbers.loss_gaussian < 0.2 * numbers.loss_zero
    assert numbers.loss_untrained > 0.9 and numbers.loss_zero == pytest.approx(1, abs=0.02)


def test_the_loss_without_structure_has_a_closed_form(teacher: Path) -> None:
    """On latents that are white noise the best denoiser's loss is the mean of alpha_t^2."""
    schedule = pretrained.load_schedule(str(teacher))
    latents = noise(1, range(4000), (4, 4, 4))
    best, zero = gaussian_loss(latents, schedule)
    expected = float(schedule.alphas_cumprod.mean())
    assert best == pytest.approx(expected, rel=0.01) and zero == pytest.approx(1, rel=0.01)


def test_roughness_of_noise_is_two_and_of_a_ramp_is_small() -> None:
    assert roughness(noise(0, range(500), (4, 8, 8))) == pytest.approx(2, abs=0.02)
    ramp = torch.linspace(-1, 1, 8).expand(1, 1, 8, 8)
    assert roughness(ramp) < 0.2


GOOD = TeacherNumbers(
    latents_std=1.0,
    samples_std=0.9,
    latents_roughness=0.8,
    samples_roughness=0.9,
    loss=0.1,
    loss_untrained=1.1,
    loss_zero=1.0,
    loss_gaussian=0.35,
    psnr=25.0,
    psnr_mean=12.0,
)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"psnr": 13.0}, "reconstructions have a PSNR of 13.0 dB, the mean picture alone has 12.0 dB"),
        ({"latents_std": 0.1, "samples_std": 0.1}, "latents have standard deviation 0.1, expected about 1"),
        ({"loss": 0.3}, "the loss is 0.300; a network without any structure reaches 0.350"),
        ({"loss": float("nan")}, "the loss is nan"),
        ({"samples_std": 14.0}, "samples have standard deviation 14, real latents 1"),
        ({"samples_roughness": 1.9}, "samples look like noise: roughness 1.90, real latents 0.80"),
    ],
)
def test_each_fault_is_named_with_its_numbers(wrong: dict[str, float], words: str) -> None:
    assert GOOD.faults() == []
    bad = replace(GOOD, **wrong)
    assert len(bad.faults()) == 1 and words in verdict_line(bad) and "not trained" in verdict_line(bad)


def test_an_unfinished_teacher_is_refused_everywhere(
    noise_teacher: tuple[Path, Any], tmp_path: Path, d2g: Any
) -> None:
    """One line says how to finish it, also where an earlier version has left a complete pipeline."""
    out = shutil.copytree(noise_teacher[0], tmp_path / "teacher")
    (out / "training" / "unet" / "scores.json").unlink()
    (tmp_path / "p.txt").write_text("a red disc")
    commands = (
        ("teacher", "info", out),
        ("pairs", "generate", "--teacher", out, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "pairs"),
        ("eval", "run", "--teacher", out, "--prompts", tmp_path / "p.txt", "--metrics", "fid"),
    )
    for words in commands:
        error = d2g(*words).error
        assert "its training is not finished; run the same `d2g teacher train` command again" in error, words
    (out / "training" / "command.txt").write_text("d2g teacher train --data my --out t\n")
    with pytest.raises(UserError, match=r"finish it with `d2g teacher train --data my --out t`"):
        pretrained.load_unet(str(out))
