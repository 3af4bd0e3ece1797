"""Stable Cascade's stages as teachers, against diffusers' own pipelines with a deterministic step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler
from torch import Tensor

import tiny
import tiny_teachers
from d2g.core.seeds import noise
from d2g.diffusion.schedule import CosineSchedule
from d2g.diffusion.teacher import load_teacher

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


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("cascade")
    return (
        Path(tiny_teachers.save_cascade_prior(root / "prior")),
        Path(tiny_teachers.save_cascade_decoder(root / "decoder")),
    )


def deterministic(folder: Path) -> Any:
    pipe = tiny_teachers.diffusers_pipeline(folder)
    pipe.scheduler = Deterministic.from_config(pipe.scheduler.config)
    return pipe


@pytest.mark.parametrize(("steps", "guidance"), [(4, 4.0), (3, 1.0), (1, 4.0)])
def test_stage_c_equals_diffusers_pipeline(stages: tuple[Path, Path], steps: int, guidance: float) -> None:
    teacher, z = load_teacher(str(stages[0]), final_alpha="teacher"), noise(0, range(3), (3, 4, 4))
    result = teacher.sample(z, PROMPTS, steps, guidance, "ddim")
    pipe = deterministic(stages[0])
    expected = pipe(
        PROMPTS, latents=z, num_inference_steps=steps, guidance_scale=guidance, height=170, width=170
    ).image_embeddings
    size = expected.abs().max()
    assert size > 0.5
    torch.testing.assert_close(result / size, expected.float() / size, rtol=0, atol=1e-4)


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
