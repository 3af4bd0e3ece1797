"""d2g.diffusion.families: registry, command and README show the same table of stages, and it is correct."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers as diffusers_library
import pytest
from diffusers import EDMEulerScheduler
from typer.testing import CliRunner

import tiny
import tiny_teachers
from d2g.core.errors import SettingError, UserError
from d2g.diffusion import pretrained
from d2g.diffusion.families.base import Family
from d2g.diffusion.families.registry import FAMILIES, STAGE_COLUMNS, stage_table
from d2g.diffusion.pipelines import FAMILY_OF, family_of, open_pipeline
from d2g.diffusion.scheduler_files import load_schedule, schedule_kind
from d2g.diffusion.teacher import describe_stages
from d2g_cli.main import app
from distill.config.discriminator import DiscriminatorConfig
from distill.config.student import StudentConfig
from distill.export.one_step_pipeline import pipeline_schedule
from distill.models.discriminators import DISCRIMINATORS, check_discriminator
from distill.models.student import check_teacher, student_from_teacher

ROOT = Path(__file__).resolve().parents[2]


TEACHERS: dict[str, Callable[[Path], object]] = {
    "sd": tiny.save_teacher,
    "sdxl": tiny_teachers.save_sdxl,
    "sdxl edm": partial(tiny_teachers.save_sdxl, scheduler=EDMEulerScheduler),
    "sd3": tiny_teachers.save_sd3,
    "flux": tiny_teachers.save_flux,
    "sana": tiny_teachers.save_sana,
    "pixart": partial(tiny_teachers.save_pixart, sigma=True),
    "dit": partial(tiny_teachers.save_dit, classes=4),
    "stable_cascade_prior": tiny_teachers.save_cascade_prior,
    "stable_cascade_decoder": tiny_teachers.save_cascade_decoder,
    "wuerstchen_prior": tiny_teachers.save_wuerstchen_prior,
    "wuerstchen_decoder": tiny_teachers.save_wuerstchen_decoder,
    "ldm": tiny_teachers.save_ldm,
    "unet2d": tiny_teachers.save_pixels,
    "unet2d classes": partial(tiny_teachers.save_pixels, classes=10),
    "unet2d edm": partial(tiny_teachers.save_edm, classes=None),
}
"""How to save a tiny teacher of every family, and of every kind of schedule and conditioning that it has."""


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("teachers")
    folders = {name: root / name.replace(" ", "_") for name in TEACHERS}
    for name, save in TEACHERS.items():
        save(folders[name])
    return {name: str(folder) for name, folder in folders.items()}


def test_every_family_registers_itself_and_its_pipelines_once() -> None:
    assert set(FAMILIES) == {name.split()[0] for name in TEACHERS}
    assert len(FAMILY_OF) == sum(len(family.pipelines) for family in FAMILIES.values())
    for name, family in FAMILIES.items():
        assert isinstance(family, Family) and family.name == name
        assert family.network in family.components and "scheduler" in family.components
        assert family.autoencoder is None or family.autoencoder in family.components


def test_command_and_readme_show_the_table_of_the_registry() -> None:
    rows = stage_table()
    assert [tuple(row) for row in rows] == [STAGE_COLUMNS] * len(FAMILIES)
    printed = CliRunner().invoke(app, ["teacher", "list", "--json"]).stdout
    assert json.loads(printed) == {"families": rows}
    people = CliRunner(env={"COLUMNS": "250"}).invoke(app, ["teacher", "list"]).stdout
    for row in rows:
        assert any(all(text in line for text in row.values()) for line in people.splitlines())
    lines = [
        f"| {' | '.join(row.values())} |"
        for row in [dict(zip(STAGE_COLUMNS, STAGE_COLUMNS, strict=True)), *rows]
    ]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = "\n".join([lines[0], "|---" * len(STAGE_COLUMNS) + "|", *lines[1:]])
    assert table in readme, f"README.md lacks this table:\n{table}"


def can_build_student(teacher: str, stage: str, **student: int) -> bool:
    """Whether a student for this stage can be built."""
    config = StudentConfig(**student)
    try:
        check_teacher(teacher, stage, config)
        if stage == "gan":
            network = family_of(teacher).network
            fitting: Any = next(name for name, each in DISCRIMINATORS.items() if network in each.networks)
            check_discriminator(teacher, DiscriminatorConfig(discriminator=fitting, mix_fraction=0.0))
        student_from_teacher(teacher, config=config)
    except (SettingError, UserError):
        return False
    return True


def exports_to_diffusers(teacher: str) -> bool:
    try:
        pipeline_schedule(teacher)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("name", TEACHERS)
def test_the_table_matches_what_each_stage_accepts(name: str, teachers: dict[str, str]) -> None:
    teacher = teachers[name]
    family, kind = family_of(teacher), schedule_kind(load_schedule(teacher))
    assert family.name == name.split()[0] and kind in family.schedules
    conditioning = pretrained.conditioner_on_meta(teacher).kind
    stages = family.supported_stages(kind, conditioning == "none" or family.reads_text)
    assert bool(stages["regression"]) == can_build_student(teacher, "ode")
    assert bool(stages["GAN"]) == can_build_student(teacher, "gan")
    assert bool(stages["LoRA"]) == can_build_student(teacher, "ode", lora_rank=2)
    formats = stages["export"]
    assert ("safetensors" in formats) == bool(stages["regression"])
    diffusers = can_build_student(teacher, "ode") and exports_to_diffusers(teacher)
    assert ("diffusers" in formats) == diffusers
    takes_adapters = hasattr(getattr(diffusers_library, open_pipeline(teacher).kind), "load_lora_weights")
    assert ("lora" in formats) == (takes_adapters and diffusers)


def test_describing_a_teacher_lists_its_supported_stages(teachers: dict[str, str]) -> None:
    text = describe_stages(teachers["sd"])
    assert text.endswith(
        "supports pairs, regression, GAN, LoRA, export (safetensors, onnx, diffusers, lora, comfyui)"
    )
    flow = describe_stages(teachers["sd3"])
    assert flow.endswith("supports pairs, regression, GAN, LoRA, export (safetensors, diffusers, lora)")
    edm, classes = describe_stages(teachers["sdxl edm"]), describe_stages(teachers["unet2d classes"])
    for line in (edm, classes):
        assert line.endswith("supports pairs, regression, GAN, LoRA, export (safetensors, onnx)")
        assert "\n" not in line
