"""A run's JSON files with any values: reading it gives the run or one line, never an error of Python."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from d2g.core.distributed.checkpoint import latest
from d2g.core.errors import UserError
from d2g.core.tracking.run_directory import RunLog, read_stats
from distill.monitoring.status import read_status
from distill.student_files import student_config, student_folder
from eval.result import EvalResult
from wrong_json import changed

CONFIG = {
    "stage": "gan",
    "teacher": "miniature",
    "student_timestep": 999,
    "student": {"lora_rank": 2},
    "train": {"batch_size": 4},
    "length": {"images": 100},
}
STATS = {"loss/g": 0.5, "time/images_per_sec": 20.0, "time/device_hours": 0.1}


def make_run(folder: Path) -> Path:
    """A run of two reports with a checkpoint and a recorded end."""
    log = RunLog(folder, CONFIG)
    for nimg in (10, 20):
        log.write(nimg, STATS)
    checkpoint = folder / "checkpoints" / "000000020"
    checkpoint.mkdir(parents=True)
    (checkpoint / "meta.json").write_text(json.dumps({"nimg": 20, "steps": 5, "files": {}}))
    (folder / "ended.json").write_text(json.dumps({"how": "stopped", "why": "SIGTERM"}))
    (folder / "result.json").write_text(json.dumps({"protocol": "a", "protocol_sha256": "b", "fid": 1.0}))
    return folder


READERS: list[Callable[[Path], object]] = [
    read_status,
    read_stats,
    lambda run: student_folder(str(run)),
    lambda run: student_config(str(run)),
    lambda run: latest(run / "checkpoints"),
    EvalResult.load,
]
FILES = ["config.json", "ended.json", "result.json", "stats.jsonl", "checkpoints/000000020/meta.json"]


ROUNDS = ((1000, pytest.mark.slow), (5000, (pytest.mark.slow, pytest.mark.long)))


@pytest.mark.parametrize("rounds", [150, *(pytest.param(n, marks=mark) for n, mark in ROUNDS)])
def test_any_value_in_a_file_is_read_or_one_line(rounds: int, tmp_path: Path) -> None:
    run, rng = make_run(tmp_path / "run"), random.Random(5)
    for _ in range(rounds):
        file = run / rng.choice(FILES)
        before = file.read_text()
        # Of stats.jsonl, change the first line.
        first, *rest = before.splitlines() if file.suffix == ".jsonl" else [before]
        file.write_text("\n".join([json.dumps(changed(rng, json.loads(first))), *rest]) + "\n")
        for read in READERS:
            try:
                read(run)
            except UserError as error:
                assert "\n" not in str(error), error
        file.write_text(before)
    for read in READERS[:-1]:
        read(run)
