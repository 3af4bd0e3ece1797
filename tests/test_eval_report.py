"""eval.report, eval.result, and the small measures, end to end on tiny tensors."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import SettingError, UserError
from core.seeds import generator
from eval.config import PROTOCOLS, Protocol, protocol_sha256
from eval.diversity import prompt_diversity
from eval.features import ClipNet, FeatureNet
from eval.images import Batch, to_pil
from eval.paired import paired_distances, rmse
from eval.report import collect, evaluate, reference_stats
from eval.result import EvalResult, compare
from eval.speed import milliseconds_per_image

CHANNELS = ("red", "green", "blue")
TINY = Protocol(name="tiny", features="oracle", neighbours=(3, 5), pr_images=100)


def mean_colour(images: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(images.double(), 2).flatten(1)


ORACLE = FeatureNet(name="oracle", dim=12, sha256="0a" * 32, function=mean_colour)


def colour_clip() -> ClipNet:
    """A CLIP whose pictures are their mean colour and whose texts are the colour they name."""

    def texts(prompts: list[str]) -> Tensor:
        return F.normalize(torch.tensor([[float(c in p) for c in CHANNELS] for p in prompts]), dim=1)

    def images(batch: Tensor) -> Tensor:
        return F.normalize(batch.float().mean((2, 3)), dim=1)

    return ClipNet(name="colours", dim=3, sha256="0b" * 32, encode_images=images, encode_texts=texts)


def pictures(count: int, seed: int, spread: float = 40.0, shift: float = 0.0) -> Batch:
    """Noisy pictures, each mainly of the colour in its prompt."""
    wanted = torch.arange(count) % 3
    base = 60 + 100 * F.one_hot(wanted, 3)[:, :, None, None] + shift
    images = base + spread * torch.randn(count, 3, 4, 4, generator=generator(seed))
    return images.clamp(0, 255).to(torch.uint8), [f"all {CHANNELS[i]}" for i in wanted.tolist()]


def batches(batch: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, len(batch[0]), size):
        yield batch[0][start : start + size], batch[1][start : start + size]


REAL = pictures(120, seed=1)
REFERENCE = collect([REAL], ORACLE, resize="native", source="real")


def measure(batch: Batch, size: int = 32, protocol: Protocol = TINY, **options: object) -> EvalResult:
    settings = {"features": ORACLE, "clip": colour_clip(), "resamples": 20} | options
    return evaluate(batches(batch, size), REFERENCE, protocol, **settings)  # type: ignore[arg-type]


def test_the_contracts_keys_and_sane_numbers() -> None:
    result = measure(
        pictures(90, seed=2), extra={"brightness": lambda images, _: images.double().mean().item()}
    )
    data = result.to_json()
    assert {
        "protocol",
        "protocol_sha256",
        "fid",
        "clip_score",
        "precision",
        "recall",
        "counts",
        "models",
        "ci",
    } <= set(data)
    assert data["counts"] == {"images": 90, "reference": 120, "pr_images": 90, "pr_reference": 100}
    assert data["models"]["features"] == {"name": "oracle", "dim": "12", "sha256": "0a" * 32}
    assert data["models"]["clip"]["name"] == "colours"
    assert data["protocol_sha256"] == protocol_sha256(TINY)
    assert data["ci"]["fid"][0] < data["fid"] < data["ci"]["fid"][1]
    assert data["ci"]["clip_score"][0] < data["clip_score"] < data["ci"]["clip_score"][1]
    assert data["precision"] == data["neighbours"]["3"]["precision"] <= data["neighbours"]["5"]["precision"]
    assert data["extra"]["brightness"] == pytest.approx(pictures(90, seed=2)[0].double().mean().item())
    json.dumps(data)


def test_better_pictures_score_better() -> None:
    good, worse = measure(pictures(90, seed=2)), measure(pictures(90, seed=2, shift=60))
    images, prompts = pictures(90, seed=2)
    swapped = measure((images, prompts[1:] + prompts[:1]))
    assert good.fid is not None and worse.fid is not None and worse.fid > 10 * good.fid
    assert good.precision is not None and worse.precision is not None and worse.precision < good.precision
    assert good.clip_score is not None and swapped.clip_score is not None
    assert swapped.clip_score < good.clip_score - 0.1
    assert swapped.fid == good.fid


def test_the_reference_against_itself_is_at_zero() -> None:
    result = measure(REAL)
    assert result.fid == pytest.approx(0, abs=1e-6) and (result.precision, result.recall) == (1, 1)


@pytest.mark.parametrize("size", [1, 7, 90])
def test_batches_do_not_change_the_result(size: int) -> None:
    images = pictures(90, seed=2)
    one, other = measure(images, 32), measure(images, size)
    for key in ("fid", "kid", "clip_score", "precision", "recall"):
        assert getattr(one, key) == pytest.approx(getattr(other, key), rel=1e-8), key
    assert one.ci["fid"] == pytest.approx(other.ci["fid"], rel=1e-8)


def test_one_metric_needs_only_its_own_network() -> None:
    clip_only = evaluate(
        batches(pictures(9, 2), 4), None, TINY, features=None, clip=colour_clip(), metrics=("clip",)
    )
    assert clip_only.fid is None and clip_only.clip_score is not None and set(clip_only.models) == {"clip"}
    fid_only = measure(pictures(30, 2), clip=None, metrics=("fid",), resamples=0)
    assert fid_only.clip_score is None and fid_only.precision is None and fid_only.ci == {}
    with pytest.raises(SettingError, match="metric 'clip' needs a CLIP model"):
        measure(pictures(9, 2), clip=None)
    with pytest.raises(SettingError, match="metric 'fid' needs a feature network and a reference"):
        measure(pictures(9, 2), features=None)
    with pytest.raises(SettingError, match="unknown metric 'fad'; did you mean 'fid'"):
        measure(pictures(9, 2), metrics=("fad",))


def test_the_protocols_counts_are_kept_or_noted() -> None:
    protocol = dataclasses.replace(TINY, images=40, reference_images=120)
    exact = measure(pictures(90, 2), protocol=protocol)
    assert exact.counts["images"] == 40
    assert not any("the protocol has" in note for note in exact.notes)
    fewer = measure(pictures(30, 2), protocol=protocol)
    assert "30 images, the protocol has 40: not comparable with published numbers" in fewer.notes
    few = measure(pictures(9, 2))
    assert "9 images for 12 features: the distance is biased upwards" in few.notes


def test_a_sampler_is_not_asked_for_more_than_the_protocol_wants() -> None:
    asked = []

    def sampler() -> Iterator[Batch]:
        for number in range(100):
            asked.append(number)
            yield pictures(10, number)

    measure_all = dataclasses.replace(TINY, images=30)
    evaluate(sampler(), REFERENCE, measure_all, features=ORACLE, clip=colour_clip(), resamples=0)
    assert asked == [0, 1, 2]


def test_only_inception_is_called_fid() -> None:
    labels = dict(measure(pictures(30, 2)).rows())
    assert "Frechet distance (oracle features)" in labels and "Kernel distance (oracle features)" in labels
    assert not any("FID" in label for label in labels)
    named = dataclasses.replace(ORACLE, name="inception")
    real = collect([REAL], named, resize="native", source="real")
    protocol = dataclasses.replace(TINY, features="inception")
    result = evaluate([pictures(30, 2)], real, protocol, features=named, clip=colour_clip(), resamples=0)
    assert "FID" in dict(result.rows())
    assert any("Inception weights are not the published" in note for note in result.notes)


def test_a_reference_measured_another_way_is_refused() -> None:
    other = dataclasses.replace(ORACLE, sha256="0c" * 32)
    with pytest.raises(UserError, match="reference real was measured another way: features_sha256"):
        measure(pictures(9, 2), features=other)
    with pytest.raises(UserError, match=r"another way: resize \('native' -> 'crop4-box'\)"):
        measure(pictures(9, 2), protocol=dataclasses.replace(TINY, resize="crop4-box"))
    wrong = dataclasses.replace(ORACLE, name="guess")
    with pytest.raises(UserError, match="measures with features 'oracle', got 'guess'"):
        measure(pictures(9, 2), features=wrong)


def test_references_from_files_equal_those_in_memory(tmp_path: Path) -> None:
    folder = tmp_path / "real"
    folder.mkdir()
    for number, image in enumerate(REAL[0]):
        to_pil(image).save(folder / f"{number:04}.png")
    REFERENCE.save(tmp_path / "real.safetensors")
    fids = [
        evaluate([pictures(30, 2)], source, TINY, features=ORACLE, metrics=("fid", "pr"), resamples=0)
        for source in (REFERENCE, tmp_path / "real.safetensors", folder)
    ]
    for result in fids[1:]:
        assert result.fid == pytest.approx(fids[0].fid, rel=1e-9)
        assert result.recall == fids[0].recall
    limited = dataclasses.replace(TINY, reference_images=50)
    assert reference_stats(folder, limited, ORACLE).count == 50


def test_missing_prompts_and_too_few_images() -> None:
    images, prompts = pictures(9, 2)
    with pytest.raises(UserError, match="an image has no prompt"):
        measure((images, ["", *prompts[1:]]))
    with pytest.raises(UserError, match=r"got 0 image\(s\) to evaluate"):
        evaluate([], REFERENCE, TINY, features=ORACLE, clip=colour_clip())


def test_compare_refuses_what_does_not_compare(tmp_path: Path) -> None:
    a, b = measure(pictures(30, 2)), measure(pictures(30, 3))
    rows = compare({"b": b, "a": a})
    assert [row["name"] for row in rows] == ["a", "b"] and rows[0]["fid"] == a.fid
    other = dataclasses.replace(TINY, clip_prefix="A photo depicts ")
    with pytest.raises(UserError, match="a and mixed do not compare: protocol_sha256"):
        compare({"a": a, "mixed": measure(pictures(30, 3), protocol=other)})
    with pytest.raises(UserError, match=r"counts.images \(30 -> 20\)"):
        compare({"a": a, "b": measure(pictures(20, 3))})
    (tmp_path / "a.json").write_text(json.dumps(a.to_json()))
    assert EvalResult.load(tmp_path / "a.json") == a
    with pytest.raises(UserError, match=r"b.json is no evaluation result"):
        EvalResult.load(tmp_path / "b.json")


def test_protocols_have_their_own_digests() -> None:
    assert set(PROTOCOLS) >= {
        "coco2014-30k",
        "coco2014-30k-bicubic",
        "coco2017-5k",
        "cifar10-50k",
        "custom",
        "miniature",
    }
    assert len({protocol_sha256(protocol) for protocol in PROTOCOLS.values()}) == len(PROTOCOLS)
    with pytest.raises(SettingError, match="resize is 'huge'"):
        Protocol(name="x", resize="huge")
    with pytest.raises(SettingError, match="unknown metric"):
        Protocol(name="x", metrics=("is",))


def test_diversity_is_within_prompts() -> None:
    red, blue = torch.tensor([255, 0, 0]), torch.tensor([0, 0, 255])
    flat = torch.stack([red, red, blue, red]).to(torch.uint8)[:, :, None, None].expand(-1, 3, 4, 4)
    same = prompt_diversity([(flat[:2], ["p", "p"])], ORACLE)
    assert same == {"diversity": pytest.approx(0, abs=1e-12), "prompts": 1, "images": 2}
    mixed = prompt_diversity(batches((flat, ["p", "p", "p", "alone"]), 2), ORACLE)
    assert mixed["diversity"] == pytest.approx(2 / 3) and mixed["images"] == 3
    with pytest.raises(UserError, match="at least two images of some prompt"):
        prompt_diversity([(flat, list("abcd"))], ORACLE)


def test_paired_distances_average_over_all_pairs() -> None:
    teacher = torch.zeros(5, 4, 2, 2)
    student = torch.arange(5.0).view(5, 1, 1, 1).expand_as(teacher)
    halves = [(student[:3], teacher[:3]), (student[3:], teacher[3:])]
    result = paired_distances(halves, {"latent_rmse": rmse})["latent_rmse"]
    assert (result.mean, result.pairs) == (2.0, 5)
    assert result.standard_error == pytest.approx((2.5 / 5) ** 0.5)
    with pytest.raises(UserError, match="no pairs"):
        paired_distances([], {"latent_rmse": rmse})


def test_timing_counts_calls_and_takes_the_median() -> None:
    calls: list[int] = []
    work = torch.randn(64, 64)

    def sample() -> None:
        calls.append(1)
        repeat = 400 if len(calls) == 3 else 1  # one outlier among the timed calls
        for _ in range(repeat):
            work @ work

    assert 0 < milliseconds_per_image(sample, repeats=5, warmup=2) < 20
    assert len(calls) == 7
    with pytest.raises(SettingError, match="repeats >= 1"):
        milliseconds_per_image(sample, repeats=0)
