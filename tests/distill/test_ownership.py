"""One live run per folder, and checkpoints at signals; with real processes and signals."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from d2g.core.claims import OWNER
from d2g.core.distributed.checkpoint import complete_points
from d2g.core.errors import LostFolder, UserError
from d2g.core.tracking.run_directory import ENDED, read_stats
from distill.training.callbacks import StopControl
from distill.training.train import train
from forks import environments
from jobs import BATCH, Running, d2g, d2g_ranks, distill_arguments, distill_config
from stores import FORKS

pytestmark = FORKS
LONG = "train.images=1000000"


def start_run(teacher: Path, pairs: Path, run: Path, log: Path) -> Running:
    """Start a run and wait for its first report."""
    running = Running(distill_arguments(distill_config(teacher, pairs, LONG), run), log)
    running.wait_for(lambda: (run / "stats.jsonl").is_file() and bool(read_stats(run)))
    return running


def test_a_second_run_in_a_folder_is_refused_while_the_first_is_alive(
    teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    run, config = tmp_path / "run", distill_config(teacher, pairs, LONG)
    first = start_run(teacher, pairs, run, tmp_path / "first")
    second = d2g(distill_arguments(config, run), tmp_path / "second")
    assert second.code == 1 and f"process {first.pid}, already trains in {run}" in second.error
    ranks = d2g_ranks(distill_arguments(config, run), tmp_path / "ranks")
    assert [ended.code for ended in ranks] == [1, 1]
    assert all("already trains in" in ended.stderr for ended in ranks)
    first.send(signal.SIGTERM)
    assert first.wait().code == 130
    numbers = [line["nimg"] for line in read_stats(run)]
    assert numbers == sorted(set(numbers)), "reports come from one run"
    assert not (run / OWNER).exists()


def test_processes_that_share_no_folder_are_refused(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    """As two machines would with the same path on disks of their own."""
    config = distill_config(teacher, pairs, "train.images=8")
    running = [
        Running(distill_arguments(config, tmp_path / f"run{rank}"), tmp_path / f"log{rank}", environment)
        for rank, environment in enumerate(environments(2))
    ]
    ended = [each.wait() for each in running]
    assert [each.code for each in ended] == [1, 1]
    assert all("process 1 does not see what process 0 writes to" in each.error for each in ended)
    assert "on a disk that their machines share; give such an --out" in ended[0].error
    assert not (tmp_path / "run0").exists(), "nothing was written"


def test_a_run_that_lost_its_folder_writes_nothing_more(
    teacher: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = StopControl.event

    def lose_folder(control: StopControl, nimg: int, *arguments: Any) -> Any:
        if nimg == 2 * BATCH:  # another process takes over the folder
            claim = tmp_path / "run" / OWNER / "00000.json"
            claim.unlink()
            claim.write_text(json.dumps({"host": "other", "place": "other", "pid": 3, "start": "1"}))
        return event(control, nimg, *arguments)

    monkeypatch.setattr(StopControl, "event", lose_folder)
    with pytest.raises(LostFolder, match=r"^other, process 3, trains in .*run now, because"):
        train(distill_config(teacher, pairs, f"train.images={4 * BATCH}"), tmp_path / "run")
    assert [line["nimg"] for line in read_stats(tmp_path / "run")] == [BATCH]
    assert not (tmp_path / "run" / ENDED).exists() and (tmp_path / "run" / OWNER / "00000.json").exists()


def test_refused_inputs_leave_no_folder(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    ended = d2g(
        distill_arguments(distill_config(teacher, tmp_path / "nothing"), tmp_path / "run"), tmp_path / "log"
    )
    assert ended.code == 1 and not (tmp_path / "run").exists()


def test_a_folder_of_something_else_is_refused(teacher: Path, pairs: Path) -> None:
    for out, what in {pairs: "a pair store", teacher: "a teacher"}.items():
        before = sorted(out.iterdir())
        with pytest.raises(UserError, match=rf"holds {what} .*, not a run; give another --out"):
            train(distill_config(teacher, pairs), out)
        assert sorted(out.iterdir()) == before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_signals_of_terminals_and_clusters_save_a_checkpoint(
    name: str, teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    running = start_run(teacher, pairs, run, tmp_path / "log")
    running.send(signal.Signals[name])
    ended = running.wait()
    assert ended.code == 130 and "safe on disk" in ended.error
    assert len(complete_points(run / "checkpoints")) == 1
    assert json.loads((run / ENDED).read_text())["how"] == "stopped"
