"""eval.floor: real pictures against real pictures."""

from dataclasses import replace
from pathlib import Path

import torch

from eval.floor import real_floor
from eval.measure.reference import Reference
from eval.metrics.feature_stats import FeatureStats, Origin
from eval.protocols.protocol import PROTOCOLS

FOLDER = replace(PROTOCOLS["folder"], neighbours=(2,))


def statistics(rows: int, dim: int = 4) -> FeatureStats:
    """Statistics of `rows` random features."""
    stats = FeatureStats(dim, Origin(features="tiny", features_sha256="", resize="none", source="random"))
    stats.update(torch.randn(rows, dim, generator=torch.Generator().manual_seed(0)))
    return stats


def reference(rows: int) -> Reference:
    """A reference of one network."""
    return Reference(stats={"features": statistics(rows)})


def test_a_metric_that_takes_more_pictures_than_are_held_out_is_left_out() -> None:
    """Extrapolation takes 16 images of 4 features; half of 24 pictures is 12."""
    metrics = ("fid", "fid_infinity", "pr")
    floor = real_floor(reference(24), None, FOLDER, metrics, 64)
    assert set(floor.numbers) == {"fid", "precision", "recall"}
    assert floor.note == (
        "floor: 12 held-out real pictures against 12 others of the reference (too few for fid_infinity)"
    )
    enough = real_floor(reference(120), None, FOLDER, metrics, 64)
    assert "fid_infinity" in enough.numbers and "too few" not in enough.note
    # The training pictures count as the held-out ones do.
    for held_out, training in ((12, 120), (120, 12)):
        trained = real_floor(reference(held_out), reference(training), FOLDER, metrics, 64)
        assert set(trained.numbers) == {"fid", "precision", "recall"}


def test_networks_may_have_kept_different_numbers_of_rows(tmp_path: Path) -> None:
    """A file keeps all rows for cmmd, and a random subset for the other metrics."""
    file = tmp_path / "reference.safetensors"
    Reference(stats={"features": statistics(120), "cmmd": statistics(120)}).save(file, keep=40)
    floor = real_floor(Reference.load(file), None, FOLDER, ("fid", "cmmd"), 64)
    assert set(floor.numbers) == {"fid", "cmmd"}
    assert floor.note == "floor: 20 held-out real pictures against 20 others of the reference"
