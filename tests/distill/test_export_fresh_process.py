"""Exports that a new process draws with diffusers alone, from noise of its own."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
import tiny_teachers
from d2g.diffusion.latents import decode
from distill.config.export import ExportConfig
from distill.export.export import export
from distill.sampling import load_student
from exported import PROMPT, save_run

TEACHERS: dict[str, Callable[[Path], str]] = {
    "sd": tiny.save_teacher,
    "sd3": tiny_teachers.save_sd3,
    "flux": tiny_teachers.save_flux,
    "sana": tiny_teachers.save_sana,
    "pixart": lambda folder: tiny_teachers.save_pixart(folder, sigma=True),
    "dit": lambda folder: tiny_teachers.save_dit(folder, classes=6),
    "ldm": tiny_teachers.save_ldm,
}
"""Families with an export to diffusers; SDXL and UNet2D share the code of Stable Diffusion and LDM."""

DRAW = """
import json, sys, torch, diffusers
from safetensors.torch import save_file
images = {}
for name, (folder, settings) in json.loads(sys.argv[1]).items():
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    rng = torch.Generator().manual_seed(0)
    drawn = pipe(**settings, num_inference_steps=1, generator=rng, output_type="np").images
    images[name] = torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()
ours = {"d2g", "distill", "pairgen", "eval", "latent_lpips"} & {name.split(".")[0] for name in sys.modules}
assert not ours, ours
save_file(images, sys.argv[2])
"""


@pytest.mark.slow
def test_a_new_process_draws_the_student_without_this_project(tmp_path: Path) -> None:
    jobs: dict[str, tuple[str, dict[str, Any]]] = {}
    expected = {}
    for name, save in TEACHERS.items():
        run, out = (
            save_run(tmp_path / name / "run", save(tmp_path / name / "teacher")),
            tmp_path / name / "out",
        )
        export(ExportConfig(student=run, format="diffusers"), out)
        one = load_student(run)
        # The student's images of the noise that the pipeline will draw.
        shape, family = one.student.latent_shape, one.student.family
        z = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        prompts = PROMPT if family.reads_text else ["2", "5"] if name == "dit" else ["", ""]
        with torch.no_grad():
            expected[name] = (decode(one.vae, one.latents(z, prompts)) / 2 + 0.5).clamp(0, 1)
        # The settings on the card.
        settings: dict[str, Any] = {"guidance_scale": one.guidance if one.student.guided else 1}
        if family.reads_text:
            pixels = (shape[1] * one.student.downscale, shape[2] * one.student.downscale)
            settings |= {"prompt": prompts, **family.pipeline_settings(pixels)}
        else:
            settings = settings | {"class_labels": [2, 5]} if name == "dit" else {"batch_size": 2}
        jobs[name] = (str(out), settings)
    script = [sys.executable, "-W", "ignore", "-c", DRAW, json.dumps(jobs), str(tmp_path / "images")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    images = load_file(tmp_path / "images")
    assert images.keys() == TEACHERS.keys()
    for name, image in images.items():
        assert image.std() > 0.01, name
        torch.testing.assert_close(
            image, expected[name], rtol=0, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )
