"""FLUX.1 teachers, a flow that takes the guidance scale as an input, against diffusers' FluxPipeline."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import tiny_teachers
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import noise
from d2g.diffusion.families.registry import FAMILIES
from d2g.diffusion.teacher import check_solver, describe_teacher, load_teacher
from distill.models.student import student_from_teacher
from distill.sampling import load_student, untrained_one_step
from pairgen.cost import plan_pairs
from pairgen.generate import generate_pairs
from pairgen.store.reader import PairReader

SHAPE, PROMPTS = (8, 4, 4), [*tiny.CAPTIONS[:2], ""]
FLUX = FAMILIES["flux"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("flux") / "teacher"
    tiny_teachers.save_flux(out)
    return out


def pipeline_latents(folder: Path, z: Tensor, steps: int, guidance: float) -> Tensor:
    pipe = tiny_teachers.diffusers_pipeline(folder)
    height, width = z.shape[2:]
    packed = pipe(
        PROMPTS,
        latents=FLUX.pack(z),
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=4 * height,
        width=4 * width,
        output_type="latent",
    ).images
    return FLUX.unpack(packed, (height, width))


def test_pairs_equal_diffusers_pipeline(folder: Path) -> None:
    teacher = load_teacher(str(folder))
    for steps, guidance, size in ((8, 3.5, (4, 4)), (7, 1.0, (4, 4)), (1, 3.5, (4, 4)), (5, 2.0, (6, 4))):
        z = noise(0, range(3), (8, *size))
        result = teacher.sample(z, PROMPTS, steps, guidance, "euler")
        assert result.abs().max() > 0.5
        expected = pipeline_latents(folder, z, steps, guidance)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)
    other = teacher.sample(z, PROMPTS, steps, 3.0, "euler")
    assert (other - result).abs().max() > 1e-3, "the scale must change the picture"


def test_a_static_shift_equals_the_pipelines(tmp_path: Path) -> None:
    folder, z = tmp_path / "static", noise(0, range(3), SHAPE)
    tiny_teachers.save_flux(folder, use_dynamic_shifting=False)
    teacher = load_teacher(str(folder))
    result = teacher.sample(z, PROMPTS, 6, 3.5, "euler")
    torch.testing.assert_close(result, pipeline_latents(folder, z, 6, 3.5), rtol=0, atol=1e-4)
    assert teacher.facts["shift"] == 3.0 and teacher.schedule.spacing == "trailing"


def test_packing_is_the_pipelines() -> None:
    from diffusers import FluxPipeline

    latents = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    packed = FLUX.pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 3, 4, 6))
    assert torch.equal(FLUX.unpack(packed, (4, 6)), latents)


def test_guidance_costs_no_second_evaluation(folder: Path, tmp_path: Path) -> None:
    teacher, rows = load_teacher(str(folder)), []
    teacher.network.register_forward_pre_hook(
        lambda module, args, settings: rows.append(len(settings["hidden_states"])), with_kwargs=True
    )
    teacher.sample(noise(0, range(3), SHAPE), PROMPTS, 4, 3.5, "euler")
    assert rows == [3] * 4
    config = tiny.pair_config(
        str(folder), tiny.save_prompts(tmp_path / "prompts.txt"), solver="euler", guidance=3.5
    )
    assert plan_pairs(config, batches=1)["evaluations_per_pair"] == 4
    generate_pairs(config, tmp_path / "pairs")
    spec = PairReader(tmp_path / "pairs").spec
    assert spec.guidance == 3.5 and spec.teacher_facts["guidance"] == "embedded"
    assert spec.evaluations_per_pair == 4


def test_the_untrained_student_takes_the_usual_scale(folder: Path) -> None:
    one, teacher = untrained_one_step(str(folder)), load_teacher(str(folder))
    z = noise(0, range(3), SHAPE)
    expected = teacher.sample(z, PROMPTS, 1, 3.5, "euler")
    assert one.guidance == 3.5 and one.student.guided
    torch.testing.assert_close(one.latents(z, PROMPTS), expected, rtol=1e-4, atol=1e-4)


def test_a_student_is_drawn_at_the_scale_of_its_pairs(folder: Path, tmp_path: Path) -> None:
    from distill.config.export import ExportConfig
    from distill.export.export import export
    from distill.training.train import train
    from jobs import distill_config

    tiny.save_lpips(folder / "latent_lpips", 8)
    prompts = tiny.save_prompts(tmp_path / "prompts.txt")
    generate_pairs(tiny.pair_config(str(folder), prompts, solver="euler", guidance=2.5), tmp_path / "pairs")
    train(distill_config(folder, tmp_path / "pairs", "train.images=4"), tmp_path / "run")
    export(ExportConfig(student=str(tmp_path / "run")), tmp_path / "small")
    for name in ("run", "small"):
        assert load_student(str(tmp_path / name)).guidance == 2.5
    z, prompt = noise(0, [0], SHAPE), PROMPTS[:1]
    one = load_student(str(tmp_path / "run"))
    cond = one.conditioner.encode(prompt)
    at = [one.student(z, cond, torch.tensor([scale])) for scale in (2.5, 4.0)]
    assert torch.equal(one.latents(z, prompt), at[0]) and (at[0] - at[1]).abs().max() > 1e-4


def edited(tmp_path: Path, **network: Any) -> str:
    folder = tmp_path / "odd"
    tiny_teachers.save_flux(folder, network)
    return str(folder)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"guidance_embeds": False}, "guidance_embeds=false, as FLUX.1-schnell, .*; expected a FLUX.1-dev"),
        ({"in_channels": 64, "out_channels": 32}, "takes 64 channels, but latents have 32, packed 2 x 2"),
        ({"patch_size": 2}, "patch_size=2; FluxPipeline feeds patches of 1"),
        ({"axes_dims_rope": (2, 2, 2)}, r"axes_dims_rope=\[2, 2, 2\]; expected three numbers with the sum 8"),
        ({"pooled_projection_dim": 20}, "pooled text is 16 numbers wide, but transformer takes 20"),
        ({"joint_attention_dim": 20}, "T5's text is 24 numbers wide, but transformer takes 20"),
    ],
)
def test_other_networks_are_refused(network: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_teacher(edited(tmp_path, **network))
    assert "\n" not in str(caught.value)


def test_a_transformer_of_other_blocks_is_refused(tmp_path: Path) -> None:
    folder = Path(edited(tmp_path))
    tiny_teachers.edit(folder, "model_index.json", transformer=["diffusers", "ChromaTransformer2DModel"])
    with pytest.raises(UserError, match="transformer is a ChromaTransformer2DModel; supported: FluxTransf"):
        load_teacher(str(folder))


def test_unsupported_settings_are_refused(folder: Path) -> None:
    teacher = load_teacher(str(folder))
    check_solver(teacher, "euler", 28, 3.5)
    with pytest.raises(SettingError, match=r"latent size is 5x4; .* takes multiples of 2"):
        check_solver(teacher, "euler", 28, 3.5, size=(5, 4))
    with pytest.raises(SettingError, match=r"guidance_rescale is 0.7, but .* takes guidance as an input"):
        check_solver(teacher, "euler", 28, 3.5, 0.7)


def test_description(folder: Path, tmp_path: Path) -> None:
    result = describe_teacher(str(folder))
    assert result["latent_shape"] == [8, 4, 4] and result["conditioning"]["guidance"]
    assert result["facts"]["guidance"] == "embedded" and result["facts"]["t5_tokens"] == 512
    assert result["solver_defaults"]["spacing"] == "trailing"
    unsized = Path(shutil.copytree(folder, tmp_path / "unsized"))
    tiny_teachers.edit(unsized, "transformer/config.json", sample_size=None)
    assert describe_teacher(str(unsized))["latent_shape"] == [8, 128, 128], "the pipeline's default"
    assert student_from_teacher(str(unsized)).latent_shape == (8, 128, 128)
