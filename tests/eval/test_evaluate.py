"""eval.evaluation, eval.summary and eval.result, end to end on tiny tensors."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import generator
from eval.evaluation import Evaluation, evaluate
from eval.images.folders import Batch
from eval.images.resize import NATIVE
from eval.measure.build_reference import build_reference
from eval.measure.measure import Measure
from eval.measure.reference import Reference
from eval.measure.required_networks import DREAMSIM_ROWS, Networks
from eval.measure.rows import MeasureOptions
from eval.measure.source import ImageSource, SampledBatch, batch_source, views_of
from eval.metrics.paired import cosine_distance, encoded, psnr
from eval.networks.base import ClipNet, FeatureNet
from eval.networks.pickscore import PickNet
from eval.protocols.protocol import Protocol
from eval.result import EvalResult, compare

CHANNELS = ("red", "green", "blue")
TINY = Protocol(name="tiny", features="oracle", neighbours=(3, 5), pr_images=100, kid_subsets=5)


def mean_color(images: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(images.double(), 2).flatten(1)


def ten_classes(features: Tensor) -> Tensor:
    return features[:, :10].double() / 20


ORACLE = FeatureNet(name="oracle", dim=12, sha256="0a" * 32, function=mean_color, classifier=ten_classes)


def color_clip() -> ClipNet:
    """A CLIP that encodes an image as its mean color and a text as the color it names."""

    def texts(prompts: list[str]) -> Tensor:
        return F.normalize(torch.tensor([[float(c in p) for c in CHANNELS] for p in prompts]), dim=1)

    def images(batch: Tensor) -> Tensor:
        return F.normalize(batch.float().mean((2, 3)), dim=1)

    return ClipNet(name="colors", dim=3, sha256="0b" * 32, encode_images=images, encode_texts=texts)


def pick_score(images: Tensor, prompts: list[str]) -> Tensor:
    return images.double().mean((1, 2, 3))


PICK = PickNet(name="pick", sha256="0d" * 32, score=pick_score)
NETWORKS = Networks(sets={"features": ORACLE}, clip=color_clip())
ALL_NETWORKS = Networks(
    sets={
        name: dataclasses.replace(ORACLE, name=name) for name in ("dinov2", "fd_clip", "cmmd", DREAMSIM_ROWS)
    }
    | {"features": ORACLE},
    clip=color_clip(),
    pick=PICK,
    pairs={"dreamsim": encoded(ORACLE, cosine_distance), "psnr": psnr},
)


def color_images(count: int, seed: int, spread: float = 40.0, shift: float = 0.0) -> Batch:
    """Noisy images whose main color is the one in their prompt."""
    color = torch.arange(count) % 3
    base = 60 + 100 * F.one_hot(color, 3)[:, :, None, None] + shift
    images = base + spread * torch.randn(count, 3, 4, 4, generator=generator(seed))
    return images.clamp(0, 255).to(torch.uint8), [f"all {CHANNELS[i]}" for i in color.tolist()]


def source(count: int, seed: int, **options: float) -> ImageSource:
    return batch_source(f"{count} of {seed}", [color_images(count, seed, **options)])


def real(protocol: Protocol = TINY, networks: Networks = NETWORKS) -> Reference:
    return build_reference(source(120, 1), protocol, networks.sets)


REFERENCE = real()


def run(
    images: ImageSource, protocol: Protocol = TINY, networks: Networks = NETWORKS, **options: Any
) -> Evaluation:
    settings: dict[str, Any] = {"reference": REFERENCE, "resamples": 20, **options}
    return evaluate(images, protocol, networks, **settings)


def measure(
    images: ImageSource, protocol: Protocol = TINY, networks: Networks = NETWORKS, **options: Any
) -> EvalResult:
    return run(images, protocol, networks, **options).result


def test_the_keys_and_values_of_a_result() -> None:
    data = measure(source(90, seed=2)).to_json()
    keys = {
        "protocol",
        "protocol_sha256",
        "fid",
        "clip_score",
        "precision",
        "recall",
        "counts",
        "models",
        "ci",
    }
    assert keys <= set(data)
    assert data["counts"] == {"images": 90, "reference": 120, "pr_images": 90, "pr_reference": 100}
    assert data["models"]["features"] == {"name": "oracle", "dim": "12", "sha256": "0a" * 32}
    assert data["models"]["clip"]["name"] == "colors"
    assert data["models"]["reference"]["images"] == "120"
    for key in ("fid", "clip_score", "precision", "recall"):
        assert data["ci"][key][0] < data[key] < data["ci"][key][1], key
    assert data["precision"] == data["neighbours"]["3"]["precision"] <= data["neighbours"]["5"]["precision"]
    assert data["settings"]["clip"] == "colors" and data["settings"]["prompts_sha256"]
    assert data["source"] == {"name": "90 of 2", "kind": "memory"} | {"name": "90 of 2"}
    json.dumps(data)


def test_worse_images_get_worse_numbers() -> None:
    good, worse = measure(source(90, 2)), measure(source(90, 2, shift=60.0))
    images, prompts = color_images(90, seed=2)
    swapped = measure(batch_source("swapped", [(images, prompts[1:] + prompts[:1])]))
    assert good.fid is not None and worse.fid is not None and worse.fid > 10 * good.fid
    assert good.precision is not None and worse.precision is not None and worse.precision < good.precision
    assert good.clip_score is not None and swapped.clip_score is not None
    assert swapped.clip_score < good.clip_score - 0.1
    assert swapped.fid == good.fid


def test_the_reference_compared_with_itself_has_fid_zero() -> None:
    result = measure(source(120, 1))
    assert result.fid == pytest.approx(0, abs=1e-6) and (result.precision, result.recall) == (1, 1)


def test_a_collapsed_generator_has_precision_but_no_recall() -> None:
    images, prompts = color_images(90, seed=2, spread=2.0)
    collapsed = measure(batch_source("one color", [(images[:3].repeat(30, 1, 1, 1), prompts)]))
    assert collapsed.precision == 1 and collapsed.recall is not None and collapsed.recall < 0.2


@pytest.mark.parametrize("size", [1, 7, 90])
def test_batches_and_parts_do_not_change_the_result(size: int, tmp_path: Path) -> None:
    expected = measure(source(90, 2), work=MeasureOptions(batch_size=32))
    other = measure(source(90, 2), work=MeasureOptions(batch_size=size, part=17, folder=tmp_path))
    assert other == expected


def test_all_metrics_in_one_evaluation() -> None:
    protocol = dataclasses.replace(TINY, diversity_images=3, is_splits=5)
    against = {"fid", "fid_infinity", "kid", "pr", "dc", "fd_dinov2", "fd_clip", "cmmd"}
    metrics = (*sorted(against), "is", "clip", "pickscore", "dreamsim_diversity", "dreamsim", "psnr")
    reference = real(protocol, ALL_NETWORKS)
    other = batch_source("other", [(color_images(90, 3)[0], [""] * 90)])
    result = measure(
        endless_sampler(), protocol, ALL_NETWORKS, metrics=metrics, reference=reference, other=other, count=90
    )
    numbers = result.numbers()
    more = {"clip_score", "precision", "recall", "density", "coverage", "is_deviation"}
    assert set(numbers) == {*metrics, *more} - {"clip", "pr", "dc"}
    assert numbers["fd_dinov2"] == pytest.approx(numbers["fid"]) and 1 < numbers["is"] < 10
    assert result.counts["diversity_images"] == 270 and result.counts["diversity_prompts"] == 90
    networks = {"features", "dinov2", "fd_clip", "cmmd", DREAMSIM_ROWS, "clip", "pickscore"}
    assert set(result.models) == {*networks, "reference"}
    for name in numbers.keys() - {"is_deviation"}:
        assert result.ci[name][0] <= numbers[name] <= result.ci[name][1], name
    labels = dict(result.rows())
    assert "PSNR to the teacher (dB)" in labels and "(95 %:" in labels["PickScore"]


def endless_sampler() -> ImageSource:
    """A sampler without a limit: image i shows prompt i modulo 90."""

    def draw(numbers: range, batch_size: int, sizes: Sequence[str]) -> Iterator[SampledBatch]:
        for first in range(numbers.start, numbers.stop, batch_size):
            part = range(first, min(first + batch_size, numbers.stop))
            images = torch.cat([color_images(1, 1_000 + number)[0] for number in part])
            texts = [f"{number % 90}: all red" for number in part]
            yield SampledBatch(first=first, views=views_of(images, sizes), prompts=texts)

    return ImageSource(name="endless", facts={"kind": "test"}, draw=draw)


def test_extra_measures_are_averaged() -> None:
    brightness = Measure(size=NATIVE, function=lambda images, _: images.double().mean((1, 2, 3)))
    networks = dataclasses.replace(
        NETWORKS, extra={"caption_accuracy": brightness, "caption_exact": brightness}
    )
    result = run(source(90, 2), networks=networks)
    expected = color_images(90, seed=2)[0].double().mean().item()
    assert result.result.extra["caption_accuracy"] == pytest.approx(expected)
    assert result.rows.values["caption_accuracy"].shape == (90,)


def test_one_metric_needs_only_its_own_network() -> None:
    only = Networks(clip=color_clip())
    clip_only = measure(source(9, 2), networks=only, metrics=("clip",), reference=None)
    assert clip_only.fid is None and clip_only.clip_score is not None and set(clip_only.models) == {"clip"}
    sets = Networks(sets={"features": ORACLE})
    fid_only = measure(source(30, 2), networks=sets, metrics=("fid",), resamples=0)
    assert fid_only.clip_score is None and fid_only.precision is None and fid_only.ci == {}
    with pytest.raises(SettingError, match=r"metric 'fid' .* needs a reference; give --reference"):
        measure(source(9, 2), reference=None)
    with pytest.raises(SettingError, match="metric 'psnr' needs images to compare with; give --against"):
        measure(source(9, 2), metrics=("psnr",))
    with pytest.raises(SettingError, match="unknown metric 'fad'; did you mean 'fid'"):
        measure(source(9, 2), metrics=("fad",))


def test_a_missing_network_is_refused_before_an_image_is_drawn() -> None:
    def draw(numbers: range, batch_size: int, sizes: Sequence[str]) -> Iterator[SampledBatch]:
        raise AssertionError("an image was drawn")

    unread, only = ImageSource(name="unread", facts={}, draw=draw, count=30), Networks(clip=color_clip())
    for name, network in [("is", "features"), ("fd_dinov2", "dinov2"), ("pickscore", "pickscore")]:
        with pytest.raises(SettingError, match=rf"'{name}' .* needs the network '{network}', which is not"):
            measure(unread, networks=only, metrics=(name,))
    for name in ("dreamsim", "lpips"):
        with pytest.raises(
            SettingError, match=f"metric '{name}' .* needs the network '{name}', which is not"
        ):
            measure(unread, networks=only, metrics=(name,), other=unread)
    with pytest.raises(SettingError, match="needs the network 'dreamsim', which is not loaded; add it to"):
        measure(unread, networks=only, metrics=("dreamsim_diversity",))
    without = Networks(sets={"features": dataclasses.replace(ORACLE, classifier=None)})
    with pytest.raises(SettingError, match="metric 'is' needs a network with classes, and oracle has none"):
        measure(unread, networks=without, metrics=("is",))


def test_a_distance_without_a_network_needs_none() -> None:
    result = measure(source(9, 2), networks=Networks(), metrics=("psnr",), other=source(9, 3))
    expected = psnr(color_images(9, 2)[0], color_images(9, 3)[0]).double().mean()
    assert result.numbers() == {"psnr": pytest.approx(expected.item())}


def test_too_few_images_are_refused_or_noted() -> None:
    protocol = dataclasses.replace(TINY, images=40, reference_images=120)
    exact = measure(source(90, 2), protocol)
    assert exact.counts["images"] == 40
    assert not any("the protocol has" in note for note in exact.notes)
    with pytest.raises(
        UserError, match="30 of 2 gives 30 images, protocol tiny measures 40; make the rest or give"
    ):
        measure(source(30, 2), protocol)
    with pytest.raises(UserError, match="gives 20 images, protocol tiny measures 40"):
        measure(source(90, 2), protocol, count=20)
    fewer = measure(source(30, 2), protocol, allow_fewer=True)
    assert "30 images, the protocol has 40: not comparable with published numbers" in fewer.notes
    with pytest.raises(UserError, match=r"got 1 image to evaluate; expected at least 2"):
        measure(source(1, 2))
    with pytest.raises(UserError, match="got no images at all"):
        batch_source("none", [])


def test_other_tensors_than_uint8_images_with_a_caption_each_are_refused() -> None:
    images, captions = color_images(9, 2)
    others = [images / 255, images.permute(0, 2, 3, 1), images[:, :1], images[0]]
    for other in others:
        with pytest.raises(UserError, match=r"mine: images are .*; expected torch.uint8 \[B, 3, H, W\] of 0"):
            batch_source("mine", [(images, captions), (other, captions)])
    with pytest.raises(UserError, match="mine: 9 images with 3 captions; expected one for each"):
        batch_source("mine", [(images, captions[:3])])


def test_fewer_images_than_features_are_noted() -> None:
    few = measure(source(9, 2))
    assert any(
        note.startswith(
            "9 images for 12 oracle features: covariances are singular, and Frechet distances biased"
        )
        for note in few.notes
    )
    assert few.fid is not None and few.fid > 0
    assert not any("covariances are singular" in note for note in measure(source(30, 2)).notes)


def test_no_more_images_are_sampled_than_the_protocol_needs() -> None:
    requested: list[range] = []
    inner = source(90, 2)

    def draw(numbers: range, batch_size: int, sizes: Sequence[str]) -> Iterator[SampledBatch]:
        requested.append(numbers)
        return inner.draw(numbers, batch_size, sizes)

    sampler = ImageSource(name="sampler", facts={}, draw=draw)
    measure(sampler, dataclasses.replace(TINY, images=30), resamples=0)
    assert [n for part in requested for n in part] == list(range(30))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("pr", "k = 5 need more images than that, got 5"),
        ("is", "of 10 splits needs as many images, got 5"),
        ("fid_infinity", "of 12 features takes 3 points or more from 24 images on"),
    ],
)
def test_too_few_images_for_a_metric_are_refused_before_sampling(metric: str, message: str) -> None:
    def draw(numbers: range, batch_size: int, sizes: Sequence[str]) -> Iterator[SampledBatch]:
        raise AssertionError("an image was drawn")

    sampler = ImageSource(name="sampler", facts={"kind": "test"}, draw=draw)
    with pytest.raises(UserError, match=message):
        measure(sampler, networks=ALL_NETWORKS, metrics=(metric,), count=5)


def test_only_the_distance_of_inception_features_is_called_fid() -> None:
    labels = dict(measure(source(30, 2)).rows())
    assert "Frechet distance (oracle features)" in labels and "Kernel distance (oracle features)" in labels
    assert not any("FID" in label for label in labels)
    inception = dataclasses.replace(ORACLE, name="inception")
    networks, protocol = (
        Networks(sets={"features": inception}, clip=color_clip()),
        dataclasses.replace(TINY, features="inception"),
    )
    result = measure(source(30, 2), protocol, networks, reference=real(protocol, networks), resamples=0)
    assert "FID" in dict(result.rows())
    assert any("Inception weights are not the published" in note for note in result.notes)


def test_a_reference_of_another_protocol_or_network_is_refused() -> None:
    other = Networks(sets={"features": dataclasses.replace(ORACLE, sha256="0c" * 32)}, clip=color_clip())
    with pytest.raises(
        UserError, match=r"reference 120 of 1 was measured another way: features.features_sha256"
    ):
        measure(source(9, 2), networks=other)
    with pytest.raises(UserError, match=r"another way: preprocessing \('native' -> 'crop4-box'\)"):
        measure(source(9, 2), dataclasses.replace(TINY, size=4, resize="box", crop="centre"))
    with pytest.raises(UserError, match=r"another way: reference \('given' -> 'coco2014-val'\)"):
        measure(source(9, 2), dataclasses.replace(TINY, reference="coco2014-val"))
    wrong = Networks(sets={"features": dataclasses.replace(ORACLE, name="guess")}, clip=color_clip())
    with pytest.raises(UserError, match="measures with features 'oracle', got 'guess'"):
        measure(source(9, 2), networks=wrong)
    with pytest.raises(UserError, match="measures with CLIP 'ViT', got 'colors'"):
        measure(source(9, 2), dataclasses.replace(TINY, clip="ViT"))
    with pytest.raises(UserError, match="has no statistics of dinov2 features; make it again"):
        measure(source(9, 2), networks=ALL_NETWORKS, metrics=("fd_dinov2",))


def test_the_reference_is_built_after_all_other_checks() -> None:
    def fail_if_called() -> Reference:
        raise AssertionError("built too early")

    with pytest.raises(UserError, match="expected at least 2"):
        measure(source(1, 2), reference=fail_if_called)


def test_the_error_names_an_image_without_prompt() -> None:
    images, prompts = color_images(9, 2)
    with pytest.raises(UserError, match="image 0 has no prompt, so it has no clip_score"):
        measure(batch_source("x", [(images, ["", *prompts[1:]])]))


def test_compare_refuses_results_of_different_protocols() -> None:
    a, b = measure(source(30, 2)), measure(source(30, 3))
    rows = compare({"b": b, "a": a})
    assert [row["name"] for row in rows] == ["a", "b"] and rows[0]["fid"] == a.fid
    assert rows[0]["ci"] == a.ci and a.ci["fid"][0] < a.fid
    other = dataclasses.replace(TINY, clip_prefix="A photo depicts ")
    with pytest.raises(
        UserError, match=r"a and mixed do not compare: protocol_sha256 .*settings.clip_prefix \('' -> 'A"
    ):
        compare({"a": a, "mixed": measure(source(30, 3), other)})
    with pytest.raises(UserError, match=r"settings.seed \(1000 -> 1\)"):
        compare({"a": a, "mixed": measure(source(30, 3), dataclasses.replace(TINY, seed=1))})
    with pytest.raises(UserError, match=r"counts.images \(30 -> 27\)"):
        compare({"a": a, "b": measure(source(27, 3))})
    images, prompts = color_images(30, 3)
    swapped = measure(batch_source("x", [(images, prompts[1:] + prompts[:1])]))
    with pytest.raises(UserError, match=r"settings.prompts_sha256"):
        compare({"a": a, "b": swapped})
    clip_only = measure(
        source(30, 3), networks=Networks(clip=color_clip()), metrics=("clip",), reference=None
    )
    assert clip_only.settings["features"] == "oracle"
    assert len(compare({"a": a, "clip only": clip_only})) == 2, (
        "a result with fewer metrics has the same protocol"
    )
    with pytest.raises(UserError, match="no results to compare"):
        compare({})


def test_every_two_results_of_a_table_must_compare() -> None:
    """The first result has no reference; the other two have different ones."""
    a, b = measure(source(30, 2)), measure(source(30, 3))
    clip_only = measure(
        source(30, 3), networks=Networks(clip=color_clip()), metrics=("clip",), reference=None
    )
    other = dataclasses.replace(
        b, models={**b.models, "reference": {**b.models["reference"], "files_sha256": "0a"}}
    )
    with pytest.raises(UserError, match=r"b and c do not compare: models.reference.files_sha256"):
        compare({"a": clip_only, "b": a, "c": other})
    assert len(compare({"a": clip_only, "b": a, "c": b})) == 3


def test_results_are_read_back_from_file_and_folder(tmp_path: Path) -> None:
    a = measure(source(30, 2))
    (tmp_path / "result.json").write_text(json.dumps(a.to_json()))
    assert EvalResult.load(tmp_path / "result.json") == a == EvalResult.load(tmp_path)
    with pytest.raises(UserError, match=r"b.json is no evaluation result"):
        EvalResult.load(tmp_path / "b.json")
    (tmp_path / "c.json").write_text('{"fid": 3}')
    with pytest.raises(UserError, match=r"c.json is no evaluation result"):
        EvalResult.load(tmp_path / "c.json")
