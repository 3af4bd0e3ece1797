"""distill.monitoring.plots: panels, sparklines and health.png."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from d2g.core.errors import UserError
from distill.monitoring.plots import health_rows, panels, plot_health, sparkline

LINES = [
    {
        "nimg": 10.0 * i, "loss/g": 1 / (i + 1), "loss/d": 1.0, "loss/r1": 5.0, "logit/real": 0.1 * i,
        "logit/fake": -0.1 * i, "logit/real/0_skip": 0.2, "grad/g": 1.0, "ema/drift": 0.01, "d/auc": 0.6,
        "time/images_per_sec": 100.0, "time/loader_wait": 0.01, "mem/peak_gib": 3.0,
    }
    for i in range(40)
]  # fmt: skip


def test_every_key_has_exactly_one_panel() -> None:
    titles = [panel.title for panel in panels(LINES)]
    assert (
        titles[0] == "losses"
        and "R1: squared gradient norm" in titles
        and not any("held-out" in t for t in titles)
    )
    assert set(panels(LINES)[0].series) == {"loss/g", "loss/d"}
    plotted = {name for panel in panels(LINES) for name in panel.series}
    assert plotted == {name for line in LINES for name in line} - {"nimg"}
    assert panels([]) == [] and panels([{"nimg": 0, "loss/g": math.nan}]) == []
    negative = panels([{"nimg": 0, "loss/g": -1.0}])[0]
    assert not negative.log, "a log axis cannot show negative values"


def test_keys_with_their_own_scale_have_their_own_panel() -> None:
    line = {
        "val/psnr": 25.0,
        "val/e_latent_lpips": 0.2,
        "val/fid": 40.0,
        "val/recall": 0.9,
        "val/clip_score": 0.3,
    }
    series_by_panel = {
        panel.title: set(panel.series)
        for panel in panels([{"nimg": 10, "loss/r1": 5.0, "loss/g": 1.0, **line}])
    }
    assert series_by_panel.pop("validation") == {"val/recall", "val/clip_score"}
    assert all(len(series) == 1 for series in series_by_panel.values()) and len(series_by_panel) == 5


def test_values_missing_from_a_report_leave_gaps_only() -> None:
    lines = [*LINES[:2], {"nimg": 20, "loss/g": math.inf}, *LINES[3:5]]
    x, y = panels(lines)[0].series["loss/g"]
    assert x == [0, 10, 30, 40] and y == [1, 0.5, 0.25, 0.2]


def test_png_file(tmp_path: Path) -> None:
    plot_health(LINES, tmp_path / "new" / "health.png", "run")
    with Image.open(tmp_path / "new" / "health.png") as image:
        image.load()
        assert image.format == "PNG" and image.width > 800 and len(image.convert("L").getcolors()) > 50
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["health.png"]
    with pytest.raises(UserError, match="no reports yet"):
        plot_health([], tmp_path / "none.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*health\.png"):
        plot_health(LINES, tmp_path / "file" / "health.png")


def test_text_rows_omit_single_heads() -> None:
    rows = {row.name: row for row in health_rows(LINES, 8)}
    assert "logit/real" in rows and "logit/real/0_skip" not in rows
    assert (
        rows["loss/g"].value == 1 / 40 and rows["loss/g"].trend[0] == "█" and rows["loss/g"].trend[-1] == "▁"
    )
    assert json.dumps([row.__dict__ for row in rows.values()])


def test_sparklines() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 2, 7, 7], 2) == "▁█" and sparkline([3.0, 3.0]) == "▁▁" and sparkline([]) == ""
    assert len(sparkline(list(range(1000)), 24)) == 24


def test_a_folder_with_dollar_signs_is_no_formula(tmp_path: Path) -> None:
    """As of a variable in single quotes. A training stopped at its first report."""
    plot_health(LINES, tmp_path / "health.png", "runs/$MODEL_$SEED")
    assert (tmp_path / "health.png").is_file()
