"""eval.protocols.metric: the registry of metrics, and the tables derived from it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import eval.protocols.metric as registry
from d2g.core.errors import SettingError
from d2g.core.seeds import generator
from eval.evaluation import evaluate
from eval.images.resize import NATIVE
from eval.measure.measure import Measure
from eval.measure.required_networks import LOADERS, Networks
from eval.measure.source import batch_source
from eval.protocols.metric import (
    Metric,
    MetricNumber,
    all_metrics,
    all_numbers,
    check_metrics,
    mean_of_rows,
    number_labels,
    register_metric,
)
from eval.protocols.protocol import Protocol

ROOT = Path(__file__).resolve().parents[2]
BRIGHTNESS: dict[str, Any] = dict(
    name="brightness",
    description="mean brightness",
    label="Brightness",
    better="higher",
    interval="bootstrap",
    networks=(),
    needs_reference=False,
    compute=mean_of_rows("brightness"),
)


def test_every_network_of_a_metric_can_be_loaded() -> None:
    assert {name for metric in all_metrics().values() for name in metric.networks} == set(LOADERS)


def test_for_which_numbers_lower_is_better() -> None:
    lower = {
        "fid",
        "fd_relative",
        "fid_infinity",
        "kid",
        "fd_dinov2",
        "fd_clip",
        "cmmd",
        "dreamsim",
        "lpips",
        "latent_lpips",
    }
    assert {key for key, number in all_numbers().items() if number.better == "lower"} == lower
    assert [key for key, number in all_numbers().items() if number.better == ""] == ["is_deviation"]


def test_labels_name_the_networks() -> None:
    labels = number_labels({"features": {"name": "inception"}, "clip": {"name": "ViT-B-32"}})
    assert (labels["fid"], labels["kid"]) == ("FID", "KID") and labels[
        "clip_score"
    ] == "CLIP score (ViT-B-32)"
    other = number_labels({"features": {"name": "squeezenet"}})
    assert other["fid_infinity"] == "Frechet distance (squeezenet features), endless images"
    assert other["kid"] == "Kernel distance (squeezenet features)"


def test_a_metric_must_say_whether_higher_or_lower_is_better() -> None:
    without = {name: value for name, value in BRIGHTNESS.items() if name != "better"}
    with pytest.raises(TypeError, match="better"):
        Metric(**without)
    with pytest.raises(SettingError, match="metric number brightness: better is 'up'; expected one of"):
        Metric(**BRIGHTNESS | {"better": "up"})
    with pytest.raises(SettingError, match="interval is 'guess'"):
        Metric(**BRIGHTNESS | {"interval": "guess"})


def test_a_metric_registered_by_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    metric = Metric(**BRIGHTNESS)
    for _ in range(2):
        register_metric(metric)
    check_metrics(("fid", "brightness"))
    assert Protocol(name="x", metrics=("brightness",)).metrics == ("brightness",)
    extra = {"brightness": Measure(size=NATIVE, function=lambda images, _: images.double().mean((1, 2, 3)))}
    images = torch.randint(256, (9, 3, 4, 4), dtype=torch.uint8, generator=generator(0))
    source = batch_source("noise", [(images, [""] * 9)])
    networks, protocol = Networks(extra=extra), Protocol(name="x")
    result = evaluate(source, protocol, networks, metrics=("brightness",), resamples=20).result
    assert 0 < result.ci["brightness"][0] < result.extra["brightness"] < result.ci["brightness"][1]
    assert dict(result.rows())["Brightness"].startswith(f"{result.extra['brightness']:.4g}")
    taken = MetricNumber(key="fid", label="", better="", interval="none")
    for other in (replace(metric, label="other"), replace(metric, name="b", key="b", more=(taken,))):
        with pytest.raises(SettingError, match="its name or a key is taken"):
            register_metric(other)


def test_listing_metrics_and_protocols_does_not_import_torch() -> None:
    code = (
        "import sys; from eval.protocols.metric import all_metrics; "
        "from eval.protocols.protocol import PROTOCOLS; "
        "from miniature.registration import register_eval_scenes; register_eval_scenes(); "
        "print(len(all_metrics()), 'miniature' in PROTOCOLS, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.split() == [str(len(all_metrics())), "True", "False", "False"], (
        process.stdout + process.stderr
    )
