"""Class-conditional, unconditional and EDM students, in pixels and latents: formulas and refusals."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import tiny
import tiny_teachers
from d2g.core.config import override
from d2g.core.errors import SettingError
from d2g.core.seeds import noise
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.families.registry import FAMILIES
from d2g.diffusion.latents import decode
from d2g.diffusion.pipelines import family_of
from d2g.diffusion.schedule import Point, Schedule
from d2g.diffusion.teacher import load_teacher
from distill.config.discriminator import DiscriminatorConfig
from distill.config.regression import RegressionConfig
from distill.config.run import DistillConfig, EngineConfig, TrainConfig
from distill.config.student import StudentConfig
from distill.losses.regression.regression import build_regression
from distill.models.row_dropout import row_keys, set_dropout_keys
from distill.models.student import (
    DiffusionStudent,
    add_adapters,
    check_teacher,
    set_trainable,
    student_from_teacher,
)
from distill.planning.memory import predict
from distill.planning.saved_activations import saved_bytes
from distill.sampling import untrained_one_step
from latent_lpips.lpips import PixelLPIPS


def edm(folder: Path) -> str:
    return tiny_teachers.save_edm(folder)


def edm_v(folder: Path) -> str:
    return tiny_teachers.save_edm(folder, classes=None, prediction_type="v_prediction", sigma_max=20.0)


def edm_xl(folder: Path) -> str:
    return tiny_teachers.save_sdxl(folder, scheduler=diffusers.EDMEulerScheduler, **tiny_teachers.EDM)


def classes(folder: Path) -> str:
    return tiny_teachers.save_pixels(folder, classes=10)


KINDS: dict[str, tuple[Callable[[Path], str], list[str]]] = {
    "class-conditional EDM": (edm, ["1", "9"]),
    "unconditional EDM, v-prediction": (edm_v, ["", ""]),
    "text EDM": (edm_xl, tiny.CAPTIONS[:2]),
    "class-conditional pixels": (classes, ["1", "9"]),
    "unconditional pixels": (tiny_teachers.save_pixels, ["", ""]),
    "unconditional latents": (tiny_teachers.save_ldm, ["", ""]),
}
WITHOUT_TEXT = [name for name in KINDS if name != "text EDM"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("kinds")
    return {name: save(root / str(i)) for i, (name, (save, _)) in enumerate(KINDS.items())}


def encode_prompts(teacher: str, prompts: list[str]) -> Any:
    return pretrained.load_conditioner(teacher).encode(prompts)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_student_starts_as_one_teacher_step(kind: str, folders: dict[str, str]) -> None:
    """Reference: the teacher's sampler. EDM: one Euler step from sigma_max z to 0. VP: x_0 hat at T."""
    folder, prompts = folders[kind], KINDS[kind][1]
    teacher, student = load_teacher(folder), student_from_teacher(folder)
    z = noise(0, range(2), student.latent_shape)
    output = student(z, encode_prompts(folder, prompts))
    if isinstance(teacher.schedule, Schedule):
        point = Point(999, *teacher.schedule.alpha_sigma(999))
        expected = teacher.denoiser(teacher.encode(prompts), 1.0)(z, point).x0
    else:
        expected = teacher.sample(z, prompts, 1, 1.0, "euler")
    assert output.std() > 0.1 and student.latent_shape == teacher.latent_shape
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    images = untrained_one_step(folder).images(z, prompts)
    assert images.dtype == torch.uint8 and images.shape[:2] == (2, 3)


def test_edm_student_follows_the_papers_formula(folders: dict[str, str]) -> None:
    """method.md "CIFAR10 and EDM", computed with the preconditioning of diffusers."""
    folder = folders["class-conditional EDM"]
    student, labels = student_from_teacher(folder), torch.tensor([3, 4])
    cond = Conditioning.from_labels(labels)
    scheduler, sigma = diffusers.EDMEulerScheduler(), torch.tensor(80.0)
    z = noise(0, range(2), (3, 8, 8))
    with torch.no_grad():
        time = scheduler.precondition_noise(sigma)
        output = student.unet(scheduler.precondition_inputs(80 * z, sigma), time, class_labels=labels).sample
        expected = scheduler.precondition_outputs(80 * z, output, sigma)
        torch.testing.assert_close(student(z, cond), expected, rtol=1e-5, atol=1e-6)
        assert (student(z, cond) - student(z, cond[[1, 0]])).abs().max() > 1e-2
    assert (student.timestep, student.evaluation_point) == (-1, "sigma 80")
    with pytest.raises(SettingError, match="student_timestep is 5, but the teacher is preconditioned as in"):
        student_from_teacher(folder, 5)


def test_time_input_is_not_rounded(folders: dict[str, str]) -> None:
    """A UNet2DModel would truncate the time 1.0955 to 1, and FSDP2 in bf16 would round it to 1.0938."""
    student, times = student_from_teacher(folders["class-conditional EDM"]), list[Tensor]()

    student.unet.time_proj.register_forward_hook(lambda module, args, out: times.append(args[0]))
    student(noise(0, range(2), (3, 8, 8)), Conditioning.from_labels(torch.tensor([3, 4])))
    assert times[0].dtype == torch.float32
    torch.testing.assert_close(times[0], torch.full((2,), 80.0).log() / 4, rtol=1e-7, atol=0)


@pytest.mark.parametrize("kind", WITHOUT_TEXT)
def test_prediction_is_combined_in_fp32_under_bf16_autocast(kind: str, folders: dict[str, str]) -> None:
    folder, prompts = folders[kind], KINDS[kind][1]
    student = student_from_teacher(folder)
    z = noise(0, range(2), student.latent_shape)
    expected = student(z, encode_prompts(folder, prompts))
    with torch.autocast("cpu", torch.bfloat16):
        output = student(z, encode_prompts(folder, prompts))
    assert output.dtype == torch.float32 and not torch.equal(output, expected)
    assert (output - expected).abs().max() < 0.1 * expected.abs().max()


def test_dropout_and_adapters_on_a_class_conditional_student(folders: dict[str, str]) -> None:
    folder, z = folders["class-conditional EDM"], noise(0, range(2), (3, 8, 8))
    cond = Conditioning.from_labels(torch.tensor([3, 4]))
    plain = student_from_teacher(folder)(z, cond)
    dropped = student_from_teacher(folder, -1, StudentConfig(dropout=0.5))
    blocks = [m for m in dropped.unet.modules() if type(m).__name__.startswith("ResnetBlock")]
    assert blocks and {m.dropout.p for m in blocks} == {0.5}
    set_dropout_keys(dropped, row_keys(0, range(2)))
    assert not torch.allclose(dropped(z, cond), plain)
    assert torch.equal(dropped.eval()(z, cond), plain)
    config = StudentConfig(lora_rank=2)
    adapted = student_from_teacher(folder, -1, config, seed=3)
    set_trainable(adapted, config)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    torch.testing.assert_close(adapted(z, cond), plain)


def test_adapters_need_attention(tmp_path: Path) -> None:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = tiny_teachers.unet2d(**blocks, add_attention=False)
    student = DiffusionStudent(
        unet, pretrained.load_schedule(tiny_teachers.save_pixels(tmp_path)), FAMILIES["unet2d"]
    )
    with pytest.raises(SettingError, match="lora_rank is 2, but the network has no attention to adapt"):
        add_adapters(student, StudentConfig(lora_rank=2))


def test_learned_variance_channels_are_dropped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = tiny_teachers.unet2d(out_channels=6)
    diffusers.DDIMPipeline(
        unet=unet, scheduler=diffusers.DDIMScheduler(**tiny_teachers.LINEAR)
    ).save_pretrained(tmp_path)
    z = noise(0, range(2), (3, 8, 8))
    assert student_from_teacher(str(tmp_path))(z, torch.empty(2, 0)).shape == z.shape


@pytest.mark.parametrize("kind", KINDS)
def test_the_gan_stage_builds_a_discriminator(kind: str, folders: dict[str, str]) -> None:
    """Its weights are counted twice by --dry-run; mix-and-match needs text or classes."""
    gan = DiscriminatorConfig(mix_fraction=0.0)
    config = DistillConfig(
        stage="gan",
        teacher=folders[kind],
        gan=gan,
        regression=RegressionConfig(losses=(("mse", 1.0),)),
        train=TrainConfig(precision="fp32"),
    )
    memory = predict(config, 1)
    assert memory.weights > 1.9 * memory.average and memory.working > 0
    if not kind.startswith("unconditional"):
        assert predict(replace(config, gan=DiscriminatorConfig()), 1).weights == memory.weights
        return
    with pytest.raises(
        SettingError, match=r"mix_fraction is 0\.25, but .* is unconditional: .*mix_fraction=0"
    ):
        predict(replace(config, gan=DiscriminatorConfig()), 1)


def test_a_family_without_discriminators_is_refused(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(FAMILIES["unet2d"]), "gan", ("vp",))
    check_teacher(folders["class-conditional pixels"], "gan", StudentConfig())
    with pytest.raises(SettingError, match=r"no discriminator for .*DDPMPipeline of kind EDM; its"):
        check_teacher(folders["class-conditional EDM"], "gan", StudentConfig())


def test_guidance_input_needs_a_text_network(folders: dict[str, str]) -> None:
    config = StudentConfig(guidance_conditioning=True)
    with pytest.raises(SettingError, match=r"guidance_conditioning is true, but .* no input for a guidance"):
        check_teacher(folders["class-conditional pixels"], "ode", config)
    check_teacher(folders["text EDM"], "ode", config)
    assert student_from_teacher(folders["text EDM"], -1, config).guided
    assert not student_from_teacher(folders["class-conditional pixels"]).guided


@pytest.mark.parametrize("kind", WITHOUT_TEXT)
def test_memory_prediction(kind: str, folders: dict[str, str]) -> None:
    """Weights and optimizer states in closed form; working memory scales with the rows per micro-batch."""
    folder = folders[kind]
    params = sum(p.numel() for p in pretrained.load_on_meta(folder, "unet").parameters())
    config = DistillConfig(
        teacher=folder,
        student=StudentConfig(dropout=0.1),
        regression=RegressionConfig(losses=(("mse", 1.0),)),
        train=TrainConfig(batch_size=4096, precision="fp32"),
    )
    one_step, micro_batches = (
        predict(config, 1),
        predict(replace(config, engine=EngineConfig(gradient_accumulation=2)), 1),
    )
    assert one_step.weights == pytest.approx(4 * params / 2**30)
    assert one_step.optimizer == pytest.approx(2 * one_step.weights) and one_step.frozen == 0
    assert 0.4 < micro_batches.working / one_step.working < 0.6, "activations dominate the working memory"


@pytest.mark.parametrize("kind", ["class-conditional EDM", "unconditional latents"])
def test_memory_prediction_includes_pixel_lpips(kind: str, folders: dict[str, str]) -> None:
    """Bytes saved for backward on fake tensors equal those on data, including decoder and resizing."""
    folder, rows = folders[kind], 2048
    lpips = RegressionConfig(losses=(("lpips", 1.0),), lpips_net="squeeze", lpips_resize=40)
    plain = DistillConfig(
        teacher=folder,
        regression=RegressionConfig(losses=(("mse", 1.0),)),
        train=TrainConfig(batch_size=rows, precision="fp32"),
    )
    without_lpips, with_lpips = (predict(c, 1) for c in (plain, replace(plain, regression=lpips)))
    vae = pretrained.load_vae(folder).requires_grad_(False)
    metric = PixelLPIPS("squeeze", pretrained=False, decode=partial(decode, vae), resize=40)
    shape = student_from_teacher(folder).latent_shape
    pred, target = noise(0, range(2), shape).requires_grad_(), noise(1, range(2), shape)
    real = saved_bytes(nn.ModuleList([metric, vae]), lambda: metric(pred, target), False)
    gib = (with_lpips.working - without_lpips.working) * 2**30
    assert gib == pytest.approx(rows / 2 * real, rel=0.02) and real > 0
    trunk = sum(p.numel() for p in metric.parameters())
    decoder = sum(p.numel() for p in vae.parameters()) if family_of(folder).autoencoder else 0
    assert with_lpips.frozen * 2**30 == pytest.approx(4 * (trunk + decoder))


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ("e_latent_lpips", "there is no e_latent_lpips; expected .* mse, l1, pseudo_huber or lpips"),
        ("decoder_features:1", "there is no decoder_features; expected regression.losses of mse, l1"),
        ("mse:1,latent_lpips:1", "there is no latent_lpips; expected"),
    ],
)
def test_latent_distances_are_refused_for_pixel_teachers(
    losses: str, message: str, folders: dict[str, str]
) -> None:
    config = override(
        DistillConfig(teacher=folders["class-conditional EDM"]), [f"regression.losses={losses}"]
    )
    with pytest.raises(SettingError, match=f"generates pixels, for which {message}"):
        build_regression(config, 3)
