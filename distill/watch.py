"""What a run folder says of a run, while it runs or after: for `d2g distill watch`. Reads, never writes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import checkpoint
from core.errors import UserError
from core.runlog import read_stats
from distill.health import Row, health_rows
from distill.sentinels import findings


@dataclass(frozen=True, kw_only=True)
class View:
    """A run at one moment. `images`: how many it is meant to see; `seconds_left`: at its last rate;
    `values`: the latest of every kind.
    """

    out: str
    stage: str
    nimg: int
    images: int
    finished: bool
    seconds_left: float | None
    values: dict[str, float]
    warnings: list[str]
    checkpoint: str | None
    preview: str | None
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        """All but the rows for people. Values that are not finite become null: JSON knows none."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "rows"}
        finite = {k: v if abs(v) < float("inf") else None for k, v in self.values.items()}
        return {**data, "values": finite}


def view(folder: Path, width: int = 24) -> View:
    """Read a run. Raises UserError for a folder that holds none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stage, length = str(config["stage"]), {**config["train"], **config.get("length", {})}
        images = int(length["images"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} holds no run ({type(error).__name__}: {error}); give the --out of `d2g distill`"
        ) from error
    lines = read_stats(folder)
    latest = {"nimg": 0.0} | {name: value for line in lines for name, value in line.items()}
    nimg, rate = int(latest["nimg"]), latest.get("time/images_per_sec", 0.0)
    newest = checkpoint.latest(folder / "checkpoints")
    previews = sorted((folder / "previews").glob("*.png"), key=lambda path: path.stem.rpartition("-")[2])
    return View(
        out=str(folder),
        stage=stage,
        nimg=nimg,
        images=images,
        finished=nimg >= images,
        seconds_left=max(0, images - nimg) / rate if rate > 0 else None,
        values={k: v for k, v in latest.items() if k != "nimg"},
        warnings=[found.text for found in findings(lines)],
        checkpoint=str(newest.folder) if newest else None,
        preview=str(previews[-1]) if previews else None,
        rows=health_rows(lines, width),
    )
