"""d2g.core.tracking.run_directory: one config per run folder; reports rewind to the checkpoint."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from d2g.core.distributed.checkpoint import save
from d2g.core.errors import UserError
from d2g.core.tracking.run_directory import Pace, RunLog, peak_memory_gib, read_stats

CONFIG = {"seed": 1, "optim": {"lr": 1e-4, "betas": [0.9, 0.999]}, "train": {"images": 100}}
LAST = {"nimg": 25, "loss/g": 2.0}


def test_the_same_config_resumes_and_another_is_refused(tmp_path: Path) -> None:
    RunLog(tmp_path, CONFIG)
    RunLog(tmp_path, CONFIG).write(10, {"loss/g": 1.0})
    other = {**CONFIG, "seed": 2, "optim": {"lr": 1e-3, "betas": [0.9, 0.999]}}
    with pytest.raises(UserError) as caught:
        RunLog(tmp_path, other)
    text = str(caught.value)
    assert "optim.lr (0.0001 -> 0.001)" in text and "seed (1 -> 2)" in text and "betas" not in text
    assert "another --out" in text and "\n" not in text
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG, "the first config stays"


def test_a_damaged_config_is_reported(tmp_path: Path) -> None:
    RunLog(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text('{"seed": 1, "opt')
    with pytest.raises(UserError, match=r"config\.json is damaged .*; copy it from another --out, where"):
        RunLog(tmp_path, CONFIG)


def test_checkpoints_without_a_config_are_refused(tmp_path: Path) -> None:
    """Following the error message repairs the folder."""
    (tmp_path / "run" / "checkpoints" / ".000000004.tmp").mkdir(parents=True)
    RunLog(tmp_path / "run", CONFIG)
    (tmp_path / "run" / "config.json").unlink()
    save(tmp_path / "run" / "checkpoints", 4, {}, {}, {})
    lost = r"run holds checkpoints but no config\.json; copy it from another --out, .*, or delete .*run to"
    with pytest.raises(UserError, match=lost):
        RunLog(tmp_path / "run", {**CONFIG, "seed": 2})
    assert not (tmp_path / "run" / "config.json").exists()
    RunLog(tmp_path / "new", CONFIG)
    shutil.copy(tmp_path / "new" / "config.json", tmp_path / "run")
    RunLog(tmp_path / "run", CONFIG)


def test_a_run_without_results_may_be_replaced(tmp_path: Path) -> None:
    log = RunLog(tmp_path, CONFIG)
    log.end("failed", "train.validate_pairs is 5000 of 12 pairs")
    assert json.loads((tmp_path / "ended.json").read_text())["how"] == "failed"
    RunLog(tmp_path, {**CONFIG, "seed": 2}).begin()
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_only_ignored_keys_may_change(tmp_path: Path) -> None:
    RunLog(tmp_path, CONFIG).write(10, {"loss/g": 1.0})
    RunLog(tmp_path, {**CONFIG, "train": {"images": 200}}, ignore=("train",))
    with pytest.raises(UserError, match="seed"):
        RunLog(tmp_path, {**CONFIG, "seed": 2}, ignore=("train",))


def test_lines_are_appended_in_order_and_read_back(tmp_path: Path) -> None:
    log = RunLog(tmp_path, CONFIG)
    assert log.read() == []
    log.write(10, {"loss/g": 0.5})
    RunLog(tmp_path, CONFIG).write(20, {"loss/g": 0.25})
    assert read_stats(tmp_path) == [{"nimg": 10, "loss/g": 0.5}, {"nimg": 20, "loss/g": 0.25}]


def test_rewind_drops_incomplete_lines_and_those_after_the_checkpoint(tmp_path: Path) -> None:
    log = RunLog(tmp_path, CONFIG)
    for nimg in (10, 20, 30):
        log.write(nimg, {"loss/g": 1.0})
    with open(tmp_path / "stats.jsonl", "a") as file:
        file.write('{"nimg": 35, "loss/')  # killed in the middle of a line
    assert [line["nimg"] for line in log.read()] == [10, 20, 30]
    log.rewind(20)
    assert [line["nimg"] for line in log.read()] == [10, 20]
    log.write(25, {"loss/g": 2.0})
    assert log.read() == read_stats(tmp_path) == [*({"nimg": n, "loss/g": 1.0} for n in (10, 20)), LAST]


def test_rewind_of_a_run_without_reports_creates_no_file(tmp_path: Path) -> None:
    RunLog(tmp_path, CONFIG).rewind(0)
    assert not (tmp_path / "stats.jsonl").exists()


def test_an_incomplete_last_line_is_ignored_and_a_damaged_one_is_reported(tmp_path: Path) -> None:
    """A reader may read the file while the run writes it."""
    log = RunLog(tmp_path, CONFIG)
    for nimg in (10, 20):
        log.write(nimg, {"loss/g": 1.0})
    all_lines = (tmp_path / "stats.jsonl").read_text()
    for cut in range(len(all_lines.splitlines()[0]) + 1, len(all_lines)):
        (tmp_path / "stats.jsonl").write_text(all_lines[:cut])
        assert [line["nimg"] for line in read_stats(tmp_path)] == [10], all_lines[:cut]
    for damage in ('{"nimg": 1', "[1]", '{"loss/g": 1.0}', '"text"'):
        (tmp_path / "stats.jsonl").write_text(f"{all_lines}{damage}\n{all_lines}")
        with pytest.raises(UserError, match=r"stats\.jsonl: line 3 is damaged .*; delete that line"):
            read_stats(tmp_path)


def test_bytes_that_are_no_text_are_a_damaged_line(tmp_path: Path) -> None:
    (tmp_path / "stats.jsonl").write_bytes(b'{"nimg": 4}\n{"nimg": 8, "loss\xff": 1.0}\n')
    with pytest.raises(UserError, match=r"stats\.jsonl: line 2 is damaged .*; delete that line"):
        read_stats(tmp_path)


def test_speed_since_the_last_report_and_total_hours() -> None:
    pace = Pace([{"nimg": 5, "time/device_hours": 2.0}, {"nimg": 9}], 100, devices=8)
    with pace.waiting():
        time.sleep(0.02)
    first = pace.report(300)
    assert 0.02 / 60 < first["time/loader_wait"] <= 1 and 0 < first["time/images_per_sec"] <= 200 / 0.02
    assert 2.0 + 8 * 0.02 / 3600 <= first["time/device_hours"] < 2.1 and first["mem/peak_gib"] > 0
    second = pace.report(300)
    assert second["time/loader_wait"] == 0 and second["time/images_per_sec"] == 0
    assert second["time/device_hours"] > first["time/device_hours"]


def test_previews_are_saved_with_their_text(tmp_path: Path) -> None:
    log = RunLog(tmp_path, CONFIG)
    log.picture(1280, "pairs", torch.full((3, 4, 5), 7, dtype=torch.uint8), {"prompts": "a red cube"})
    with Image.open(tmp_path / "previews" / "pairs-000001280.png") as image:
        assert image.size == (5, 4) and image.info == {"prompts": "a red cube"}


def test_unwritable_folders_are_user_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot write .*config\.json"):
        RunLog(tmp_path / "file" / "run", CONFIG)
    log = RunLog(tmp_path / "run", CONFIG)
    (tmp_path / "run" / "stats.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*stats\.jsonl"):
        log.write(1, {})


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path / "first", CONFIG)
    monkeypatch.setenv("RANK", "1")
    log.write(1, {"loss": 1.0})
    RunLog(tmp_path / "second", CONFIG)
    assert log.read() == [] and not (tmp_path / "second").exists()


def test_peak_memory_is_in_gib() -> None:
    assert 0.05 < peak_memory_gib() < 200
