"""What the project does on a CUDA device: it must agree with the CPU, and nothing may wait in a step.

    pytest -m gpu tests/test_on_a_gpu.py

The golden curves on a GPU are in tests/distill/test_train.py. With D2G_GPU_TESTS_ON_CPU=1 these tests run on
a CPU, which shows only that they run.
"""

import gc
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

import eval_jobs
import jobs
import own_pictures
import tiny
import tiny_teachers
from benchmarks.training_step import RandomStep
from d2g.core.config import override
from d2g.core.distributed import process_group
from d2g.core.seeds import noise
from d2g.core.tracking.run_directory import read_stats
from distill.config.export import ExportConfig
from distill.config.presets import preset
from distill.config.run import DistillConfig
from distill.exploration import Walk, open_student
from distill.export.export import export
from distill.sampling import load_student
from distill.training.train import train
from eval.runner.run import run_evaluation
from latent_lpips import load_lpips
from pairgen.config import PairConfig
from pairgen.generate import generate_pairs
from pairgen.job import open_job
from pairgen.store.reader import PairReader
from teacher_training.cascade.train import train_cascade
from teacher_training.config import NETWORK_GROUPS, NetworkName
from teacher_training.train import train_teacher

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")
KINDS = ("sd", "sdxl", "unet2d", "edm", "ldm", *tiny_teachers.TRANSFORMERS, *tiny_teachers.STAGES)


@pytest.fixture(autouse=True)
def device() -> torch.device:
    """The GPU, with exact fp32."""
    if not os.environ.get("D2G_GPU_TESTS_ON_CPU"):
        assert torch.cuda.is_available(), "no CUDA device; `-m gpu` is for machines that have one"
    return process_group.own_device()


@pytest.fixture(scope="module")
def pairs(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.make_pairs(teacher, tmp_path_factory.mktemp("pairs"))


def config_of(teacher: Path, pairs: Path, stage: str, *settings: str) -> DistillConfig:
    """Three steps of a stage, with every loss and with R1 in the first step."""
    init = "teacher" if stage == "gan" else ""
    losses = "regression.losses=e_latent_lpips:1,latent_lpips:0.5,l1:0.1"
    gan = ("gan.r1_interval=3", "gan.r1_gamma=0.1") if stage == "gan" else ()
    return jobs.distill_config(
        teacher, pairs, losses, "train.images=12", *gan, *settings, stage=stage, init=init
    )


def losses_of(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k.startswith("loss/")} for line in read_stats(run)]


def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the project find no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def small_job(kind: str, folder: Path) -> PairConfig:
    """The config of a small job with a teacher of this kind; a cascade's decoder reads pairs of its prior."""
    before = None
    if kind.endswith("_decoder"):
        before = folder / "prior" / "pairs"
        generate_pairs(small_job(kind.replace("_decoder", "_prior"), folder / "prior"), before)
    return tiny_teachers.pair_config(tiny_teachers.save_kind(kind, folder / "teacher"), folder, before)


# Pairs, the metric, students.


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_equal_those_of_a_cpu(kind: str, device: torch.device, tmp_path: Path) -> None:
    """Random numbers come from the CPU, so latents differ by rounding only. Random networks amplify that of
    bf16 and fp16, most of all those of cascades, so the bound for these is wide."""
    config = small_job(kind, tmp_path)
    rows = [0, 1, 2, 3]
    expected = open_job(config, CPU).rows(rows)[1]
    latents = open_job(config, device).rows(rows)[1]
    assert latents.device == device
    assert float((latents.cpu() - expected).norm()) < 2e-3 * float(expected.norm())
    for precision in ("bf16", "fp16"):
        rounded = open_job(replace(config, precision=precision), device).rows(rows)[1]  # type: ignore[arg-type]
        assert float(torch.cosine_similarity(rounded.cpu().flatten(), expected.flatten(), 0)) > 0.7


def test_a_store_can_be_made_and_read(teacher: Path, pairs: Path, device: torch.device) -> None:
    """The writer copies latents from the device."""
    batch = PairReader(pairs).read(range(12))
    assert batch.latents.isfinite().all() and len(batch.prompts) == 12


@pytest.mark.parametrize("size", [8, 64])
def test_the_metric_and_its_gradient_equal_those_of_a_cpu(
    size: int, device: torch.device, tmp_path: Path
) -> None:
    tiny.save_lpips(tmp_path / "lpips")
    pred, target = noise(0, range(3), (4, size, size)), noise(1, range(3), (4, size, size))

    def distance_and_gradient(place: torch.device, precision: Any) -> tuple[torch.Tensor, torch.Tensor]:
        metric = load_lpips(tmp_path / "lpips", precision=precision, device=place)
        x = pred.to(place).requires_grad_()
        distance = metric(x, target.to(place))
        (gradient,) = torch.autograd.grad(distance.sum(), x)
        return distance.detach().cpu(), gradient.cpu()

    expected, expected_gradient = distance_and_gradient(CPU, "fp32")
    exact, exact_gradient = distance_and_gradient(device, "fp32")
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-6)
    assert (exact_gradient - expected_gradient).norm() < 1e-3 * expected_gradient.norm()
    rounded, rounded_gradient = distance_and_gradient(device, "bf16")
    torch.testing.assert_close(rounded, expected, rtol=0.02, atol=1e-6)
    cosine = torch.cosine_similarity(rounded_gradient.flatten(), expected_gradient.flatten(), 0)
    assert cosine > 0.99


def test_a_student_draws_the_images_of_a_cpu(device: torch.device) -> None:
    prompts = ["a red circle on a white background", "a blue square on a green background"]
    images, expected = (load_student("miniature", device=place)(prompts, seed=0) for place in (device, CPU))
    assert (images.int() - expected.int()).abs().max() <= 4
    assert images.device.type == "cpu"


def test_a_walk_draws_the_images_of_a_cpu(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def images() -> torch.Tensor:
        sampler = open_student("miniature")
        walk = Walk(sampler, noise(0, range(2), sampler.student.noise_shape), ["a red cube", "a blue cone"])
        return walk.images(torch.tensor([0.0, 0.5, 1.0]))

    on_gpu = images()
    with monkeypatch.context() as patch:
        on_cpu(patch)
        assert (on_gpu.int() - images().int()).abs().max() <= 4


# Training.


@pytest.mark.parametrize("stage", ["ode", "gan"])
def test_the_host_never_waits_inside_a_step(
    stage: str, teacher: Path, pairs: Path, device: torch.device, tmp_path: Path
) -> None:
    """torch raises where the host waits for the device in the second and third step."""
    steps: list[int] = []

    def progress(label: str, done: int, total: int) -> None:
        steps.append(done)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if len(steps) < 3 else "default")

    settings = ("train.precision=bf16", "train.report_images=12", "engine.gradient_accumulation=2")
    try:
        train(config_of(teacher, pairs, stage, *settings), tmp_path / "run", progress)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert steps == [4, 8, 12]


SETTINGS = (
    "",
    "optim.name=radam",
    "optim.name=adamw_8bit",
    "optim.name=adamw_8bit engine.offload_optimizer=true",
    "engine.offload_optimizer=true",
    "engine.activation_checkpointing=true engine.gradient_accumulation=2",
    "engine.channels_last=off data.text_cache=4 data.text_precision=fp32",
    "engine.async_checkpoints=true student.lora_rank=2",
    "engine.parallel=fsdp",
    "gan.penalty=approx",
)


@pytest.mark.parametrize("stage", ["ode", "gan"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_losses_equal_those_of_a_cpu(
    settings: str,
    stage: str,
    teacher: Path,
    pairs: Path,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In fp32, and nearly so in bf16. Each run writes a checkpoint and resumes from it."""
    config = config_of(teacher, pairs, stage, *settings.split())
    runs = {"gpu": config, "bf16": override(config, ["train.precision=bf16"])}
    for name, of in runs.items():
        for images in (8, 12):
            train(override(of, [f"train.images={images}"]), tmp_path / name)
        process_group.finish()
    with monkeypatch.context() as patch:
        on_cpu(patch)
        train(config, tmp_path / "cpu")
        process_group.finish()
    expected = losses_of(tmp_path / "cpu")
    for name, tolerance in (("gpu", 1e-2), ("bf16", 0.2)):
        losses = losses_of(tmp_path / name)
        assert [line.keys() for line in losses] == [line.keys() for line in expected]
        for line, expected_line in zip(losses, expected, strict=True):
            assert line == pytest.approx(expected_line, rel=tolerance, abs=1e-3)


def test_weights_after_a_run_equal_those_of_a_cpu(
    teacher: Path, pairs: Path, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused AdamW against the CPU's. Adam divides by the root of a moment: a gradient of nearly zero can move
    a weight either way, by the learning rate at most."""
    config = config_of(teacher, pairs, "ode", "train.ema_start_images=12")
    train(config, tmp_path / "gpu")
    with monkeypatch.context() as patch:
        on_cpu(patch)
        train(config, tmp_path / "cpu")
    weights, expected = (
        load_file(tmp_path / name / "checkpoints" / "000000012" / "ema.safetensors")
        for name in ("gpu", "cpu")
    )
    assert weights.keys() == expected.keys()
    apart = torch.cat([(weights[name] - expected[name]).abs().flatten() for name in expected])
    assert apart.max() <= 6.1 * config.optim.lr and apart.mean() < 0.1 * config.optim.lr


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sd"])
def test_both_stages_of_every_family_run(kind: str, device: torch.device, tmp_path: Path) -> None:
    """Two steps in bf16, with a checkpoint, as tests/fake_cuda.py takes them."""
    config = small_job(kind, tmp_path)
    generate_pairs(config, tmp_path / "pairs")
    for stage in ("ode", "gan"):
        settings = (*tiny_teachers.stage_settings(kind, stage), "train.images=8", "train.precision=bf16")
        init = "teacher" if stage == "gan" else ""
        run = jobs.distill_config(Path(config.teacher), tmp_path / "pairs", *settings, stage=stage, init=init)
        assert train(run, tmp_path / stage).steps == 2
        for line in losses_of(tmp_path / stage):
            assert all(torch.tensor(value).isfinite() for value in line.values())


def test_random_steps_of_the_battery_are_finite(teacher: Path, device: torch.device, tmp_path: Path) -> None:
    """The steps that benchmarks/gpu.py times, in bf16, with R1 and a metric of full width."""
    base = replace(preset("sd15-cfg3", "gan"), teacher=str(teacher))
    config = override(base, ["train.batch_size=4", "gan.r1_rows=2", "gan.r1_interval=1"])
    step = RandomStep(config, device, tmp_path)
    for _ in range(2):
        step(at_once=True)


@pytest.mark.parametrize("network", get_args(NetworkName))
def test_a_teacher_trained_here_has_the_losses_of_one_trained_on_a_cpu(
    network: NetworkName, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All stages, with a perceptual term and a discriminator of the autoencoder; the last one resumes."""
    (tmp_path / "data").mkdir()
    own_pictures.class_folders(tmp_path / "data")
    terms = {"perceptual_weight": 1.0, "adversarial_weight": 0.1, "adversarial_start": 0.0}
    vae = replace(own_pictures.CLASSES.vae, **terms)  # type: ignore[arg-type]
    config = replace(own_pictures.CLASSES, data=str(tmp_path / "data"), network=network, vae=vae)
    stage = NETWORK_GROUPS[network]

    def train_here(out: Path) -> dict[str, list[dict[str, float]]]:
        shorter = override(config, [f"{stage}.fit.images=16"])
        train_teacher(shorter, out)
        assert train_teacher(config, out).scores[stage]["length"] == config.denoiser.fit.images
        return {name: losses_of(out / "training" / name) for name in ("vae", stage)}

    losses = train_here(tmp_path / "gpu")
    with monkeypatch.context() as patch:
        on_cpu(patch)
        expected = train_here(tmp_path / "cpu")
    for name, lines in expected.items():
        for line, expected_line in zip(losses[name], lines, strict=True):
            assert line == pytest.approx(expected_line, rel=0.05, abs=1e-2)


def test_a_cascade_trains_here(device: torch.device, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    own_pictures.class_folders(tmp_path / "data")
    summary = train_cascade(replace(own_pictures.CASCADE, data=str(tmp_path / "data")), tmp_path / "cascade")
    assert list(summary.parts) == ["vqgan", "stage_b", "stage_c"]
    for part in summary.parts:
        for line in losses_of(tmp_path / "cascade" / "training" / part):
            assert all(torch.tensor(value).isfinite() for value in line.values())


# Exports.


@pytest.mark.parametrize("form", ["safetensors", "diffusers", "comfyui"])
def test_an_export_draws_here_what_the_student_draws(form: Any, device: torch.device, tmp_path: Path) -> None:
    if device.type == "cuda":
        gc.collect()  # what earlier tests have left would be freed in the middle of this one
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    config = ExportConfig(student="miniature", format=form, dtype="fp32")
    assert export(config, tmp_path / "out", device)["parity_max_abs_err"] < 1e-3
    if device.type == "cuda":
        assert torch.cuda.max_memory_allocated() > before + 2**22, "the GPU was not used"


# Evaluation.


def test_an_evaluation_equals_that_of_a_cpu(
    teacher: Path, pairs: Path, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    tiny.save_prompts(tmp_path / "prompts.txt")
    jobs.make_clip(teacher, tmp_path / "clip")
    (tmp_path / "photographs").mkdir()
    for number in range(12):
        color = (20 * number, 250 - 20 * number, 100)
        Image.new("RGB", (16, 16), color).save(tmp_path / "photographs" / f"{number:02}.png")
    config = eval_jobs.config(tmp_path, teacher=str(teacher))
    results = [run_evaluation(config)]
    process_group.finish()
    with monkeypatch.context() as patch:
        on_cpu(patch)
        results.append(run_evaluation(config))
    gpu, cpu = results
    for name in ("fid", "precision", "recall", "clip_score"):
        assert gpu[name] == pytest.approx(cpu[name], rel=0.02, abs=1e-3), json.dumps([gpu, cpu], default=str)


# Last, because it can take minutes.


def test_compiled_blocks_have_the_losses_of_eager_ones(
    teacher: Path, pairs: Path, device: torch.device, tmp_path: Path, fresh_dynamo: None
) -> None:
    eager = config_of(teacher, pairs, "gan")
    train(eager, tmp_path / "eager")
    compiled = override(eager, ["engine.compile=inductor", "engine.compile_blocks=true"])
    train(compiled, tmp_path / "compiled")
    losses, expected = losses_of(tmp_path / "compiled"), losses_of(tmp_path / "eager")
    for line, expected_line in zip(losses, expected, strict=True):
        assert line == pytest.approx(expected_line, rel=1e-2, abs=1e-3)
