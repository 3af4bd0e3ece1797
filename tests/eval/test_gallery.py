"""eval.report.gallery: images with the best and worst scores, nearest neighbors, thumbnails."""

import base64
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from d2g.core.errors import UserError
from d2g.core.seeds import generator
from eval.metrics.nearest import Nearest
from eval.report.gallery import Pictures, beside_nearest, rank_images, thumbnail


def random_images(count: int, side: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=generator(seed), dtype=torch.uint8)


def decode_url(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1])))


class LazyImages:
    """A sequence of images that records which rows are read."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.rows_read = images, set[int]()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Tensor:
        self.rows_read.add(row)
        return self.images[row]


def test_worst_and_best_images_by_score() -> None:
    images, prompts = LazyImages(random_images(6, 4)), [f"p{i}" for i in range(6)]
    values = [0.3, 0.9, 0.1, 0.5, 0.9, 0.2]
    ranking = rank_images("CLIP score", values, {"student": images}, prompts, better="higher", count=2)  # type: ignore[dict-item]
    assert list(ranking.worst.prompts) == ["p2", "p5"] and list(ranking.best.prompts) == ["p1", "p4"]
    assert ranking.worst.title == "Worst by CLIP score"
    assert ranking.worst.notes[0] == "CLIP score 0.1, image 2"
    assert torch.equal(ranking.best.columns["student"][1], images.images[4])
    assert images.rows_read == {2, 5, 1, 4}  # no other image is loaded
    reversed_ranking = rank_images(
        "distance", values, {"student": images.images}, prompts, better="lower", count=2
    )
    assert list(reversed_ranking.worst.prompts) == ["p1", "p4"] and list(reversed_ranking.best.prompts) == [
        "p2",
        "p5",
    ]


def test_worst_and_best_do_not_overlap_and_invalid_scores_are_refused() -> None:
    ranking = rank_images("s", [3.0, 1.0, 2.0], {"a": random_images(3, 4)}, (), better="lower", count=8)
    assert len(ranking.worst) == len(ranking.best) == 1 and not ranking.best.prompts
    for values in ([1.0], [1.0, math.nan]):
        with pytest.raises(UserError, match="two or more finite values"):
            rank_images("s", values, {"a": random_images(len(values), 4)}, (), better="lower")


def test_the_block_of_nearest_neighbors() -> None:
    generated, training = random_images(2, 4), random_images(9, 8, seed=1)
    nearest = Nearest(
        distances=torch.tensor([[0.5, 1.25], [2.0, 3.0]]), indices=torch.tensor([[4, 7], [0, 8]])
    )
    block = beside_nearest(nearest, generated, training, ["a", "b"], features="oracle")
    assert list(block.columns) == ["generated", "nearest", "nearest 2"]
    assert torch.equal(block.columns["nearest"][1], training[0])
    assert torch.equal(block.columns["nearest 2"][0], training[7])
    assert list(block.captions["nearest 2"]) == ["1.25, image 7", "3, image 8"]
    assert "oracle" in block.text and "generated" not in block.captions


def test_columns_and_texts_of_a_block_must_have_equal_lengths() -> None:
    for wrong in (
        {"prompts": ["one"]},
        {"notes": ["one"]},
        {"captions": {"a": ["one"]}},
        {"captions": {"b": ["one", "two"]}},
        {"columns": {"a": random_images(2, 4), "b": random_images(3, 4)}},
        {"columns": {}},
    ):
        settings = {"title": "t", "columns": {"a": random_images(2, 4)}} | wrong
        with pytest.raises(AssertionError, match="t: "):
            Pictures(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("side", "expected"), [(28, 112), (32, 128), (64, 128), (100, 100), (128, 128)])
def test_small_images_are_stored_exactly_and_scaled_by_an_integer(side: int, expected: int) -> None:
    (image,) = random_images(1, side)
    small = thumbnail(image, 256)
    assert small.url.startswith("data:image/png;base64,") and small.pixelated
    assert (small.width, small.height) == (expected, expected) and expected % side == 0
    pixels = torch.from_numpy(np.array(decode_url(small.url))).permute(2, 0, 1)
    assert torch.equal(pixels, image)


def test_large_images_are_downscaled_with_their_aspect_ratio() -> None:
    ramp = torch.linspace(0, 255, 600).to(torch.uint8).expand(3, 300, 600)
    large = thumbnail(ramp, 256)
    assert large.url.startswith("data:image/webp;base64,") and not large.pixelated
    assert (large.width, large.height) == decode_url(large.url).size == (256, 128)
    difference = np.asarray(decode_url(large.url).convert("L"), float)[0] - np.linspace(0, 255, 256)
    assert np.abs(difference).max() < 6 and len(large.url) < 5_000
    checks = (
        (255 * ((torch.arange(512) + torch.arange(512)[:, None]) % 2)).to(torch.uint8).expand(3, 512, 512)
    )
    grey = np.asarray(decode_url(thumbnail(checks, 256).url), float)[8:-8, 8:-8]
    assert np.abs(grey - 127.5).max() < 4  # pixels are averaged, not subsampled


def test_thumbnails_need_uint8_rgb() -> None:
    for wrong in (torch.zeros(3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)):
        with pytest.raises(AssertionError):
            thumbnail(wrong, 256)
