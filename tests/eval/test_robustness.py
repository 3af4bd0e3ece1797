"""eval.measure.robustness: changes of images that hardly show, and what a Frechet distance makes of them."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from d2g.core.errors import UserError
from d2g.core.png import save_png
from eval.images.folders import open_images
from eval.images.resize import to_array, to_pil
from eval.measure.robustness import CHANGES, robustness
from eval.networks.base import FeatureNet


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth pictures with some noise, 24 px."""
    folder, g = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    for number in range(24):
        coarse = torch.rand(1, 3, 3, 3, generator=g)
        smooth = torch.nn.functional.interpolate(coarse, size=(24, 24), mode="bicubic")[0].clamp(0, 1)
        noisy = smooth * 200 + torch.rand(3, 24, 24, generator=g) * 30
        save_png(noisy.to(torch.uint8), folder / f"{number:03d}.png", {})
    return folder


def mean_and_edges(images: torch.Tensor) -> torch.Tensor:
    """Mean colors, and the mean size of steps between neighbors."""
    x = images.float()
    return torch.cat([x.mean((2, 3)), x.diff(dim=3).abs().mean((1, 2, 3))[:, None]], 1)


NET = FeatureNet(name="edges", sha256="", dim=4, function=mean_and_edges)


def test_each_change_is_what_it_says() -> None:
    image = to_pil(
        torch.randint(20, 200, (3, 16, 16), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    )
    before = torch.from_numpy(to_array(image)).float()
    after = {name: torch.from_numpy(to_array(change(image))).float() for name, change in CHANGES.items()}
    assert all(value.shape == before.shape for value in after.values())
    error = {name: float((value - before).abs().mean()) for name, value in after.items()}
    assert error["JPEG, quality 50"] > error["JPEG, quality 70"] > error["JPEG, quality 95"] > 0
    assert torch.allclose(after["brightness +10 %"], before * 1.1, atol=1)
    assert torch.allclose(after["brightness -10 %"], before * 0.9, atol=1)
    assert after["contrast +10 %"].std() > before.std() > after["contrast -10 %"].std()
    nearest = after["half the size and back, nearest"]
    assert torch.equal(nearest[:, ::2, ::2], nearest[:, 1::2, 1::2])
    flat = after["palette of 256 colors"].flatten(1).T
    assert len(flat.unique(dim=0)) <= 256


def test_distances_grow_with_the_change(pictures: Path) -> None:
    facts = robustness(open_images(pictures), NET, "native", batch_size=5)
    distances = facts["distances"]
    assert list(distances) == list(CHANGES) and facts["images"] == 24
    assert distances["JPEG, quality 50"] > distances["JPEG, quality 95"]
    assert distances["half the size and back, bilinear"] > distances["brightness +10 %"] * 0.01
    assert facts["halves"] > 0
    # An unchanged set is at no distance.
    fewer = robustness(open_images(pictures), NET, "crop8-box", count=6)
    assert fewer["images"] == 6 and fewer["preprocessing"] == "crop8-box"


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="has 1 images; robustness needs at least 4"):
        robustness(open_images(tmp_path), NET, "native")
