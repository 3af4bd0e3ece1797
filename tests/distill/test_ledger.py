"""distill.export.ledger: a student's parameters, samples, hours, scores and kg CO2."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from d2g.core.config import override
from d2g.core.errors import SettingError, UserError
from d2g.core.tracking.run_directory import read_stats
from distill.config.export import CardOptions
from distill.export.export import export_student
from distill.export.ledger import ledger_rows
from distill.sampling import load_student
from distill.student_files import student_folder
from distill.training.train import train
from jobs import distill_config, make_pairs


@pytest.fixture(scope="module")
def run(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ledger")
    pairs = make_pairs(teacher, folder)
    train(distill_config(teacher, pairs, "regression.losses=mse", "train.images=8"), folder / "run")
    return folder / "run"


def save_result(student: Path, file: Path, **numbers: float) -> str:
    """A result as `d2g eval run` writes it."""
    import hashlib

    weights = (student_folder(str(student))[0] / "ema.safetensors").read_bytes()
    source = {"kind": "student", "name": str(student), "weights_sha256": hashlib.sha256(weights).hexdigest()}
    file.write_text(json.dumps({"protocol": "p", "protocol_sha256": "0", "source": source, **numbers}))
    return str(file)


def test_a_row_of_the_ledger(run: Path, tmp_path: Path) -> None:
    """12 pairs of 4 guided steps; 8 training images."""
    options = CardOptions(watts=500, pue=1.2, kg_per_kwh=0.5)
    (row,) = ledger_rows(
        [str(run)], [save_result(run, tmp_path / "a.json", fid=3.5)], options, pair_hours=2.0
    )
    one = load_student(str(run))
    assert row["parameters"] == sum(p.numel() for p in one.student.parameters())
    assert (row["steps"], row["samples"], row["pairs"]) == (1, 8, 12)
    assert row["pair_evaluations"] == 12 * 4 * 2
    assert (row["fid"], row["is"], row["gap"]) == (3.5, None, "")
    hours = row["device_hours"] + 2.0
    assert row["kg_co2"] == pytest.approx(hours * 0.5 * 1.2 * 0.5)
    assert row["pairs_share"] == pytest.approx(2.0 / hours)


def test_images_after_the_start_of_the_next_run_are_not_counted(
    run: Path, teacher: Path, tmp_path: Path
) -> None:
    """8 images, then 4 in a run that starts from them; the first run goes on to 16 afterwards."""
    first, second = Path(shutil.copytree(run, tmp_path / "first")), tmp_path / "second"
    config = distill_config(teacher, run.parent / "pairs", "regression.losses=mse", "train.images=16")
    train(override(replace(config, init=str(first)), ["train.images=4"]), second)
    train(config, first)
    (row,) = ledger_rows([str(second)], [], CardOptions())
    assert (row["samples"], row["gap"]) == (8 + 4, "")
    hours = max(line.get("time/device_hours", 0) for line in read_stats(first) if line["nimg"] <= 8)
    assert row["device_hours"] == pytest.approx(hours + read_stats(second)[-1]["time/device_hours"])
    # Without the checkpoint of that time, the first run is not counted.
    shutil.rmtree(first / "checkpoints" / "000000008")
    (row,) = ledger_rows([str(second)], [], CardOptions())
    assert (row["samples"], row["gap"]) == (4, "a run whose checkpoint is gone")


def test_what_nobody_recorded_is_not_counted(run: Path, tmp_path: Path) -> None:
    """Without the hours of the pairs there is no sum; an exported student has no history."""
    export_student(str(run), tmp_path / "exported")
    rows = ledger_rows([str(run), str(tmp_path / "exported")], [], CardOptions())
    assert rows[0]["device_hours"] > 0 and rows[0]["kg_co2"] is None and rows[0]["pairs_share"] is None
    assert rows[1]["device_hours"] is None and rows[1]["samples"] is None and rows[1]["kg_co2"] is None
    assert all(rows[1][key] is None for key in ("pairs", "pair_evaluations", "pair_hours"))
    assert "not recorded" in rows[1]["gap"] and rows[1]["parameters"] == rows[0]["parameters"]


def test_two_results_with_one_number_are_refused(run: Path, tmp_path: Path) -> None:
    """They may be of other protocols, guidance scales or truncations; equal ones, and other numbers, fit."""
    files = [save_result(run, tmp_path / f"{number}.json", fid=number) for number in (3.5, 9.0)]
    with pytest.raises(UserError, match=r"--scores has several fid of student .*: 3\.5, 9; give one of them"):
        ledger_rows([str(run)], files, CardOptions())
    other = save_result(run, tmp_path / "clip.json", clip_score=0.3)
    (row,) = ledger_rows([str(run)], [files[0], files[0], other], CardOptions())
    assert (row["fid"], row["clip_score"]) == (3.5, 0.3)
    assert row["protocols"] == "p 0", "numbers of students under different protocols do not compare"
    assert ledger_rows([str(run)], [], CardOptions())[0]["protocols"] is None


def test_foreign_results_and_overheads_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(
        json.dumps({"protocol": "p", "protocol_sha256": "0", "source": {"kind": "images"}})
    )
    with pytest.raises(UserError, match="is of none of the students"):
        ledger_rows([str(run)], [str(tmp_path / "other.json")], CardOptions())
    with pytest.raises(SettingError, match=r"pue is 0\.9; expected 1"):
        CardOptions(pue=0.9)
