"""Statistics of a store against NumPy and SciPy, and the contact sheet against the decoder."""

import json
import re
from collections.abc import Callable
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import tiny
from d2g.core import seeds
from d2g.core.captioned_grid import SMALLEST, captioned_grid, columns, load_font, wrap
from d2g.core.errors import UserError
from d2g.diffusion.latents import LatentSpace, decode_uint8
from d2g.diffusion.pretrained import load_vae
from jobs import d2g
from pairgen import statistics
from pairgen.contact_sheet import save_sheet
from pairgen.prompts import PromptList, label_list, prompt_list_sha256
from pairgen.statistics import (
    Moments,
    chi_cdf,
    chi_moments,
    distribution,
    evenly_spread,
    store_statistics,
    whole_edges,
)
from pairgen.store.hdf5 import PairBatch, encode_rows
from pairgen.store.reader import PairReader
from pairgen.store.spec import StoreSpec, create_store, prompts_path, shard_path, write_through_scratch

ROOT = Path(__file__).parents[2]
TEXTS = PromptList.of(["a cat", "two dogs and a very long tail", "☃"])


def make_store(
    folder: Path,
    latent: torch.Tensor,
    noise: torch.Tensor | None = None,
    texts: PromptList = TEXTS,
    kind: Any = "text",
) -> StoreSpec:
    """A store of one shard with these latents [N, C, H, W]; noise defaults to that of (seed, index)."""
    spec = StoreSpec(
        teacher="nowhere",
        teacher_sha256="0" * 64,
        conditioning=kind,
        prompts_sha256=prompt_list_sha256(texts),
        num_pairs=len(latent),
        num_prompts=len(texts),
        solver="ddim",
        steps=1,
        spacing="leading",
        final_alpha_one=True,
        guidance=1.0,
        seed=3,
        dtype="float32",
        latent_shape=tuple(latent.shape[1:]),  # type: ignore[arg-type]
        latent_space=LatentSpace(channels=latent.shape[1], downscale=4, scale=0.7),
        shard_size=len(latent),
    )
    create_store(folder, spec)
    texts.save(prompts_path(folder))
    index = torch.arange(len(latent))
    latent_noise = seeds.noise(3, index.tolist(), spec.latent_shape) if noise is None else noise
    prompts = [texts[spec.prompt_of(i)] for i in range(len(latent))]
    rows = PairBatch(noise=latent_noise, latents=latent, prompts=prompts, index=index)
    write_through_scratch(encode_rows(spec, rows), shard_path(folder, 0), folder / "partial")
    return spec


# Moments.


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([0.0, -7.0, 1e6]))
def test_moments_do_not_depend_on_the_split(sizes: list[int], shift: float) -> None:
    draw = np.random.default_rng(sum(sizes))
    noise = draw.normal(size=(sum(sizes), 3, 2, 4))
    latent = 0.3 * noise + draw.normal(size=noise.shape) + shift
    places = np.cumsum(sizes)[:-1]
    parts = zip(np.split(noise, places), np.split(latent, places), strict=True)
    merged = reduce(Moments.merged, [Moments.of(a, b) for a, b in parts])
    by_channel = [values.transpose(1, 0, 2, 3).reshape(3, -1) for values in (noise, latent)]
    assert merged.count == sum(sizes) * 8
    np.testing.assert_allclose(merged.mean, np.stack([v.mean(axis=1) for v in by_channel], axis=1), atol=1e-9)
    np.testing.assert_allclose(merged.std, np.stack([v.std(axis=1) for v in by_channel], axis=1), rtol=1e-8)
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(*by_channel, strict=True)]
    np.testing.assert_allclose(merged.correlation, expected, atol=1e-8)


def test_a_constant_has_no_correlation() -> None:
    noise = np.random.default_rng(0).normal(size=(3, 2, 2, 2))
    assert Moments.of(noise, np.ones_like(noise)).correlation.tolist() == [0.0, 0.0]


# Distributions.


@pytest.mark.parametrize("degrees", [1, 2, 64, 4096, 16_384, 262_144])
def test_chi_distribution_equals_scipy(degrees: int) -> None:
    reference = scipy.stats.chi(degrees)
    mean, std = chi_moments(degrees)
    assert mean == pytest.approx(reference.mean(), rel=1e-9) and std == pytest.approx(
        reference.std(), rel=1e-4
    )
    values = np.linspace(max(0.0, mean - 6 * std), mean + 6 * std, 50)
    np.testing.assert_allclose(chi_cdf(values, degrees), reference.cdf(values), atol=1e-9)


@given(st.lists(st.integers(0, 500), min_size=1))
def test_bins_of_integers_have_equal_counts(values: list[int]) -> None:
    numbers = np.array(values, np.float64)
    edges = whole_edges(numbers)
    assert len(edges) <= statistics.BINS + 1 and sum(distribution(numbers, edges)["counts"]) == len(values)
    assert len({len(range(int(a + 0.5), int(b + 0.5))) for a, b in pairwise(edges)}) == 1


def test_summary() -> None:
    values = np.random.default_rng(1).normal(size=1000)
    summary = distribution(values)
    assert (
        summary["mean"] == values.mean()
        and summary["std"] == values.std()
        and summary["median"] == np.median(values)
    )
    assert (
        (summary["edges"][0], summary["edges"][-1])
        == (values.min(), values.max())
        == (summary["min"], summary["max"])
    )
    assert sum(summary["counts"]) == 1000 and len(summary["counts"]) == statistics.BINS


def test_spread() -> None:
    assert (
        list(evenly_spread(10, 0))
        == list(evenly_spread(10, 10))
        == list(evenly_spread(10, 99))
        == list(range(10))
    )
    assert list(evenly_spread(10, 3)) == [0, 4, 9] and list(evenly_spread(10, 1)) == [0]
    assert all(len(evenly_spread(1000, count)) == count for count in range(1, 999, 37))


# Statistics of a store.


def latents_of(count: int) -> torch.Tensor:
    first, second = (seeds.noise(seed, range(count), (2, 4, 4)) for seed in (3, 4))
    return 0.5 * first + second + torch.tensor([1.0, -2.0])[:, None, None]


@pytest.mark.parametrize("block_values", [1, 300, 1 << 21])
def test_statistics_cover_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_values: int
) -> None:
    monkeypatch.setattr(statistics, "BLOCK_VALUES", block_values)
    latent = latents_of(101)
    make_store(tmp_path, latent)
    noise, x = seeds.noise(3, range(101), (2, 4, 4)).double().numpy(), latent.double().numpy()
    events: list[tuple[str, int, int]] = []
    report = store_statistics(tmp_path, progress=lambda *event: events.append(event))
    assert report == store_statistics(tmp_path, workers=1) and events[-1] == ("stats", 101, 101)
    assert json.loads(json.dumps(report)) == report and (report["rows"], report["pairs"]) == (101, 101)
    for name, values in (("noise", noise), ("latent", x)):
        np.testing.assert_allclose(report[name]["mean"], values.mean(axis=(0, 2, 3)), atol=1e-12)
        np.testing.assert_allclose(report[name]["std"], values.std(axis=(0, 2, 3)), rtol=1e-12)
        norms = np.linalg.norm(values.reshape(101, -1), axis=1)
        assert report[f"{name}_norm"]["mean"] == pytest.approx(norms.mean())
        assert report[f"{name}_norm"]["median"] == pytest.approx(np.median(norms))
    own = [np.corrcoef(noise[:, c].ravel(), x[:, c].ravel())[0, 1] for c in range(2)]
    np.testing.assert_allclose(report["correlation"]["noise_latent"], own, atol=1e-12)
    error = report["correlation"]["standard_error"]
    assert min(own) > 10 * error and error == (101 * 16) ** -0.5
    assert max(map(abs, report["correlation"]["noise_next_latent"])) < 4 * error
    assert abs(report["noise_norm"]["sigmas"]) < 4 and sum(report["noise_norm"]["expected"]) == pytest.approx(
        101
    )
    assert report["outliers"] == {"count": 0, "rows": []}


def test_mismatched_rows_have_low_correlation(tmp_path: Path) -> None:
    """Latents shifted by one row, as by a bug in batching, lower the correlation."""
    make_store(tmp_path, latents_of(200).roll(-1, 0))
    correlation = store_statistics(tmp_path)["correlation"]
    assert max(map(abs, correlation["noise_latent"])) < 4 * correlation["standard_error"]


FAULTS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]], str]] = {
    "an untrained teacher returns its noise": (
        lambda latent, noise: (noise * 1.5, noise),
        "latents are their own noise (correlation 1.00): the teacher is not trained",
    ),
    "latents of another scale": (
        lambda latent, noise: (latent * 0.1, noise),
        "latents have standard deviation 0.112, expected about 1: is the teacher trained?",
    ),
    "noise that is not normal": (lambda latent, noise: (latent, noise * 2), "noise has mean norm 11.2"),
    "rows shifted by one": (
        lambda latent, noise: (latent.roll(1, 0), noise),
        "noise correlates with the latents of the next row (0.4",
    ),
    "outliers": (
        lambda latent, noise: (latent * (1 + 40 * (torch.arange(400) % 50 == 0)).view(-1, 1, 1, 1), noise),
        "8 of 400 rows are outliers",
    ),
}


def test_sampled_rows_are_compared_with_the_rows_after_them(tmp_path: Path) -> None:
    damage, words = FAULTS["rows shifted by one"]
    make_store(tmp_path, *damage(latents_of(400), seeds.noise(3, range(400), (2, 4, 4))))
    assert words in store_statistics(tmp_path, rows=100)["verdict"]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_verdict_names_what_is_wrong(fault: str, tmp_path: Path) -> None:
    damage, words = FAULTS[fault]
    latent, noise = damage(latents_of(400), seeds.noise(3, range(400), (2, 4, 4)))
    make_store(tmp_path, latent, noise)
    report = store_statistics(tmp_path)
    assert not report["usable"] and words in report["verdict"], report["verdict"]
    assert report["verdict"].startswith("these pairs are not usable as they are: ")


def test_the_verdict_on_good_pairs(tmp_path: Path, teacher: Path) -> None:
    make_store(tmp_path, latents_of(400))
    report = store_statistics(tmp_path)
    assert report["usable"] and report["verdict"] == (
        "these pairs are usable: latents have standard deviation 1.12, noise is standard normal, their "
        "correlation is 0.44, 3 prompts, 0 outliers"
    )
    # Two of seven prompts are longer than the teacher's tokens.
    make_store(tmp_path / "few", latents_of(7))
    report = store_statistics(tmp_path / "few", teacher=str(teacher))
    assert "29% of the prompts are longer than the 12 tokens" in report["verdict"]


def test_rows_option_samples_evenly_spaced_rows(tmp_path: Path) -> None:
    latent = latents_of(101)
    make_store(tmp_path, latent)
    statistics = store_statistics(tmp_path, rows=11)
    assert (statistics["rows"], statistics["pairs"]) == (11, 101)
    np.testing.assert_allclose(
        statistics["latent"]["mean"], latent[::10].double().mean(dim=(0, 2, 3)), rtol=1e-9
    )
    one = store_statistics(tmp_path, rows=1)
    assert one["rows"] == 1 and one["correlation"]["noise_next_latent"] is not None
    make_store(tmp_path / "single", latent[:1])
    assert store_statistics(tmp_path / "single")["correlation"]["noise_next_latent"] is None


def test_outliers_are_sorted_by_distance(tmp_path: Path) -> None:
    latent, noise = latents_of(400), seeds.noise(3, range(400), (2, 4, 4))
    latent[77] *= 40
    noise[[5, 9]] *= torch.tensor([3.0, 0.0])[:, None, None, None]
    make_store(tmp_path, latent, noise)
    outliers = store_statistics(tmp_path)["outliers"]
    assert outliers["count"] == 3 and [row["index"] for row in outliers["rows"]] == [77, 5, 9]
    assert outliers["rows"][0]["prompt"] == TEXTS[77 % 3] and outliers["rows"][0]["latent_sigmas"] > 6
    assert outliers["rows"][1]["noise_sigmas"] > 6 and outliers["rows"][2]["noise_sigmas"] < -6
    norms = store_statistics(tmp_path)["noise_norm"]
    assert sum(norms["counts"]) == 398  # two lie outside the range of the histogram


def test_prompt_statistics(tmp_path: Path, teacher: Path) -> None:
    make_store(tmp_path, latents_of(7))
    prompts = store_statistics(tmp_path)["prompts"]
    assert (prompts["distinct"], prompts["repeated_share"]) == (3, 1.0) and prompts["tokens"] is None
    assert prompts["tokens_missing"].startswith("teacher nowhere: no such folder")
    lengths = [len(TEXTS[i % 3]) for i in range(7)]
    assert (
        prompts["characters"]["mean"] == pytest.approx(np.mean(lengths))
        and prompts["characters"]["max"] == 29
    )
    prompts = store_statistics(tmp_path, teacher=str(teacher))["prompts"]["tokens"]
    assert prompts["limit"] == 12 and prompts["cut_share"] == 2 / 7 and prompts["max"] > 12
    four = store_statistics(tmp_path, rows=4)["prompts"]  # rows 0, 2, 4, 6: prompts 0, 2, 1, 0
    assert (four["distinct"], four["repeated_share"]) == (3, 0.5)
    with pytest.raises(UserError, match="no such folder"):
        store_statistics(tmp_path, teacher="elsewhere")


@pytest.mark.parametrize("kind", ["label", "none"])
def test_stores_without_text(tmp_path: Path, kind: str) -> None:
    texts = label_list(3) if kind == "label" else PromptList.of([""])
    make_store(tmp_path, latents_of(7), texts=texts, kind=kind)
    assert store_statistics(tmp_path)["prompts"] == {"distinct": len(texts), "repeated_share": 1.0}


def test_an_empty_store_has_no_statistics(tmp_path: Path) -> None:
    make_store(tmp_path, latents_of(2))
    shard_path(tmp_path, 0).unlink()
    for call in (store_statistics, lambda folder: save_sheet(folder, tmp_path / "s.png")):
        with pytest.raises(UserError, match="holds no pairs yet"):
            call(tmp_path)


def test_every_key_is_documented(tmp_path: Path, teacher: Path) -> None:
    make_store(tmp_path, latents_of(7))
    text = (ROOT / "docs" / "pair-format.md").read_text()

    def keys(value: Any) -> set[str]:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        return set(value if isinstance(value, dict) else ()).union(*map(keys, parts))

    missing = {
        key for key in keys(store_statistics(tmp_path, teacher=str(teacher))) if f"`{key}`" not in text
    }
    assert not missing


# Contact sheet.


@given(st.text(max_size=300), st.integers(20, 300), st.integers(1, 4))
def test_captions_are_wrapped_and_truncated_at_the_end(text: str, width: int, lines: int) -> None:
    font = load_font(11)
    wrapped = wrap(text, font, width, lines)
    assert 1 <= len(wrapped) <= lines and all(
        font.getlength(line) <= width or len(line) <= 2 for line in wrapped
    )
    packed, wrapped_text = "".join(text.split()), "".join("".join(wrapped).split())
    assert wrapped_text == packed or (
        len(wrapped) == lines and wrapped_text.endswith("…") and packed.startswith(wrapped_text[:-1])
    )


@pytest.mark.parametrize(
    ("count", "expected"), [(1, 1), (2, 2), (12, 4), (24, 6), (47, 8), (48, 8), (49, 7), (64, 8)]
)
def test_number_of_columns(count: int, expected: int) -> None:
    assert columns(count) == expected


@pytest.mark.parametrize(("size", "cell_size"), [(16, 160), (30, 180), (200, 200), (512, 256), (1000, 256)])
def test_images_are_scaled_to_a_limited_cell_size(size: int, cell_size: int) -> None:
    image = torch.zeros(1, 1, size, size, dtype=torch.uint8)
    image[..., size // 2 :] = 200
    sheet = captioned_grid(image.expand(3, -1, -1, -1), [""] * 3, "heading")
    assert sheet.dtype == torch.uint8 and sheet.shape[2] == 3 * (cell_size + 8) + 8
    top = next(y for y in range(sheet.shape[1]) if sheet[0, y, 8] == 0)
    cell = sheet[:, top : top + cell_size, 8 : 8 + cell_size]
    assert (cell[:, :, : cell_size // 2 - 1] == 0).all() and (cell[:, :, cell_size // 2 + 1 :] == 200).all()


def test_a_sheet_shows_decoded_rows_and_their_prompts(pairs: Path, teacher: Path, tmp_path: Path) -> None:
    rows = save_sheet(pairs, tmp_path / "deep" / "sheet.png", 4)
    assert rows == [0, 4, 7, 11]
    with Image.open(tmp_path / "deep" / "sheet.png") as file:
        assert (
            json.loads(file.info["pairs"]) == rows
            and file.info["spec_sha256"] == PairReader(pairs).spec.sha256
        )
        sheet = np.asarray(file.convert("RGB")).copy()
    decoded = torch.cat(list(decode_uint8(load_vae(str(teacher)), PairReader(pairs).read(rows).latents)))
    enlarged = decoded.repeat_interleave(SMALLEST // 16, 2).repeat_interleave(SMALLEST // 16, 3)
    first = enlarged[0].permute(1, 2, 0).numpy()
    places = [y for y in range(60) if np.array_equal(sheet[y : y + SMALLEST, 8 : 8 + SMALLEST], first)]
    assert len(places) == 1
    captions = sheet[places[0] + SMALLEST : places[0] + SMALLEST + 20]
    assert (captions < 128).any() and (
        sheet[: places[0]] < 200
    ).any()  # text below the image and in the heading


def test_a_sheet_of_another_teacher_is_refused(pairs: Path, tmp_path: Path) -> None:
    other = tiny.save_teacher(tmp_path / "other", latent_channels=3)
    with pytest.raises(UserError, match=r"has LatentSpace\(channels=3.*was made in LatentSpace\(channels=4"):
        save_sheet(pairs, tmp_path / "sheet.png", teacher=other)
    with pytest.raises(UserError, match=r"cannot write .*sheet\.png"):
        save_sheet(pairs, tmp_path / "other" / "model_index.json" / "sheet.png")


def test_class_labels_are_captions(tmp_path: Path, teacher: Path) -> None:
    latent = torch.zeros(6, 4, 4, 4)
    make_store(tmp_path / "a", latent, texts=label_list(3), kind="label")
    assert save_sheet(tmp_path / "a", tmp_path / "a.png", teacher=str(teacher)) == list(range(6))


def test_stats_on_the_command_line(pairs: Path, tmp_path: Path) -> None:
    words = ["pairs", "stats", str(pairs), "--sheet", str(tmp_path / "sheet.png"), "--cells", "3"]
    ended = d2g([*words, "--json"], tmp_path / "log")
    summary = ended.json
    assert summary["rows"] == 12 and summary["prompts"]["tokens"]["limit"] == 12
    assert summary["sheet"] == str(tmp_path / "sheet.png") and Path(summary["sheet"]).is_file()
    done = d2g(["pairs", "stats", str(pairs), "--rows", "5"], tmp_path / "log")
    assert done.code == 0 and re.search(r"latent_norm\.counts +[ ▁▂▃▄▅▆▇█]*[▁▂▃▄▅▆▇█] *\n", done.stdout), (
        done.stdout
    )
    wrong = d2g(["pairs", "stats", str(pairs), "--rows", "-1"], tmp_path / "log")
    assert wrong.code == 2
