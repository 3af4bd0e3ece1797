"""distill.sampling and distill.export.export: images depend on (seed, index) only; image files."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
from d2g.core.captioned_grid import captioned_grid
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import noise
from d2g.diffusion.latents import decode, to_uint8
from d2g.diffusion.pretrained import load_vae
from d2g.diffusion.teacher import load_teacher
from distill.export.export import export_student
from distill.models.student import student_from_teacher
from distill.sampling import load_checkpoint, load_student, untrained_one_step
from distill.saved_samples import save_samples
from distill.student_files import load_student_weights, student_folder
from distill.training.train import train
from jobs import distill_config, make_pairs

PROMPTS = [*tiny.CAPTIONS, "ein Bär ☃"]


@pytest.fixture(scope="module")
def run(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    train(distill_config(teacher, make_pairs(teacher, folder)), folder / "ode")
    return folder / "ode"


def test_a_string_is_no_list_of_prompts(run: Path, teacher: Path) -> None:
    """Its characters would be the prompts."""
    student, frozen = load_student(str(run)), load_teacher(str(teacher))
    z = torch.randn(6, *frozen.latent_shape)
    calls: list[Callable[[str], Any]] = [
        student,
        frozen.encode,
        partial(student.images, z),
        lambda prompts: frozen.sample(z, prompts, steps=2, guidance=1.0, solver="ddim"),
    ]
    for call in calls:
        with pytest.raises(AssertionError, match="prompts is the string 'a bear'; give a list of prompts"):
            call("a bear")


def test_an_image_depends_on_seed_and_index_only(run: Path) -> None:
    one = load_student(str(run))

    def images(batch_size: int, start: int = 0, seed: int = 5) -> torch.Tensor:
        parts = one.sample(PROMPTS[start:], seed, start, batch_size)
        return torch.cat([part for part, _ in parts])

    one_batch = images(32)
    assert one_batch.shape == (7, 3, 16, 16) and one_batch.dtype == torch.uint8
    for again in (images(1), images(3), torch.cat([one_batch[:2], images(4, start=2)])):
        assert (again.int() - one_batch.int()).abs().max() <= 1  # uint8 rounding may differ
    assert (images(32, seed=6).int() - one_batch.int()).abs().max() > 10
    assert [text for _, texts in one.sample(PROMPTS, 5, batch_size=3) for text in texts] == PROMPTS


def test_one_network_evaluation_per_image(run: Path) -> None:
    one, calls = load_student(str(run)), []
    one.student.unet.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    one.images(noise(0, range(3), (4, 4, 4)), PROMPTS[:3])
    assert calls == [3]


def test_a_teacher_that_has_changed_since_the_training_is_warned_of(
    run: Path, teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its text encoder reads the prompts. Another autoencoder is a choice."""
    exported, changed, decoder = tmp_path / "exported", tmp_path / "changed", tmp_path / "decoder"
    export_student(str(run), exported)
    tiny.save_teacher(changed, seed=1)
    shutil.copytree(teacher, decoder)
    shutil.copytree(changed / "vae", decoder / "vae", dirs_exist_ok=True)
    for name in (run, exported):
        for same in (None, str(decoder)):
            load_student(str(name), same)
            assert "is not the one that student" not in caplog.text
    load_student(str(exported), str(changed))
    load_checkpoint(str(run), student_folder(str(run))[0], str(changed))
    for name in (run, exported):
        assert f"that student {name} was trained from" in caplog.text


def test_files_store_their_prompt_and_the_grid_shows_all_images(run: Path, tmp_path: Path) -> None:
    progress_counts: list[int] = []
    summary = save_samples(
        str(run), PROMPTS, tmp_path, 5, 3, progress=lambda label, done, total: progress_counts.append(done)
    )
    assert summary["out"] == str(tmp_path) and summary["images"] == 7 and summary["seconds_per_image"] > 0
    assert progress_counts == [3, 6, 7]
    expected = torch.cat([part for part, _ in load_student(str(run)).sample(PROMPTS, 5, batch_size=3)])
    for number, prompt in enumerate(PROMPTS):
        with Image.open(tmp_path / f"{number:05d}.png") as image:
            assert image.info == {"prompt": prompt, "seed": "5", "index": str(number)}
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert torch.equal(pixels, expected[number])
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (3 * 18, 3 * 18)


def test_an_interrupted_command_keeps_what_it_has_drawn(run: Path, tmp_path: Path) -> None:
    def interrupt(label: str, done: int, total: int) -> None:
        if done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_samples(str(run), PROMPTS, tmp_path, 5, 3, progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{number:05d}.png" for number in range(6)]


def test_a_run_is_sampled_with_its_ema_weights(run: Path) -> None:
    tensors = load_file(run / "checkpoints" / "000000020" / "ema.safetensors")
    student = load_student(str(run)).student
    assert all(torch.equal(value, tensors[name]) for name, value in student.state_dict().items())


def test_the_untrained_student_is_one_teacher_step(teacher: Path, run: Path) -> None:
    z = noise(0, range(2), (4, 4, 4))
    untrained = untrained_one_step(str(teacher))
    expected = student_from_teacher(str(teacher))(z, untrained.conditioner.encode(PROMPTS[:2]))
    assert torch.equal(untrained.latents(z, PROMPTS[:2]), expected)
    assert not torch.equal(load_student(str(run)).latents(z, PROMPTS[:2]), expected)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_export_preserves_the_student(run: Path, tmp_path: Path, dtype: str) -> None:
    summary = export_student(str(run), tmp_path / "student", dtype)
    limit = {"fp32": 0.0, "fp16": 0.05, "bf16": 0.5}[dtype]
    assert summary["out"] == str(tmp_path / "student") and summary["parity_max_abs_err"] <= limit
    assert sorted(p.name for p in (tmp_path / "student").iterdir()) == ["ema.safetensors", "student.json"]
    z = noise(0, range(2), (4, 4, 4))
    a, b = (load_student(str(name)).latents(z, PROMPTS[:2]) for name in (run, tmp_path / "student"))
    torch.testing.assert_close(a, b, rtol=0, atol=2 * limit)


def test_an_exported_student_initializes_training_and_records_its_teacher(
    run: Path, teacher: Path, tmp_path: Path
) -> None:
    shutil.copytree(teacher, tmp_path / "moved")
    export_student(str(run), tmp_path / "student", teacher=str(tmp_path / "moved"))
    assert student_folder(str(tmp_path / "student"))[1:] == (str(tmp_path / "moved"), -1)
    student = student_from_teacher(str(teacher))
    load_student_weights(student, str(tmp_path / "student"))
    trained = load_student(str(run)).student
    for a, b in zip(student.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# Refused inputs.


def test_folders_without_a_student_are_refused(tmp_path: Path, teacher: Path) -> None:
    with pytest.raises(
        UserError, match=r"expected a run of `d2g distill` \(config.json\) or an exported student"
    ):
        load_student(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text(json.dumps({"teacher": str(teacher), "student_timestep": -1}))
    with pytest.raises(UserError, match="has no checkpoint yet; train it first"):
        load_student(str(tmp_path))
    (tmp_path / "student.json").write_text("{}")
    with pytest.raises(UserError, match=r"student\.json has no 'teacher'"):
        load_student(str(tmp_path))


def test_weights_that_do_not_fit_are_refused(run: Path, teacher: Path, tmp_path: Path) -> None:
    tiny.save_teacher(tmp_path / "wide", latent_channels=8)
    with pytest.raises(UserError, match=r"student .* does not fit its teacher: .*size mismatch") as caught:
        load_student(str(run), str(tmp_path / "wide"))
    assert "\n" not in str(caught.value)
    export_student(str(run), tmp_path / "student")
    file = tmp_path / "student" / "ema.safetensors"
    tensors = load_file(file)
    tensors.pop("unet.conv_in.bias")
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"does not fit its teacher: .*Missing key.*unet\.conv_in\.bias"):
        load_student(str(tmp_path / "student"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"ema\.safetensors is damaged"):
        load_student(str(tmp_path / "student"))


def test_a_teacher_with_another_prediction_is_refused(run: Path, tmp_path: Path) -> None:
    """Weights that predict epsilon draw noise where they are read as v, in the same network."""
    other = tiny.save_teacher(tmp_path / "v", prediction_type="v_prediction")
    export_student(str(run), tmp_path / "export")
    for student in (run, tmp_path / "export"):
        with pytest.raises(UserError, match=r"prediction of type epsilon, but teacher .*v has v_prediction;"):
            load_student(str(student), other)


def test_export_errors(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="dtype is 'int8'; expected fp32, fp16, bf16"):
        export_student(str(run), tmp_path / "student", "int8")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        export_student(str(run), tmp_path / "file" / "student")


def pixels(file: Path) -> torch.Tensor:
    """uint8 [3, H, W] of a PNG."""
    with Image.open(file) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_a_teacher_draws_with_its_own_network(teacher: Path, tmp_path: Path, d2g: Any) -> None:
    """`d2g sample --teacher` draws the teacher, from the noise of (seed, i), and no student."""
    words = ("sample", "--teacher", teacher, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--seed", "5")
    result = d2g(*words, "--steps", "4", "--guidance", "2", "--out", tmp_path, "--json").json
    assert result["images"] == 2 and not (tmp_path / "student").exists()
    loaded, vae = load_teacher(str(teacher)), load_vae(str(teacher))
    latents = loaded.sample(noise(5, range(2), (4, 4, 4)), PROMPTS[:2], 4, 2.0, "ddim")
    expected = to_uint8(decode(vae, latents))
    for number, prompt in enumerate(PROMPTS[:2]):
        assert torch.equal(pixels(tmp_path / f"{number:05d}.png"), expected[number])
        with Image.open(tmp_path / f"{number:05d}.png") as image:
            assert image.info == {"prompt": prompt, "seed": "5", "index": str(number)}
    # Without options: 50 steps at guidance 3.
    d2g("sample", "--teacher", teacher, "--prompt", PROMPTS[0], "--out", tmp_path / "default")
    latents = loaded.sample(noise(0, range(1), (4, 4, 4)), PROMPTS[:1], 50, 3.0, "ddim")
    assert torch.equal(pixels(tmp_path / "default" / "00000.png"), to_uint8(decode(vae, latents))[0])


def test_student_and_teacher_side_by_side(teacher: Path, run: Path, tmp_path: Path, d2g: Any) -> None:
    """Each draws what it draws alone; the grid has the student left, the teacher right, and prompts."""
    prompts = [word for prompt in PROMPTS[:3] for word in ("--prompt", prompt)]
    both = ("--student", run, "--teacher", teacher, "--steps", "2")
    result = d2g("sample", *both, *prompts, "--out", tmp_path / "both", "--json").json
    assert result["images"] == 6 and result["teacher_seconds_per_image"] > 0
    d2g("sample", "--student", run, *prompts, "--out", tmp_path / "student")
    d2g("sample", "--teacher", teacher, "--steps", "2", *prompts, "--out", tmp_path / "teacher")
    grid = pixels(tmp_path / "both" / "grid.png")
    titles = [f"{name}: {text}" for text in PROMPTS[:3] for name in ("one step", "teacher, 2 steps")]
    images = [
        pixels(tmp_path / "both" / name / f"{number:05d}.png")
        for number in range(3)
        for name in ("student", "teacher")
    ]
    heading = f"{run.name} and its teacher {teacher.name} on the same noise, seed 0"
    assert torch.equal(grid, captioned_grid(torch.stack(images), titles, heading, across=2))
    for number in range(3):
        for name in ("student", "teacher"):
            image = pixels(tmp_path / "both" / name / f"{number:05d}.png")
            assert torch.equal(image, pixels(tmp_path / name / f"{number:05d}.png")), (name, number)


def test_settings_of_the_other_sampler_are_refused(
    teacher: Path, run: Path, tmp_path: Path, d2g: Any
) -> None:
    ended = d2g("sample", "--student", run, "--prompt", "a", "--steps", "4", "--out", tmp_path / "a")
    assert ended.code == 2 and "steps is 4, but a student takes one step; give --teacher" in ended.error
    # A guidance scale that the student cannot take is the teacher's.
    words = ("sample", "--student", run, "--prompt", "a", "--guidance", "2", "--out", tmp_path / "b")
    assert "has its guidance in its weights" in d2g(*words).error
    assert d2g(*words, "--teacher", teacher, "--steps", "1").code == 0
    ended = d2g("sample", "--teacher", teacher, "--out", tmp_path / "c")
    assert ended.code == 2 and "nothing to draw; give --prompt TEXT" in ended.error
