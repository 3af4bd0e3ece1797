"""distill.export.export: plain diffusers samples the student from the exported folder in one step."""

import gc
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor

import tiny
import tiny_teachers
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import generator, noise
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.diffusers_pipeline import load_any_pipeline
from d2g.diffusion.latents import decode
from d2g.diffusion.schedule import predict_x0
from d2g.diffusion.scheduler_files import load_schedule
from distill.config.export import CardOptions, ExportConfig
from distill.config.student import StudentConfig
from distill.export.export import export, export_lora, export_pipeline, export_student
from distill.export.model_card import license_of
from distill.export.one_step_pipeline import one_step_scheduler, sample_own_noise, sample_pipeline
from distill.models.student import student_from_teacher
from distill.sampling import load_student
from exported import PROMPT, readme_of, save_lora_run, save_run

V = {"prediction_type": "v_prediction"}
ZERO_SNR = {**V, "rescale_betas_zero_snr": True}


def sample_with_diffusers(folder: Path, z: Tensor, **settings: Any) -> Tensor:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=False)
    pipe.set_progress_bar_config(disable=True)
    latents: Tensor = pipe(PROMPT, num_inference_steps=1, latents=z, output_type="latent", **settings).images
    return latents


@pytest.mark.parametrize("timestep", [-1, 399, 1])
@pytest.mark.parametrize(
    "scheduler",
    [{}, V, ZERO_SNR, {"prediction_type": "sample"}, {"beta_schedule": "linear", "set_alpha_to_one": False}],
    ids=["epsilon", "v", "zero-snr", "sample", "linear"],
)
def test_one_step_of_the_scheduler_is_the_data_prediction(
    scheduler: dict[str, Any], timestep: int, tmp_path: Path
) -> None:
    """Against the algebra of d2g.diffusion.schedule, for any network output."""
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **scheduler}
    tiny.save_teacher(tmp_path, **settings)
    schedule = load_schedule(str(tmp_path))
    t = len(schedule) - 1 if timestep == -1 else timestep
    scheduler = one_step_scheduler(schedule, t)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [t] and scheduler.init_noise_sigma == 1
    x, output = (torch.randn(2, 4, 8, 8, generator=generator(i)) for i in (1, 2))
    step = scheduler.step(output, scheduler.timesteps[0], scheduler.scale_model_input(x, t))
    expected = predict_x0(output, x, *schedule.alpha_sigma(t), schedule.prediction)
    torch.testing.assert_close(step.prev_sample, expected, rtol=1e-5, atol=1e-5)
    scheduler.save_pretrained(tmp_path / "saved")
    again = LCMScheduler.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod), "JSON keeps every bit"
    with pytest.raises(ValueError, match="num_inference_steps"):
        again.set_timesteps(2)


@pytest.fixture(scope="module")
def run(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_run(tmp_path_factory.mktemp("export") / "run", str(teacher))


@pytest.fixture(scope="module")
def exported(run: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    out = tmp_path_factory.mktemp("exported") / "pipeline"
    result = export_pipeline(run, out)
    assert result["out"] == str(out)
    return out, result["parity_max_abs_err"]


def test_diffusers_reproduces_the_student(run: str, exported: tuple[Path, float]) -> None:
    out, parity = exported
    assert 0 <= parity <= 1e-4
    one, z = load_student(run), noise(5, range(2), (4, 4, 4))
    own = one.latents(z, PROMPT)
    latents, images = sample_pipeline(out, z, PROMPT)
    torch.testing.assert_close(latents, own, rtol=0, atol=1e-4)
    expected = (decode(one.vae, own) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


def test_guidance_and_negative_prompts_have_no_effect_and_more_steps_are_refused(
    exported: tuple[Path, float],
) -> None:
    out, z = exported[0], noise(5, range(2), (4, 4, 4))
    plain = sample_with_diffusers(out, z)
    for settings in ({"guidance_scale": 1.0}, {"guidance_scale": 20.0}, {"negative_prompt": ["a", "b"]}):
        assert torch.equal(sample_with_diffusers(out, z, **settings), plain)
    pipe = StableDiffusionPipeline.from_pretrained(out)
    with pytest.raises(ValueError, match="`num_inference_steps`: 50"):
        pipe(PROMPT, latents=z)


@pytest.mark.parametrize("form", ["safetensors", "diffusers", "lora"])
def test_an_export_holds_one_student_at_a_time(
    form: Any, lora: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of FLUX in fp32, 96 GB, do not fit a GPU of 80 GB."""
    counts, forward = list[int](), UNet2DConditionModel.forward

    def counted(unet: Any, *args: Any, **settings: Any) -> Any:
        counts.append(unets_with_weights() - before)
        return forward(unet, *args, **settings)

    before = unets_with_weights()
    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)
    export(ExportConfig(student=lora, format=form), tmp_path / "out")
    assert len(counts) >= 2 and set(counts) == {1}


def unets_with_weights() -> int:
    """Number of U-Nets in memory that are not on torch's meta device."""
    unets = [o for o in gc.get_objects() if type(o) is UNet2DConditionModel]
    return sum(next(unet.parameters()).device.type != "meta" for unet in unets)


def test_export_contains_no_local_paths(exported: tuple[Path, float], teacher: Path) -> None:
    out = exported[0]
    names = {path.name for path in out.iterdir()}
    assert names == {"README.md", "model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    for file in (p for p in out.rglob("*") if p.suffix in (".json", ".md", ".txt")):
        text = file.read_text()
        assert str(teacher.parent) not in text and "_name_or_path" not in text, file
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_unsupported_teachers_are_refused(exported: tuple[Path, float]) -> None:
    with pytest.raises(UserError, match="LCMScheduler cannot make pairs"):
        load_schedule(str(exported[0]))
    pipe = load_any_pipeline(str(exported[0]), "cpu", torch.float32, 1, None)
    assert pipe.images(0, range(2), PROMPT, 1, None).shape == (2, 3, 16, 16), "but `d2g eval` measures it"


@pytest.mark.parametrize(("scheduler", "timestep"), [(V, 399), (ZERO_SNR, -1)], ids=["v", "zero-snr"])
def test_other_predictions_and_timesteps(scheduler: dict[str, Any], timestep: int, tmp_path: Path) -> None:
    teacher = tiny.save_teacher(tmp_path / "teacher", **scheduler)
    run = save_run(tmp_path / "run", teacher, student_timestep=timestep)
    assert export_pipeline(run, tmp_path / "out")["parity_max_abs_err"] <= 1e-4


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_is_half_the_bytes(
    run: str, exported: tuple[Path, float], dtype: str, tmp_path: Path
) -> None:
    parity = export_pipeline(run, tmp_path / "half", dtype)["parity_max_abs_err"]
    assert 1e-5 < parity < {"fp16": 0.5, "bf16": 4}[dtype]
    for name in ("unet", "vae"):
        file = f"{name}/diffusion_pytorch_model.safetensors"
        tensors = load_file(tmp_path / "half" / file)
        assert {t.dtype for t in tensors.values()} == {{"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]}
    assert (
        f".to(torch.{ {'fp16': 'float16', 'bf16': 'bfloat16'}[dtype] }"
        in (tmp_path / "half" / "README.md").read_text()
    )


def test_sdxl_export(tmp_path: Path) -> None:
    teacher = tiny_teachers.save_sdxl(tmp_path / "teacher")
    run = save_run(tmp_path / "run", teacher)
    assert export_pipeline(run, tmp_path / "out")["parity_max_abs_err"] <= 1e-4
    z = noise(5, range(2), (4, 4, 4))
    own = load_student(run).latents(z, PROMPT)
    for settings in ({}, {"guidance_scale": 1.0}, {"negative_prompt": ["a", "b"]}):
        latents = sample_with_diffusers(tmp_path / "out", z, **settings)
        torch.testing.assert_close(latents, own, rtol=0, atol=1e-4)
    assert "StableDiffusionXLPipeline" in readme_of(tmp_path / "out")


# Students with a guidance input or adapters.


def test_diffusers_passes_the_guidance_scale_to_a_guided_student(teacher: Path, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", str(teacher), StudentConfig(guidance_conditioning=True))
    assert export_pipeline(run, tmp_path / "out")["parity_max_abs_err"] <= 1e-4
    one, z = load_student(run), noise(5, range(2), (4, 4, 4))
    for scale in (1.5, 8.0):
        own = replace(one, guidance=scale).latents(z, PROMPT)
        torch.testing.assert_close(
            sample_with_diffusers(tmp_path / "out", z, guidance_scale=scale), own, rtol=0, atol=1e-4
        )
    assert "guidance_scale=8.0" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def lora(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    config = StudentConfig(lora_rank=2, lora_alpha=6.0)
    return save_lora_run(tmp_path_factory.mktemp("lora") / "run", str(teacher), config)


def sample_adapters_with_diffusers(teacher: Path, adapters: Path, z: Tensor) -> Tensor:
    """Load the adapters with `load_lora_weights` into the teacher's diffusers pipeline and sample."""
    pipe = StableDiffusionPipeline.from_pretrained(teacher, safety_checker=None)
    pipe.scheduler = LCMScheduler.from_pretrained(adapters, subfolder="scheduler")
    pipe.load_lora_weights(adapters)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 1, "guidance_scale": 1, "output_type": "latent"}
    latents: Tensor = pipe(PROMPT, latents=z, **settings).images
    return latents


def test_adapters_load_into_the_teachers_own_pipeline(lora: str, teacher: Path, tmp_path: Path) -> None:
    result = export_lora(lora, tmp_path / "out")
    assert result["parity_max_abs_err"] <= 1e-4
    z = noise(5, range(2), (4, 4, 4))
    latents = sample_adapters_with_diffusers(teacher, tmp_path / "out", z)
    torch.testing.assert_close(latents, load_student(lora).latents(z, PROMPT), rtol=0, atol=1e-4)
    tensors = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert all(".lora_" in name and ".default" not in name for name in tensors)
    assert "rank 2." in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("first_exists", [True, False], ids=["both runs", "second run only"])
def test_adapters_of_two_stages_are_combined(
    first_exists: bool, lora: str, teacher: Path, tmp_path: Path
) -> None:
    first = shutil.copytree(lora, tmp_path / "first")
    config = StudentConfig(lora_rank=3, lora_alpha=1.5)
    second = save_lora_run(tmp_path / "second", str(teacher), config, str(first), seed=5)
    if not first_exists:
        shutil.rmtree(first)
    assert export_lora(second, tmp_path / "out")["parity_max_abs_err"] <= 1e-4
    z = noise(5, range(2), (4, 4, 4))
    own = load_student(second).latents(z, PROMPT)
    latents = sample_adapters_with_diffusers(teacher, tmp_path / "out", z)
    torch.testing.assert_close(latents, own, rtol=0, atol=1e-4)
    assert (load_student(lora).latents(z, PROMPT) - own).abs().max() > 0.1, (
        "the second stage changes the latents"
    )
    tensors = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert {len(value) for name, value in tensors.items() if "lora_A" in name} == {5}
    assert "rank 5." in readme_of(tmp_path / "out")


def test_a_student_with_other_changed_weights_is_refused(
    run: str, lora: str, teacher: Path, tmp_path: Path
) -> None:
    config = StudentConfig(lora_rank=2)
    after_full_run = save_lora_run(tmp_path / "after", str(teacher), config, run)
    export_student(lora, tmp_path / "half")
    rounded = save_lora_run(tmp_path / "rounded", str(teacher), config, str(tmp_path / "half"))
    for student in (after_full_run, rounded):
        with pytest.raises(UserError, match=r"is more than adapters: \d+ frozen weights, first unet\."):
            export_lora(student, tmp_path / "out")
    other = tiny.save_teacher(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="or the teacher is another; export it with --format diffusers"):
        export_lora(lora, tmp_path / "out", teacher=other)
    assert not (tmp_path / "out").exists()


def test_other_formats_merge_adapters(lora: str, tmp_path: Path) -> None:
    assert export_pipeline(lora, tmp_path / "pipeline")["parity_max_abs_err"] <= 1e-4
    assert export_student(lora, tmp_path / "small", "fp32")["parity_max_abs_err"] == 0
    for folder in ("pipeline/unet/diffusion_pytorch_model", "small/ema"):
        assert not any("lora" in name for name in load_file(tmp_path / f"{folder}.safetensors"))


def test_a_student_without_adapters_is_refused(run: str, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no adapters; export it with --format diffusers"):
        export_lora(run, tmp_path / "out")
    both = save_run(tmp_path / "both", str(teacher), StudentConfig(lora_rank=2, guidance_conditioning=True))
    with pytest.raises(
        UserError, match="has the guidance scale as an input, which adapters alone cannot hold"
    ):
        export_lora(both, tmp_path / "out")


# The model card.


def test_code_on_the_model_card_runs(exported: tuple[Path, float]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", readme_of(exported[0]), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("THIS_FOLDER", str(exported[0])), names)
    assert names["image"].size == (16, 16)


def test_an_export_in_another_format_is_not_mixed_with_this_one(run: str, tmp_path: Path) -> None:
    """The folder held files of both, under the card of the last one."""
    config = ExportConfig(student=run, format="diffusers")
    export(config, tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(
        UserError, match=r"an export in the format diffusers \(model_index\.json\), and --format"
    ):
        export(replace(config, format="safetensors"), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    export(config, tmp_path / "out")


def test_an_exported_student_can_be_exported_again(run: str, tmp_path: Path) -> None:
    export_student(run, tmp_path / "small", "fp32")
    assert export_pipeline(str(tmp_path / "small"), tmp_path / "out")["parity_max_abs_err"] <= 1e-4
    assert "not recorded with an exported student" in readme_of(tmp_path / "out")


def test_license_is_read_from_the_teachers_readme(teacher: Path, tmp_path: Path) -> None:
    assert license_of("miniature") == "apache-2.0" and license_of(str(teacher)) is None
    copy = shutil.copytree(teacher, tmp_path / "teacher")
    (copy / "README.md").write_text("---\nlanguage: en\nlicense: 'cc0-1.0'\n---\n# It\nlicense: no\n")
    assert license_of(str(copy)) == "cc0-1.0"
    (copy / "README.md").write_text("# It\nlicense: no\n")
    assert license_of(str(copy)) is None


def test_invalid_export_settings(run: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="format is 'diffuser'; did you mean 'diffusers'"):
        ExportConfig(format="diffuser")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="student is not set"):
        export(ExportConfig(), tmp_path)
    with pytest.raises(SettingError, match=r"^watts is -1; expected a positive number$"):
        CardOptions(watts=-1)
    result = export(ExportConfig(student=run), tmp_path / "small")
    assert math.isfinite(result["parity_max_abs_err"]) and (tmp_path / "small" / "ema.safetensors").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        export_pipeline(run, tmp_path / "file" / "out")


def test_export_of_the_shipped_miniature(tmp_path: Path) -> None:
    assert export_pipeline("miniature", tmp_path / "out")["parity_max_abs_err"] <= 1e-4
    assert ModelCard(readme_of(tmp_path / "out")).data.license == "apache-2.0"


# The `d2g export` command.


def test_export_command(run: str, tmp_path: Path, d2g: Any) -> None:
    out = tmp_path / "out"
    words = ("export", "--student", run, "--format", "diffusers", "--out", out, "--watts", 250, "--json")
    config = d2g(*words, "--dry-run").json["config"]
    card = config["card"]
    assert (config["format"], card["watts"], card["kg_per_kwh"]) == ("diffusers", 250, 0.48)
    assert not out.exists()
    result = d2g(*words, "--set", "card.license=mit").json
    assert result["out"] == str(out) and result["parity_max_abs_err"] <= 1e-4
    assert "license: mit" in readme_of(out)
    ended = d2g("export", "--student", run, "--format", "onx", "--out", out)
    assert ended.code == 2 and "format is 'onx'" in ended.error


# Students without text conditioning.


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_diffusers_reproduces_unconditional_students(kind: str, tmp_path: Path) -> None:
    make = {"pixels": tiny_teachers.save_pixels, "latents": tiny_teachers.save_ldm}[kind]
    run = save_run(tmp_path / "run", make(tmp_path / "teacher"))
    result = export(ExportConfig(student=run, format="diffusers"), tmp_path / "out")
    assert result["parity_max_abs_err"] <= 1e-4
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == {"pixels": "DDPMPipeline", "latents": "LDMPipeline"}[kind]
    one = load_student(run)
    z = torch.randn(3, *one.student.latent_shape, generator=torch.Generator().manual_seed(0))
    own = (decode(one.vae, one.latents(z, [""] * 3)) / 2 + 0.5).clamp(0, 1)
    assert own.std() > 0.1
    torch.testing.assert_close(sample_own_noise(tmp_path / "out", None, 3), own, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="num_inference_steps"):
        tiny_teachers.diffusers_pipeline(tmp_path / "out")(1)
    assert "pipe(num_inference_steps=1)" in readme_of(tmp_path / "out")
    assert "guidance" not in readme_of(tmp_path / "out").partition("## How it was made")[0]


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "EDM": ({}, "diffusers", "no scheduler of diffusers starts from sigma_max .* safetensors or onnx"),
    "classes": (
        {"classes": 10},
        "diffusers",
        "class-conditional, and no pipeline of diffusers passes classes",
    ),
    "adapters": ({}, "lora", "is a DDIMPipeline, into which diffusers loads no adapters; .* safetensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_students_that_diffusers_cannot_run_are_refused(case: str, tmp_path: Path) -> None:
    settings, form, says = REFUSED[case]
    make = tiny_teachers.save_edm if case == "EDM" else tiny_teachers.save_pixels
    run = save_run(tmp_path / "run", make(tmp_path / "teacher", **settings))
    with pytest.raises(UserError, match=says):
        export(ExportConfig(student=run, format=form), tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_adapters_of_a_class_conditional_student_are_merged(tmp_path: Path) -> None:
    teacher = tiny_teachers.save_edm(tmp_path / "teacher")
    run = save_run(tmp_path / "run", teacher, StudentConfig(lora_rank=2))
    result = export(ExportConfig(student=run, dtype="fp32"), tmp_path / "out")
    assert result["parity_max_abs_err"] <= 1e-5
    z = noise(5, range(2), (3, 8, 8))
    own, plain = (load_student(name).latents(z, ["2", "7"]) for name in (run, str(tmp_path / "out")))
    torch.testing.assert_close(own, plain, rtol=0, atol=1e-5)
    assert (
        own - student_from_teacher(teacher)(z, Conditioning.from_labels(torch.tensor([2, 7])))
    ).abs().max() > 1e-2
