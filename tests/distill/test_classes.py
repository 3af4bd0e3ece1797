"""Students of classes and of nothing, in pixels and latents, and of EDM teachers: formulas and refusals."""

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
from distill.config.components import StudentConfig
from distill.config.run import DistillConfig, EngineConfig, RegressionConfig, TrainConfig
from distill.losses.regression.regression import build_regression
from distill.models.row_dropout import row_keys, set_dropout_keys
from distill.models.student import Student, add_adapters, check_teacher, set_trainable, student_from_teacher
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
    "EDM of classes": (edm, ["1", "9"]),
    "EDM of nothing, v": (edm_v, ["", ""]),
    "EDM of text": (edm_xl, tiny.CAPTIONS[:2]),
    "classes in pixels": (classes, ["1", "9"]),
    "nothing in pixels": (tiny_teachers.save_pixels, ["", ""]),
    "nothing in latents": (tiny_teachers.save_ldm, ["", ""]),
}
SHORT = [name for name in KINDS if name != "EDM of text"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("kinds")
    return {name: save(root / str(i)) for i, (name, (save, _)) in enumerate(KINDS.items())}


def told(teacher: str, prompts: list[str]) -> Any:
    return pretrained.load_conditioner(teacher).encode(prompts)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_one_step_of_the_teacher(kind: str, folders: dict[str, str]) -> None:
    """Against the teacher's own sampler: of an EDM from sigma_max z to 0; of a VP teacher its x_0 at T."""
    folder, prompts = folders[kind], KINDS[kind][1]
    teacher, student = load_teacher(folder), student_from_teacher(folder)
    z = noise(0, range(2), student.latent_shape)
    output = student(z, told(folder, prompts))
    if isinstance(teacher.schedule, Schedule):
        point = Point(999, *teacher.schedule.alpha_sigma(999))
        expected = teacher.denoiser(teacher.encode(prompts), 1.0)(z, point).x0
    else:
        expected = teacher.sample(z, prompts, 1, 1.0, "euler")
    assert output.std() > 0.1 and student.latent_shape == teacher.latent_shape
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    images = untrained_one_step(folder).images(z, prompts)
    assert images.dtype == torch.uint8 and images.shape[:2] == (2, 3)


def test_of_an_edm_it_is_the_paper_s_formula(folders: dict[str, str]) -> None:
    """method.md "CIFAR10 and EDM", written out with diffusers' own preconditioning."""
    folder = folders["EDM of classes"]
    student, labels = student_from_teacher(folder), torch.tensor([3, 4])
    cond = Conditioning.from_labels(labels)
    judge, sigma = diffusers.EDMEulerScheduler(), torch.tensor(80.0)
    z = noise(0, range(2), (3, 8, 8))
    with torch.no_grad():
        time = judge.precondition_noise(sigma)
        output = student.unet(judge.precondition_inputs(80 * z, sigma), time, class_labels=labels).sample
        expected = judge.precondition_outputs(80 * z, output, sigma)
        torch.testing.assert_close(student(z, cond), expected, rtol=1e-5, atol=1e-6)
        assert (student(z, cond) - student(z, cond[[1, 0]])).abs().max() > 1e-2
    assert (student.timestep, student.where) == (-1, "sigma 80")
    with pytest.raises(SettingError, match="student_timestep is 5, but the teacher is preconditioned as in"):
        student_from_teacher(folder, 5)


def test_its_time_is_exact_whatever_the_engine_casts(folders: dict[str, str]) -> None:
    """A UNet2DModel would take 1.0955 for 1, and FSDP2 in bf16 for 1.0938."""
    student, seen = student_from_teacher(folders["EDM of classes"]), list[Tensor]()

    student.unet.time_proj.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    student(noise(0, range(2), (3, 8, 8)), Conditioning.from_labels(torch.tensor([3, 4])))
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0], torch.full((2,), 80.0).log() / 4, rtol=1e-7, atol=0)


@pytest.mark.parametrize("kind", SHORT)
def test_a_combination_in_fp32_of_a_network_in_bf16(kind: str, folders: dict[str, str]) -> None:
    folder, prompts = folders[kind], KINDS[kind][1]
    student = student_from_teacher(folder)
    z = noise(0, range(2), student.latent_shape)
    expected = student(z, told(folder, prompts))
    with torch.autocast("cpu", torch.bfloat16):
        output = student(z, told(folder, prompts))
    assert output.dtype == torch.float32 and not torch.equal(output, expected)
    assert (output - expected).abs().max() < 0.1 * expected.abs().max()


def test_dropout_and_adapters(folders: dict[str, str]) -> None:
    folder, z = folders["EDM of classes"], noise(0, range(2), (3, 8, 8))
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
    bare = Student(unet, pretrained.load_schedule(tiny_teachers.save_pixels(tmp_path)), FAMILIES["unet2d"])
    with pytest.raises(SettingError, match="lora_rank is 2, but the network has no attention to adapt"):
        add_adapters(bare, StudentConfig(lora_rank=2))


def test_a_learned_variance_is_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = tiny_teachers.unet2d(out_channels=6)
    diffusers.DDIMPipeline(
        unet=unet, scheduler=diffusers.DDIMScheduler(**tiny_teachers.LINEAR)
    ).save_pretrained(tmp_path)
    z = noise(0, range(2), (3, 8, 8))
    assert student_from_teacher(str(tmp_path))(z, torch.empty(2, 0)).shape == z.shape


REFUSED = {
    "EDM of classes": "is a DDPMPipeline, which knows no text",
    "EDM of text": "is preconditioned as in EDM",
    "nothing in latents": "is a LDMPipeline, which knows no text",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_there_is_no_discriminator_of_them(kind: str, folders: dict[str, str]) -> None:
    check_teacher(folders[kind], "ode", StudentConfig())
    for refuse in (
        lambda: check_teacher(folders[kind], "gan", StudentConfig()),
        lambda: predict(DistillConfig(stage="gan", teacher=folders[kind]), 1),  # --dry-run
    ):
        with pytest.raises(SettingError, match=f"stage gan needs .*{REFUSED[kind]}; .*`d2g distill ode`"):
            refuse()


def test_guidance_is_told_to_networks_of_text_alone(folders: dict[str, str]) -> None:
    config = StudentConfig(guidance_conditioning=True)
    with pytest.raises(SettingError, match=r"guidance_conditioning is true, but .* no input for a guidance"):
        check_teacher(folders["classes in pixels"], "ode", config)
    check_teacher(folders["EDM of text"], "ode", config)
    assert student_from_teacher(folders["EDM of text"], -1, config).guided
    assert not student_from_teacher(folders["classes in pixels"]).guided


@pytest.mark.parametrize("kind", SHORT)
def test_memory_is_foretold(kind: str, folders: dict[str, str]) -> None:
    """Weights and states in closed form; a forward pass on fake tensors is what it is with data."""
    folder = folders[kind]
    params = sum(p.numel() for p in pretrained.load_on_meta(folder, "unet").parameters())
    config = DistillConfig(
        teacher=folder,
        student=StudentConfig(dropout=0.1),
        regression=RegressionConfig(losses=(("mse", 1.0),)),
        train=TrainConfig(batch_size=4096, precision="fp32"),
    )
    one_step, two = (
        predict(config, 1),
        predict(replace(config, engine=EngineConfig(gradient_accumulation=2)), 1),
    )
    assert one_step.weights == pytest.approx(4 * params / 2**30)
    assert one_step.optimizer == pytest.approx(2 * one_step.weights) and one_step.frozen == 0
    assert 0.4 < two.working / one_step.working < 0.6, "activations of rows, not weights, fill it"


@pytest.mark.parametrize("kind", ["EDM of classes", "nothing in latents"])
def test_lpips_in_pixels_counts(kind: str, folders: dict[str, str]) -> None:
    """What fake tensors keep of it, decoder and enlarging included, is what it keeps with data."""
    folder, rows = folders[kind], 2048
    lpips = RegressionConfig(losses=(("lpips", 1.0),), lpips_net="squeeze", lpips_resize=40)
    plain = DistillConfig(
        teacher=folder,
        regression=RegressionConfig(losses=(("mse", 1.0),)),
        train=TrainConfig(batch_size=rows, precision="fp32"),
    )
    without, found = (predict(c, 1) for c in (plain, replace(plain, regression=lpips)))
    vae = pretrained.load_vae(folder).requires_grad_(False)
    metric = PixelLPIPS("squeeze", pretrained=False, decode=partial(decode, vae), resize=40)
    shape = student_from_teacher(folder).latent_shape
    pred, target = noise(0, range(2), shape).requires_grad_(), noise(1, range(2), shape)
    real = saved_bytes(nn.ModuleList([metric, vae]), lambda: metric(pred, target), False)
    gib = (found.working - without.working) * 2**30
    assert gib == pytest.approx(rows / 2 * real, rel=0.02) and real > 0
    trunk = sum(p.numel() for p in metric.parameters())
    decoder = sum(p.numel() for p in vae.parameters()) if family_of(folder).autoencoder else 0
    assert found.frozen * 2**30 == pytest.approx(4 * (trunk + decoder))


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        ("e_latent_lpips", "there is no e_latent_lpips; expected .* mse, l1, pseudo_huber or lpips"),
        ("decoder_features:1", "there is no decoder_features; expected regression.losses of mse, l1"),
        ("mse:1,latent_lpips:1", "there is no latent_lpips; expected"),
    ],
)
def test_there_is_no_latent_distance_of_pixels(losses: str, says: str, folders: dict[str, str]) -> None:
    config = override(DistillConfig(teacher=folders["EDM of classes"]), [f"regression.losses={losses}"])
    with pytest.raises(SettingError, match=f"generates pixels, for which {says}"):
        build_regression(config, 3)
