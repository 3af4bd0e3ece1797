"""distill.models.student: a student starts as the teacher's own x_0 prediction, for every kind of teacher."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
import tiny_teachers
from d2g.core.errors import SettingError
from d2g.core.seeds import noise
from d2g.diffusion import lora, pretrained
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.families.registry import FAMILIES
from d2g.diffusion.teacher import load_teacher
from distill.config.presets import PIXEL_RECIPES
from distill.config.student import StudentConfig
from distill.models.row_dropout import RowDropout, row_keys, set_dropout_keys, set_row_dropout
from distill.models.student import (
    DiffusionStudent,
    guidance_embedding,
    meta_student,
    set_trainable,
    student_from_teacher,
)
from distill.planning.reference_models import configs_only


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_student_starts_as_the_teachers_x0_prediction(tmp_path: Path, prediction: str) -> None:
    """One DDIM step from T to clean data gives x_0 hat; reference: the teacher's sampler."""
    tiny.save_teacher(tmp_path, prediction_type=prediction, timestep_spacing="trailing")
    z, prompts = noise(0, range(3), (4, 4, 4)), tiny.CAPTIONS[:3]
    teacher, student = load_teacher(str(tmp_path)), student_from_teacher(str(tmp_path))
    output = student(z, teacher.encode(prompts))
    expected = teacher.sample(z, prompts, 1, 1.0, "ddim")
    assert student.timestep == 999
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_student_follows_the_papers_formula(teacher: Path) -> None:
    """Supplement eq. 2 with SD's alpha and sigma at 999 (method.md "Solver equations"), on the raw network
    output.
    """
    student = student_from_teacher(str(teacher))
    z, text = noise_and_text(2)
    epsilon = student.unet(z, 999, text.tensors["hidden"]).sample
    torch.testing.assert_close(student(z, text), (z - 0.997667 * epsilon) / 0.068265, rtol=1e-3, atol=1e-3)


def test_student_has_exactly_the_unets_parameters(teacher: Path) -> None:
    student = student_from_teacher(str(teacher))
    names = {f"unet.{name}" for name in pretrained.load_unet(str(teacher)).state_dict()}
    assert set(student.state_dict()) == names and student.latent_shape == (4, 4, 4)


def test_x0_is_computed_in_fp32_under_autocast(teacher: Path) -> None:
    """Division by alpha magnifies the network's bf16 rounding by 15; rounding the sum would add to it."""
    student = student_from_teacher(str(teacher))
    z, text = noise_and_text(2)
    with torch.autocast("cpu", torch.bfloat16):
        output, raw = student(z, text), student.unet(z, 999, text.tensors["hidden"]).sample
    assert raw.dtype == torch.bfloat16 and output.dtype == torch.float32
    torch.testing.assert_close(
        output, (z - student.point.sigma * raw.float()) / student.point.alpha, rtol=1e-5, atol=1e-5
    )


def test_student_timestep(teacher: Path) -> None:
    schedule = pretrained.load_schedule(str(teacher))
    student = student_from_teacher(str(teacher), 981)
    assert student.timestep == 981 and student.point[1:] == schedule.alpha_sigma(981)
    for timestep in (1000, -2):
        with pytest.raises(SettingError, match=f"student_timestep is {timestep}; expected 0 to 999"):
            student_from_teacher(str(teacher), timestep)


def test_zero_terminal_snr_is_finite_for_v_and_refused_for_epsilon(teacher: Path) -> None:
    """At alpha = 0, v-prediction gives x_0 = -v; epsilon divides by zero (method.md "One-step formulas")."""
    schedule = pretrained.load_schedule(str(teacher))
    bars = schedule.alphas_cumprod.clone()
    bars[-1] = 0.0
    zero = replace(schedule, alphas_cumprod=bars, prediction="v_prediction")
    unet = pretrained.load_unet(str(teacher))
    z, hidden = noise(0, range(1), (4, 4, 4)), torch.zeros(1, 12, 16)
    text, family = Conditioning.from_text(hidden), FAMILIES["sd"]
    student = DiffusionStudent(unet, zero, family)
    torch.testing.assert_close(student(z, text), -unet(z, 999, hidden).sample)
    with pytest.raises(Exception, match="zero terminal SNR"):
        DiffusionStudent(unet, replace(zero, prediction="epsilon"), family)(z, text)


def noise_and_text(rows: int = 3) -> tuple[Tensor, Conditioning]:
    text = torch.randn(rows, 12, 16, generator=torch.Generator().manual_seed(0))
    return noise(0, range(rows), (4, 4, 4)), Conditioning.from_text(text)


def test_sdxl_student_starts_as_its_teacher(tmp_path: Path) -> None:
    """Pooled text and image size reach the network; reference: the teacher's sampler."""
    tiny_teachers.save_sdxl(tmp_path, timestep_spacing="trailing")
    z, prompts = noise(0, range(3), (4, 4, 4)), tiny.CAPTIONS[:3]
    teacher, student = load_teacher(str(tmp_path)), student_from_teacher(str(tmp_path))
    text = pretrained.load_conditioner(str(tmp_path)).encode(prompts)
    hidden, pooled = text.tensors["hidden"], text.tensors["pooled"]
    rows = teacher.encode(prompts).tensors
    assert torch.equal(hidden, rows["hidden"]) and torch.equal(pooled, rows["pooled"])
    expected = teacher.sample(z, prompts, 1, 1.0, "ddim")
    torch.testing.assert_close(student(z, text), expected, rtol=1e-4, atol=1e-3)
    other = student(z, Conditioning.from_text(hidden, pooled.flip(0)))
    assert (other - expected).abs().max() > 1e-2
    sizes = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]] * 3)
    same = student(z, Conditioning.from_text(hidden, pooled, sizes))
    torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-3)


# Adapters.


def with_adapters(teacher: Path, **settings: Any) -> tuple[DiffusionStudent, StudentConfig]:
    config = StudentConfig(lora_rank=2, **settings)
    student = student_from_teacher(str(teacher), -1, config, seed=3)
    set_trainable(student, config)
    return student, config


def train_two_steps(student: DiffusionStudent) -> None:
    """Train until every trainable weight has changed."""
    z, text = noise_and_text()
    guidance = (torch.tensor([1.0, 3.0, 8.0]),) if student.guided else ()
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # lora_B is zero at first, so lora_A changes in the second step
        optimizer.zero_grad()
        student(z, text, *guidance).square().mean().backward()
        optimizer.step()


def test_adapters_start_without_effect_and_only_they_are_trained(teacher: Path) -> None:
    student, _ = with_adapters(teacher)
    z, text = noise_and_text()
    plain = student_from_teacher(str(teacher))
    assert torch.equal(student(z, text), plain(z, text))
    before = {k: v.clone() for k, v in student.state_dict().items()}
    train_two_steps(student)
    changed = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    adapter_names = {k for k in before if ".lora_A." in k or ".lora_B." in k}
    assert changed == adapter_names == {n for n, p in student.named_parameters() if p.requires_grad}
    layers = {k.split(".lora_")[0].rpartition("attn")[2][2:] for k in adapter_names}
    assert layers == {"to_q", "to_k", "to_v", "to_out.0"}
    assert all(min(student.state_dict()[k].shape) == 2 for k in adapter_names)


def test_merged_adapters_give_the_same_latents(teacher: Path) -> None:
    """W + alpha / rank B A in the plain network equals the adapted network and peft's merge."""
    student, config = with_adapters(teacher, lora_alpha=5.0)
    train_two_steps(student)
    plain = student_from_teacher(str(teacher))
    z, text = noise_and_text()
    start = plain(z, text)
    tensors = lora.merged(student.state_dict(), config.lora_rank, config.alpha)
    plain.load_state_dict(tensors, strict=True)
    torch.testing.assert_close(plain(z, text), student(z, text), rtol=1e-4, atol=1e-4)
    assert (plain(z, text) - start).abs().max() > 1e-2
    assert lora.has_lora(student.state_dict()) and not lora.has_lora(tensors)
    for name, module in student.named_modules():
        if hasattr(module, "merge") and hasattr(module, "get_base_layer"):
            module.merge()
            torch.testing.assert_close(module.get_base_layer().weight, tensors[f"{name}.weight"])


def test_adapters_depend_on_the_seed_only(teacher: Path) -> None:
    state = torch.get_rng_state()
    a = student_from_teacher(str(teacher), -1, StudentConfig(lora_rank=2), seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    b = student_from_teacher(str(teacher), -1, StudentConfig(lora_rank=2), seed=3).state_dict()
    c = student_from_teacher(str(teacher), -1, StudentConfig(lora_rank=2), seed=4).state_dict()
    first = [k for k in a if ".lora_A." in k]
    assert all(torch.equal(a[k], b[k]) for k in a) and all(not torch.equal(a[k], c[k]) for k in first)
    for k in first:
        bound = a[k].shape[1] ** -0.5
        assert a[k].abs().max() <= bound and a[k].std() > 0.3 * bound


# Guidance as an input.


def test_guidance_starts_without_effect_and_can_be_learned(teacher: Path) -> None:
    student = student_from_teacher(str(teacher), -1, StudentConfig(guidance_conditioning=True))
    z, text = noise_and_text()
    low, high = torch.full((3,), 1.5), torch.full((3,), 8.0)
    plain = student_from_teacher(str(teacher))(z, text)
    assert student.guided and not student_from_teacher(str(teacher)).guided
    assert torch.equal(student(z, text, low), plain) and torch.equal(student(z, text, high), plain)
    student.requires_grad_(True)
    student.unet.time_embedding.cond_proj.weight.data.normal_(
        std=0.5, generator=torch.Generator().manual_seed(0)
    )
    output = student(z, text, torch.tensor([1.5, 8.0, 1.5]))
    torch.testing.assert_close(output[0], student(z, text, low)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output[1], student(z, text, high)[1], rtol=1e-4, atol=1e-4)
    assert (student(z, text, low) - student(z, text, high)).abs().max() > 1e-2
    with pytest.raises(AssertionError, match="one guidance scale for each row"):
        student(z, text)


def test_training_changes_the_guidance_weight(teacher: Path) -> None:
    config = StudentConfig(guidance_conditioning=True, lora_rank=2)
    student = student_from_teacher(str(teacher), -1, config)
    set_trainable(student, config)
    train_two_steps(student)
    assert student.unet.time_embedding.cond_proj.weight.abs().max() > 0


def test_guidance_embedding_equals_that_of_diffusers() -> None:
    """StableDiffusionPipeline(guidance_scale=w) passes this embedding to an exported student."""
    from diffusers import StableDiffusionPipeline

    scales = torch.tensor([1.0, 1.5, 3.0, 8.0])
    expected = StableDiffusionPipeline.get_guidance_scale_embedding(None, scales - 1, 256)  # type: ignore[arg-type]
    torch.testing.assert_close(guidance_embedding(scales, 256), expected, rtol=1e-4, atol=2e-3)


def test_teacher_dropout_is_disabled(teacher: Path, tmp_path: Path) -> None:
    """Also for networks on the meta device, and after row dropout is disabled and enabled again."""
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dropout": 0.5}))
    student_config = StudentConfig(dropout=0.3)
    students = [make(str(folder), -1, student_config) for make in (student_from_teacher, meta_student)]
    for network in (
        *students,
        student_from_teacher(str(folder)),
        pretrained.load_on_meta(str(folder), "unet"),
    ):
        set_row_dropout(network, enabled=False)
        assert not any(isinstance(m, RowDropout) and m.training for m in network.modules())
        set_row_dropout(network, enabled=True)
        others = [m for m in network.modules() if isinstance(m, nn.Dropout)]
        assert others and not any(m.training for m in others)
    assert all(any(isinstance(m, RowDropout) and m.training for m in s.modules()) for s in students)


def test_dropout_in_the_residual_blocks(teacher: Path) -> None:
    student = student_from_teacher(str(teacher), -1, StudentConfig(dropout=0.5))
    z, text = noise_and_text()
    with pytest.raises(AssertionError, match="a key for each row"):
        student(z, text)
    set_dropout_keys(student, row_keys(0, range(len(z))))
    a, repeated = student(z, text), student(z, text)
    set_dropout_keys(student, row_keys(1, range(len(z))))
    b = student(z, text)
    assert torch.equal(a, repeated) and not torch.equal(a, b)
    plain = student_from_teacher(str(teacher))
    assert torch.equal(plain(z, text), plain(z, text))


def test_frozen_parameters_stay(teacher: Path, tmp_path: Path) -> None:
    """`student.freeze` takes patterns; the published share of EDM's network is D2O's 85 %."""
    student = student_from_teacher(str(teacher))
    set_trainable(student, StudentConfig(freeze=("*.conv1.*", "conv_in.bias")))
    frozen = {n for n, p in student.network.named_parameters() if not p.requires_grad}
    assert "conv_in.bias" in frozen and all(".conv1." in n or n == "conv_in.bias" for n in frozen)
    for pattern, message in (("conv9.*", "which matches no parameter"), ("*", "leaves nothing to train")):
        with pytest.raises(SettingError, match=message):
            set_trainable(student, StudentConfig(freeze=(pattern,)))
    with pytest.raises(SettingError, match="with lora_rank=2 the adapters alone are trained"):
        StudentConfig(freeze=("*",), lora_rank=2)
    recipe = PIXEL_RECIPES["d2o"]["gan"]
    edm = meta_student(configs_only("edm-cifar10", tmp_path / "edm"), -1)
    set_trainable(edm, recipe.student)
    frozen_count = sum(p.numel() for p in edm.parameters() if not p.requires_grad)
    assert frozen_count / sum(p.numel() for p in edm.parameters()) == pytest.approx(0.85, abs=0.02)
