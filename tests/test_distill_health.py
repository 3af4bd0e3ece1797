"""distill.health: what a report says of the networks in closed form, and panels of any run."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from core.errors import UserError
from distill.health import auc, health_rows, logit_report, panels, plot_health, sparkline, spread

values = st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=9)


def heads(a: list[float], b: list[float]) -> dict[str, Tensor]:
    """Two heads of two sizes, constant over positions."""
    first = torch.tensor(a).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return {"0_before": first, "1_after": torch.tensor(b).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)}


def test_logits_by_kind_and_head() -> None:
    real, fake = heads([3.0, 1.0, 2.0], [1.0, 1.0, 4.0]), heads([0.0, 4.0, -2.0], [0.0, 2.0, 0.0])
    report = logit_report(real, fake, torch.tensor([True, False, True]), heads([1.0], [2.0]))
    assert {name: float(value) for name, value in report.items()} == {
        "logit/real": 2.0, "logit/real/0_before": 2.0, "logit/real/1_after": 2.0,
        "logit/fake": -0.5, "logit/fake/0_before": -1.0, "logit/fake/1_after": 0.0,
        "logit/mismatched": 3.0, "logit/mismatched/0_before": 4.0, "logit/mismatched/1_after": 2.0,
        "logit/student": 1.5, "logit/student/0_before": 1.0, "logit/student/1_after": 2.0,
        "d/auc": 1.0,
    }  # fmt: skip
    assert not any(value.requires_grad for value in report.values())
    alone = logit_report(real, fake, torch.ones(3, dtype=torch.bool), real)
    assert math.isnan(alone["logit/mismatched"]) and math.isfinite(alone["d/auc"])


@given(values, values)
def test_auc_is_the_share_of_ordered_pairs(a: list[float], b: list[float]) -> None:
    share = sum((x > y) + 0.5 * (x == y) for x in a for y in b) / (len(a) * len(b))
    assert float(auc(torch.tensor(a), torch.tensor(b))) == pytest.approx(share, abs=1e-6)


def test_spread_is_one_for_the_teacher_and_nought_for_one_image() -> None:
    teacher = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert float(spread(teacher, teacher)) == pytest.approx(1)
    assert float(spread(0.5 * teacher + 3, teacher)) == pytest.approx(0.25)
    assert float(spread(teacher[:1].expand(16, -1, -1, -1), teacher)) == pytest.approx(0, abs=1e-6)
    assert math.isnan(spread(teacher[:1], teacher[:1]))


LINES = [
    {
        "nimg": 10.0 * i, "loss/g": 1 / (i + 1), "loss/d": 1.0, "loss/r1": 5.0, "logit/real": 0.1 * i,
        "logit/fake": -0.1 * i, "logit/real/0_skip": 0.2, "grad/g": 1.0, "ema/drift": 0.01, "d/auc": 0.6,
        "time/images_per_sec": 100.0, "time/loader_wait": 0.01, "mem/peak_gib": 3.0,
    }
    for i in range(40)
]  # fmt: skip


def test_every_reported_kind_has_its_panel_and_no_other() -> None:
    titles = [panel.title for panel in panels(LINES)]
    assert (
        titles[0] == "losses"
        and "R1: squared gradient norm" in titles
        and not any("held-out" in t for t in titles)
    )
    assert set(panels(LINES)[0].series) == {"loss/g", "loss/d"}
    shown = {name for panel in panels(LINES) for name in panel.series}
    assert shown == {name for line in LINES for name in line} - {"nimg"}
    assert panels([]) == [] and panels([{"nimg": 0, "loss/g": math.nan}]) == []
    below = panels([{"nimg": 0, "loss/g": -1.0}])[0]
    assert not below.log, "a logarithm has no place for it"


def test_what_has_a_scale_of_its_own_has_axes_of_its_own() -> None:
    line = {
        "val/psnr": 25.0,
        "val/e_latent_lpips": 0.2,
        "val/fid": 40.0,
        "val/recall": 0.9,
        "val/clip_score": 0.3,
    }
    found = {
        panel.title: set(panel.series)
        for panel in panels([{"nimg": 10, "loss/r1": 5.0, "loss/g": 1.0, **line}])
    }
    assert found.pop("validation") == {"val/recall", "val/clip_score"}
    assert all(len(series) == 1 for series in found.values()) and len(found) == 5


def test_values_missing_from_a_report_leave_gaps_only() -> None:
    lines = [*LINES[:2], {"nimg": 20, "loss/g": math.inf}, *LINES[3:5]]
    x, y = panels(lines)[0].series["loss/g"]
    assert x == [0, 10, 30, 40] and y == [1, 0.5, 0.25, 0.2]


def test_the_picture(tmp_path: Path) -> None:
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


def test_text_rows_leave_the_heads_to_the_picture() -> None:
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
