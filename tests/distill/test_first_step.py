"""`--dry-run` says where pairs and student start at different timesteps."""

from pathlib import Path

import pytest

import tiny
import tiny_teachers
from distill.planning.first_step import first_step_notes
from jobs import distill_config
from pairgen.generate import generate_pairs


def store(folder: Path, teacher: str, **settings: object) -> Path:
    prompts = tiny.save_prompts(folder.parent / "prompts.txt")
    generate_pairs(tiny.pair_config(teacher, prompts, num_pairs=2, **settings), folder)
    return folder


def test_fifty_leading_steps_of_sd_start_at_981(tmp_path: Path) -> None:
    teacher = Path(tiny.save_teacher(tmp_path / "teacher"))
    pairs = store(tmp_path / "pairs", str(teacher), steps=50)
    config = distill_config(teacher, pairs)
    line = (
        f"{pairs}: its pairs start at timestep 981, the student at 999; student_timestep=981 starts both at "
        "the same noise level"
    )
    assert first_step_notes(config, "") == [line]
    assert first_step_notes(distill_config(teacher, pairs, "student_timestep=981"), "") == []
    # A teacher that is not here has the schedule of the preset's model.
    elsewhere = distill_config(tmp_path / "absent", pairs)
    assert first_step_notes(elsewhere, "sd15") == [line] and first_step_notes(elsewhere, "") == []
    assert first_step_notes(distill_config(teacher, tmp_path / "absent"), "") == []


def test_sana_starts_before_the_student_on_its_own_grid(tmp_path: Path) -> None:
    teacher = Path(tiny_teachers.save_sana(tmp_path / "teacher"))
    own, even = (
        store(tmp_path / f"{spacing}-pairs", str(teacher), solver="euler", spacing=spacing)
        for spacing in ("teacher", "linspace")
    )
    line = (
        f"{own}: its pairs start at timestep 999, the student at 1000; pairs with spacing=linspace start "
        "there, too"
    )
    assert first_step_notes(distill_config(teacher, own), "") == [line]
    assert first_step_notes(distill_config(teacher, even), "") == []


@pytest.mark.parametrize(("kind", "spacing"), [("sd", "trailing"), ("edm", "teacher")])
def test_without_a_difference_there_is_no_note(kind: str, spacing: str, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    tiny_teachers.save_kind(kind, teacher)
    if kind == "edm":
        generate_pairs(
            tiny.pair_config(str(teacher), "", solver="euler", guidance=1.0, num_pairs=2), tmp_path / "pairs"
        )
    else:
        store(tmp_path / "pairs", str(teacher), spacing=spacing)
    assert first_step_notes(distill_config(teacher, tmp_path / "pairs"), "") == []
