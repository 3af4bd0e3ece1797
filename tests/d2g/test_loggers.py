"""d2g.core.tracking.loggers: TensorBoard, W&B and Trackio store the reports; missing packages are refused."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
import time
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from d2g.core.errors import SettingError, UserError
from d2g.core.tracking.loggers import LOGGERS, TensorBoard, WandB, check_loggers, open_loggers
from d2g.core.tracking.run_directory import RunLog

CONFIG = {"seed": 1, "length": {"images": 100}}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read a log folder with TensorBoard's reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_stores_the_reports(tmp_path: Path) -> None:
    log = RunLog(tmp_path, CONFIG)
    log.attach(("tensorboard",), 0)
    log.write(10, {"loss/g": 0.5, "grad/g": 2.0})
    log.write(20, {"loss/g": 0.25})
    log.picture(20, "pairs", torch.zeros(3, 8, 8, dtype=torch.uint8), {"nimg": "20"})
    log.close()
    assert scalars(tmp_path) == {"loss/g": [(10, 0.5), (20, 0.25)], "grad/g": [(10, 2.0)]}
    assert (tmp_path / "previews" / "pairs-000000020.png").is_file()
    assert [line["loss/g"] for line in log.read()] == [0.5, 0.25], "stats.jsonl all the same"


def test_a_resumed_run_hides_what_a_killed_one_wrote_after_its_checkpoint(tmp_path: Path) -> None:
    first = TensorBoard(tmp_path, CONFIG, 0)
    for nimg in (10, 20, 30):
        first.write(nimg, {"loss/g": float(nimg)})
    first.close()
    second = TensorBoard(tmp_path, CONFIG, 20)
    second.write(25, {"loss/g": 25.0})
    second.close()
    assert scalars(tmp_path)["loss/g"] == [(10, 10.0), (20, 20.0), (25, 25.0)]


def read_wandb(file: Path) -> tuple[str, list[dict[str, float]]]:
    """Read (run id, rows) from W&B's offline file: 7 bytes, then records with headers of 7 bytes."""
    proto: Any = import_module("wandb.proto.wandb_internal_pb2")
    name, kind, end = "", None, time.monotonic() + 60
    rows: list[dict[str, float]] = []
    while kind != "exit":  # W&B's writer process may still write after `finish`
        assert time.monotonic() < end, "no last record"
        name, rows, data, at = "", [], file.read_bytes(), 7
        while at + 7 <= len(data):
            _, size, component = struct.unpack_from("<IHB", data, at)
            if at + 7 + size > len(data):
                break
            assert component == 1, "a record in pieces"
            record = proto.Record.FromString(data[at + 7 : at + 7 + size])
            at, kind = at + 7 + size, record.WhichOneof("record_type")
            name = record.run.run_id or name
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            rows += [{k: v for k, v in items.items() if k in ("nimg", "loss/g")}] if items else []
    return name, rows


def test_wandb_stores_the_reports_and_a_restart_continues_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")  # seconds in which its writer process must start
    messages: list[tuple[str, list[dict[str, float]]]] = []
    files: list[Path] = []
    for number, config in enumerate((CONFIG, {**CONFIG, "length": {"images": 200}}, {**CONFIG, "seed": 2})):
        # The folder of a run is named by the second in which it starts.
        while files and f"-run-{time.strftime('%Y%m%d_%H%M%S')}-" in files[-1].parent.name:
            time.sleep(0.05)
        logger = WandB(tmp_path, config, 0)
        logger.write(10 + number, {"loss/g": 0.5})
        logger.picture(10 + number, "pairs", torch.zeros(3, 8, 8, dtype=torch.uint8))
        logger.close()
        files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"), key=lambda f: f.stat().st_mtime_ns)
        messages.append(read_wandb(files[-1]))
        rows = [{"nimg": 10 + number, "loss/g": 0.5}, {"nimg": 10 + number}]
        assert (
            messages[-1][1] == rows and len(list(files[-1].parent.glob("files/media/images/**/*.png"))) >= 1
        )
    assert messages[0][0] == messages[1][0] != messages[2][0]


TRACKIO = """
import sys, torch
from pathlib import Path
from d2g.core.tracking.loggers import Trackio
for nimg in (10, 20):  # the second one continues the run of the first
    logger = Trackio(Path(sys.argv[1]), {"seed": 1, "length": {"images": nimg}}, 0)
    logger.write(nimg, {"loss/g": 0.5})
    logger.picture(nimg, "pairs", torch.zeros(3, 8, 8, dtype=torch.uint8))
    logger.close()
"""


@pytest.mark.slow
def test_trackio_stores_the_reports_and_a_restart_continues_the_run(tmp_path: Path) -> None:
    """In a process of its own, because Trackio reads TRACKIO_DIR when it is imported."""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", TRACKIO, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "", "standard output belongs to the command's result"
    with closing(sqlite3.connect(tmp_path / "trackio/diffusion2gan.db")) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    values = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert [(step, row["loss/g"]) for step, row in values if "loss/g" in row] == [(10, 0.5), (20, 0.5)]
    assert [step for step, row in values if "preview/pairs" in row] == [10, 20]
    assert len(list((tmp_path / "trackio/media").rglob("*.png"))) == 2


def test_missing_logger_packages_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match="unknown logger 'tensorbord'; did you mean 'tensorboard'"):
        check_loggers(["tensorbord"])
    monkeypatch.setitem(LOGGERS, "no_such_package", TensorBoard)
    with pytest.raises(
        SettingError, match="no_such_package', which is not installed; `pip install no_such_p"
    ):
        check_loggers(["no_such_package"])
    assert open_loggers((), Path("nowhere"), CONFIG, 0) == []


def test_an_unwritable_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*tensorboard"):
        open_loggers(["tensorboard"], tmp_path, CONFIG, 0)


def test_only_rank_0_opens_loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path, CONFIG)
    monkeypatch.setenv("RANK", "1")
    log.attach(("tensorboard",), 0)
    log.write(10, {"loss/g": 0.5})
    log.picture(10, "pairs", torch.zeros(3, 8, 8, dtype=torch.uint8), {})
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
