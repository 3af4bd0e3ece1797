"""Stages of Stable Cascade and Wuerstchen as teachers, against diffusers' pipelines with a DDIM step."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMWuerstchenScheduler
from torch import Tensor

import tiny
import tiny_teachers
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import noise
from d2g.diffusion import pretrained
from d2g.diffusion.latents import decode, latent_space
from d2g.diffusion.pipelines import open_pipeline
from d2g.diffusion.schedule import CosineSchedule
from d2g.diffusion.teacher import check_solver, load_teacher

PROMPTS = [tiny.CAPTIONS[0], " A RED Cube ", ""]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers calls these pipelines deprecated


class Deterministic(DDPMWuerstchenScheduler):
    """DDIM with eta = 0 (Song et al. 2021, eq. 12) on the table of diffusers' own scheduler."""

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **_: Any) -> Any:  # type: ignore[override]
        now, after = (
            self._alpha_cumprod(t, sample.device).view(-1, 1, 1, 1)
            for t in (timestep, self.previous_timestep(timestep))
        )
        x0 = (sample - (1 - now).sqrt() * model_output) / now.sqrt()
        return type("Output", (), {"prev_sample": after.sqrt() * x0 + (1 - after).sqrt() * model_output})


@pytest.fixture(scope="module", params=tiny_teachers.CASCADES)
def stages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root, (save_prior, save_decoder) = tmp_path_factory.mktemp("c"), tiny_teachers.CASCADES[request.param]
    return Path(save_prior(root / "prior")), Path(save_decoder(root / "decoder"))


def draw_rows(pipe: Any, prior: Tensor, z: Tensor, **settings: Any) -> Tensor:
    """Images or latents of stage B row by row: WuerstchenDecoderPipeline repeats prompts for every row."""
    rows = [
        pipe(prior[i : i + 1], PROMPTS[i : i + 1], latents=z[i : i + 1], **settings).images
        for i in range(len(z))
    ]
    return torch.cat(rows)


def deterministic(folder: Path) -> Any:
    """diffusers' pipeline from its components, because it does not find classes that it has saved."""
    name, pipeline = str(folder), open_pipeline(str(folder))
    parts = {
        component: pretrained.load_model(name, component)
        for component in pipeline.components
        if component not in ("scheduler", "tokenizer")
    }
    facts = {"resolution_multiple": 42.67} if "prior" in parts else {"latent_dim_scale": 2.0}
    pipe = getattr(diffusers, pipeline.kind)(
        **parts,
        **facts,
        tokenizer=pretrained.load_tokenizer(name),
        scheduler=Deterministic.from_pretrained(folder / "scheduler"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("steps", "guidance"), [(4, 4.0), (3, 1.0), (1, 4.0)])
def test_stage_c_equals_diffusers_pipeline(stages: tuple[Path, Path], steps: int, guidance: float) -> None:
    teacher, z = load_teacher(str(stages[0]), final_alpha="teacher"), noise(0, range(3), (3, 4, 4))
    result = teacher.sample(z, PROMPTS, steps, guidance, "ddim")
    pipe = deterministic(stages[0])
    expected = pipe(
        PROMPTS, latents=z, num_inference_steps=steps, guidance_scale=guidance, height=170, width=170
    ).image_embeddings
    if "Wuerstchen" in teacher.pipeline:  # its pipeline returns what stage B reads
        expected = (expected + 1) / 42
    # Relative to the largest value: at the start, x_0 has the errors of the network times 1 / alpha = 100.
    size = expected.abs().max()
    assert size > 0.5
    torch.testing.assert_close(result / size, expected / size, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("scaler", "offset"), [(1.0, 0.008), (2.0, 0.008), (0.5, 0.02)])
def test_the_schedule_is_the_schedulers(scaler: float, offset: float) -> None:
    scheduler = DDPMWuerstchenScheduler(scaler=scaler, s=offset)
    schedule = CosineSchedule(scaler=scaler, offset=offset, final_alpha_one=False)
    scheduler.set_timesteps(7)
    points = schedule.points(7, (4, 4))
    times = torch.tensor([point.t / 1000 for point in points[:-1]] + [0.0])
    torch.testing.assert_close(times, scheduler.timesteps)
    bars = scheduler._alpha_cumprod(scheduler.timesteps, torch.device("cpu"))
    torch.testing.assert_close(torch.tensor([point.alpha**2 for point in points]), bars)


def test_one_step_of_the_scheduler_ends_short_of_the_students_latents() -> None:
    """Therefore there is no export to diffusers: it ends at alpha_bar = 0.9999, without fresh noise."""
    scheduler, student = (
        DDPMWuerstchenScheduler(),
        CosineSchedule(scaler=1.0, offset=0.008, final_alpha_one=True),
    )
    x, output = noise(0, range(2), (3, 4, 4)), noise(1, range(2), (3, 4, 4))
    scheduler.set_timesteps(1)
    result = scheduler.step(output, scheduler.timesteps[:1].expand(2), x).prev_sample
    expected = student.x0(output, x, student.one_step(-1))
    torch.testing.assert_close(result, 0.9999**0.5 * expected, rtol=5e-6, atol=1e-5)


@pytest.mark.parametrize(("steps", "guidance"), [(4, 1.5), (3, 1.0)])
def test_stage_b_equals_diffusers_pipeline(stages: tuple[Path, Path], steps: int, guidance: float) -> None:
    teacher = load_teacher(str(stages[1]), final_alpha="teacher")
    z, prior = noise(0, range(3), (4, 8, 8)), noise(1, range(3), (3, 4, 4))
    cond = teacher.encode(PROMPTS).with_prior(prior)
    result = teacher.sample(z, PROMPTS, steps, guidance, "ddim", cond=cond)
    settings: dict[str, Any] = dict(num_inference_steps=steps, guidance_scale=guidance)
    pipe = deterministic(stages[1])
    read = 42 * prior - 1 if "Wuerstchen" in teacher.pipeline else prior
    expected = draw_rows(pipe, read, z, output_type="latent", **settings)
    size = expected.abs().max()
    assert size > 0.5
    torch.testing.assert_close(result / size, expected / size, rtol=0, atol=1e-4)
    # Stage C's latents matter, and the VQGAN is scaled and decoded as by the pipeline.
    other = teacher.sample(
        z, PROMPTS, steps, guidance, "ddim", cond=teacher.encode(PROMPTS).with_prior(2 * prior)
    )
    assert (other - result).abs().max() / size > 1e-2
    images = draw_rows(pipe, read, z, output_type="pt", **settings)
    vae = pretrained.load_vae(str(stages[1]))
    with torch.no_grad():
        pixels = decode(vae, expected).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(pixels, images, rtol=0, atol=1e-5)
    assert (latent_space(vae).downscale, latent_space(vae).channels) == (4, 4)


@pytest.mark.parametrize(
    ("stage", "file", "values", "message"),
    [
        (
            "stable_cascade",
            1,
            {"effnet_in_channels": None},
            "has no effnet_in_channels, the input for latents",
        ),
        (
            "stable_cascade",
            0,
            {"clip_text_pooled_in_channels": 8},
            "pooled text is 16 numbers wide, but prior",
        ),
        ("wuerstchen", 0, {"c_cond": 8}, "text is 16 numbers wide, but prior takes 8"),
        ("wuerstchen", 1, {"c_in": 3}, "WuerstchenDiffNeXt takes 3 channels, but latents have 4"),
    ],
)
def test_networks_that_are_no_stage_are_refused(
    stage: str, file: int, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "teacher"
    tiny_teachers.CASCADES[stage][file](folder)
    tiny_teachers.edit(folder, f"{('prior', 'decoder')[file]}/config.json", **values)
    with pytest.raises(UserError, match=message):
        load_teacher(str(folder))


def test_sizes_and_spacings_that_do_not_fit_are_refused(stages: tuple[Path, Path]) -> None:
    teacher = load_teacher(str(stages[1]))
    with pytest.raises(SettingError, match=r"latent size is 6x7; teacher .* takes multiples of [24]"):
        check_solver(teacher, "ddim", 4, size=(6, 7))
    with pytest.raises(
        SettingError, match=r"latent size is 2x2; teacher .* takes (4 or more|multiples of 4)"
    ):
        check_solver(teacher, "ddim", 4, size=(2, 2))
    with pytest.raises(SettingError, match=r"the cosine schedule of teacher .* is continuous"):
        load_teacher(str(stages[0]), spacing="leading")


def test_another_normalization_of_stage_c_is_refused(tmp_path: Path) -> None:
    folder = Path(tiny_teachers.save_wuerstchen_prior(tmp_path / "teacher"))
    tiny_teachers.edit(folder, "model_index.json", latent_mean=40.0)
    with pytest.raises(UserError, match=r"has latent_mean=40\.0; expected 42"):
        load_teacher(str(folder))


@pytest.mark.parametrize("t", [987, 1000])
def test_a_stage_in_bf16_reads_the_same_time(stages: tuple[Path, Path], t: int) -> None:
    """diffusers multiplies the time by 10,000 in the type of the latents: in bf16 it would be another one."""
    for folder in stages:
        exact, half = (load_teacher(str(folder), "cpu", precision) for precision in ("fp32", "bf16"))
        cond, x = exact.encode(["a", "b"]), noise(0, range(2), exact.latent_shape)
        if exact.family.prior_family is not None:
            channels = exact.family.prior_channels(exact.config)
            cond = cond.with_prior(noise(1, range(2), (channels, 4, 4)))
        expected, rounded = (
            loaded.family.forward(
                loaded.network, loaded.config, x.to(next(loaded.network.parameters()).dtype), t, cond, 1
            )
            for loaded in (exact, half)
        )
        assert (rounded.float() - expected).square().mean().sqrt() < 0.03 * expected.std()
        # FSDP2 passes the time in bf16; the last one, 1, is exact there.
        name = exact.family.time_embedding  # type: ignore[attr-defined]
        embed = getattr(exact.network, name)
        end = torch.ones(2)
        torch.testing.assert_close(embed(end.bfloat16()), embed(end).bfloat16(), rtol=0, atol=0)
