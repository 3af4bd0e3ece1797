"""core.loggers: TensorBoard holds what stats.jsonl holds; what is absent is refused by name."""

from pathlib import Path

import pytest
import torch

from core.errors import SettingError, UserError
from core.loggers import LOGGERS, TensorBoard, check_loggers, open_loggers
from core.runlog import RunLog

CONFIG = {"seed": 1, "length": {"images": 100}}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads from its folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(folder / "tensorboard"))
    seen.Reload()
    return {
        name: [(event.step, event.value) for event in seen.Scalars(name)] for name in seen.Tags()["scalars"]
    }


def test_tensorboard_holds_the_reports(tmp_path: Path) -> None:
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


def test_loggers_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match="unknown logger 'tensorbord'; did you mean 'tensorboard'"):
        check_loggers(["tensorbord"])
    monkeypatch.setitem(LOGGERS, "no_such_package", TensorBoard)
    with pytest.raises(
        SettingError, match="no_such_package', which is not installed; `pip install no_such_p"
    ):
        check_loggers(["no_such_package"])
    assert open_loggers((), Path("nowhere"), CONFIG, 0) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*tensorboard"):
        open_loggers(["tensorboard"], tmp_path, CONFIG, 0)


def test_other_ranks_open_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path, CONFIG)
    monkeypatch.setenv("RANK", "1")
    log.attach(("tensorboard",), 0)
    log.write(10, {"loss/g": 0.5})
    log.picture(10, "pairs", torch.zeros(3, 8, 8, dtype=torch.uint8), {})
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
