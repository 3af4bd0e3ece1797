"""eval.protocols.protocol: the settings of the named protocols, and their digests."""

import dataclasses
import json

import pytest

from d2g.core.errors import SettingError
from eval.images.resize import NATIVE, PREPROCESSING
from eval.protocols.config import EVAL_PRESETS, CurveRun, EvalRun
from eval.protocols.metric import all_metrics
from eval.protocols.protocol import ANY, PROTOCOLS, VIT_B_32, VIT_G_14, Protocol


def test_the_settings_of_the_named_protocols() -> None:
    """Numbers from method.md "Evaluation protocol". Other numbers are not comparable with published ones."""
    expected_sizes = {
        "coco2014-30k-d2gan": (30_000, 40_504, "crop256-bicubic", "crop256-bicubic", VIT_G_14),
        "coco2014-30k-gigagan": (30_000, 40_504, "crop256-lanczos", "crop256-lanczos", VIT_B_32),
        "coco2017-5k-d2gan": (5_000, 5_000, "crop256-bicubic", "crop256-bicubic", VIT_G_14),
        "coco2014-30k-64px": (30_000, 40_504, "crop64-lanczos", "crop64-lanczos", VIT_G_14),
        "coco2014-10k-sdxl": (10_000, 10_000, "crop512-lanczos", "crop256-lanczos", VIT_G_14),
    }
    for name, expected in expected_sizes.items():
        p = PROTOCOLS[name]
        sizes = (p.preprocessing, p.clip_preprocessing)
        assert (p.images, p.reference_images, *sizes, p.clip) == expected, name
        prefix = "" if name == "coco2014-30k-64px" else "A photo depicts "
        assert p.features == "inception" and p.clip_prefix == prefix and p.seed == 1000
        assert p.neighbours == (3, 5) and p.pr_images == 10_000
    for name, images in (("parti-prompts", 0), ("localized-narratives-5k", 5_000)):
        p = PROTOCOLS[name]
        assert (p.images, p.prompts, p.preprocessing) == (images, "given", NATIVE)
        assert p.metrics == ("pickscore", "clip") and p.reference == "given"
    cifar = PROTOCOLS["cifar10-50k"]
    assert (cifar.images, cifar.reference_images, cifar.features) == (50_000, 50_000, "inception-tf")
    assert cifar.preprocessing == NATIVE and cifar.metrics == ("fid",)
    scenes = PROTOCOLS["scenes-5k"]
    assert (scenes.images, scenes.reference_images, scenes.preprocessing) == (5_000, 5_000, "crop64-box")
    folder = PROTOCOLS["folder"]
    assert (folder.features, folder.clip, folder.images, folder.preprocessing) == (ANY, ANY, 0, NATIVE)


def test_the_digest_covers_every_setting_except_the_metrics() -> None:
    digests = {protocol.sha256() for protocol in PROTOCOLS.values()}
    assert len(digests) == len(PROTOCOLS)
    base = PROTOCOLS["coco2014-30k-d2gan"]
    changed = dict(
        name="x", prompts="given", prompts_sha256="ab", reference="given", images=1, reference_images=1,
        size=128, resize="box", crop="none", features="any", clip="any", clip_prefix="", clip_size=224,
        neighbours=(4,), pr_images=1, kid_subsets=2, kid_subset_size=3, is_splits=2,
        diversity_images=3, seed=1,
    )  # fmt: skip
    fields = {field.name for field in dataclasses.fields(Protocol)}
    assert fields == {*changed, "metrics"}, "add the new field to `changed`"
    for name, value in changed.items():
        assert dataclasses.replace(base, **{name: value}).sha256() != base.sha256(), name
    assert dataclasses.replace(base, metrics=("kid",)).sha256() == base.sha256()
    json.dumps(base.settings())


def test_resolved_fills_only_open_fields() -> None:
    folder = PROTOCOLS["folder"].resolved(features="squeezenet", clip="c", prompts_sha256="ab")
    assert (folder.features, folder.clip, folder.prompts_sha256) == ("squeezenet", "c", "ab")
    coco = PROTOCOLS["coco2014-30k-d2gan"].resolved(features="other", clip="other", prompts_sha256="ab")
    assert (coco.features, coco.clip) == ("inception", VIT_G_14), "a network that the protocol fixes stays"


def test_the_preprocessing_of_every_protocol_is_valid() -> None:
    for protocol in PROTOCOLS.values():
        for how in (protocol.preprocessing, protocol.clip_preprocessing):
            assert how == NATIVE or PREPROCESSING.fullmatch(how), protocol.name
        assert protocol.name in PROTOCOLS and set(protocol.metrics) <= set(all_metrics())
        assert protocol.features in protocol.summary() and protocol.sha256()[:12] in protocol.summary()
    assert Protocol(name="x", size=32, resize="box", crop="none").preprocessing == "squash32-box"
    native = Protocol(name="x", resize="box", crop="none")
    assert native.preprocessing == NATIVE and native.sha256() == Protocol(name="x").sha256()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"resize": "lanzcos", "size": 8}, "did you mean 'lanczos'"),
        ({"crop": "center", "size": 8, "resize": "box"}, "did you mean 'centre'"),
        ({"prompts": "coco2014"}, "did you mean 'coco2014-val'"),
        ({"images": -1}, "images is negative"),
        ({"neighbours": ()}, "expected one or more positive numbers"),
        ({"neighbours": (0,)}, "expected one or more positive numbers"),
        ({"kid_subset_size": 1}, "kid_subset_size is below 2"),
        ({"diversity_images": 1}, "diversity_images is below 2"),
        ({"metrics": ()}, "no metrics chosen"),
        ({"metrics": ("fad",)}, "unknown metric 'fad'; did you mean 'fid'"),
    ],
)
def test_invalid_protocols_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Protocol(name="x", **wrong)  # type: ignore[arg-type]


def test_invalid_run_settings_are_refused() -> None:
    for wrong, message in (
        ({"steps": 0}, "steps is 0; expected 1 or more"),
        ({"num": -1}, "num is -1; expected 0 or more"),
        ({"noise_scale": -0.5}, "noise_scale is -0.5"),
    ):
        with pytest.raises(SettingError, match=message):
            EvalRun(**wrong)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="curve over 'scale'"):
        CurveRun(setting="scale", values=(1.0,))
    with pytest.raises(SettingError, match="needs its values, say --over steps=1,2,4"):
        CurveRun(setting="steps")
    assert set(EVAL_PRESETS) == {"default", "miniature"} and EVAL_PRESETS["default"] == EvalRun()


def test_weights_are_assigned_to_networks_by_name() -> None:
    run = EvalRun(weights=("inception.pth", "dinov2=/x=y", "dreamsim=z"))
    assert run.weight_table() == {"features": "inception.pth", "dinov2": "/x=y", "dreamsim": "z"}
    assert CurveRun(setting="steps", values=(4.0,)).at(4.0).steps == 4
    assert CurveRun(setting="guidance", values=(1.5,)).at(1.5).guidance == 1.5
