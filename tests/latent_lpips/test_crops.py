"""Crops against torchvision's transforms, as used in the ImageNet recipe."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, RandomResizedCrop, Resize

from labeled import picture
from latent_lpips.training.crops import (
    center_crop_resized,
    image_to_tensor,
    random_box,
    random_crop,
    tensor_to_image,
)


@given(st.integers(20, 300), st.integers(20, 300), st.integers(0, 10_000), st.floats(0.05, 1.0))
def test_boxes_lie_inside_and_keep_area_and_aspect(
    width: int, height: int, seed: int, min_area: float
) -> None:
    left, top, right, bottom = random_box(width, height, (min_area, 1.0), torch.Generator().manual_seed(seed))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    w, h = right - left, bottom - top
    assert 3 / 4 * (h - 1) <= w + 1 and w - 1 <= 4 / 3 * (h + 1)


def test_boxes_have_the_distribution_of_torchvision() -> None:
    rng = torch.Generator().manual_seed(0)
    ours = torch.tensor([random_box(200, 150, (0.08, 1.0), rng) for _ in range(3000)]).double()
    torch.manual_seed(1)
    image = torch.empty(3, 150, 200)
    boxes_of_theirs = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    theirs = torch.tensor([(j, i, j + w, i + h) for i, j, h, w in boxes_of_theirs]).double()
    for a, b in zip(ours.unbind(1), theirs.unbind(1), strict=True):
        grid = torch.cat([a, b]).sort().values
        steps = [torch.searchsorted(x.sort().values.contiguous(), grid, right=True) / 3000 for x in (a, b)]
        assert (steps[0] - steps[1]).abs().max() < 1.63 * (2 / 3000) ** 0.5  # Kolmogorov-Smirnov, 1 %


def test_elongated_images_fall_back_to_the_center() -> None:
    box = random_box(1000, 10, (0.9, 1.0), torch.Generator().manual_seed(0))
    assert box == (493, 0, 506, 10)


@pytest.mark.parametrize("size", [(40, 36), (33, 51), (32, 32)])
def test_center_crops_equal_torchvision(size: tuple[int, int]) -> None:
    image = picture(1, 0, *size)
    theirs = CenterCrop(28)(Resize(32, interpolation=InterpolationMode.BILINEAR)(image))
    assert torch.equal(center_crop_resized(image, 28), image_to_tensor(theirs))


def test_half_of_the_crops_are_flipped_if_requested() -> None:
    ramp = Image.linear_gradient("L").rotate(90).convert("RGB")
    falling = []
    for seed in range(200):
        crop = random_crop(ramp, 16, (0.5, 1.0), True, torch.Generator().manual_seed(seed)).float()
        plain = random_crop(ramp, 16, (0.5, 1.0), False, torch.Generator().manual_seed(seed)).float()
        mirrored = bool((crop[0, 0, 0] - crop[0, 0, -1]) * (plain[0, 0, 0] - plain[0, 0, -1]) < 0)
        assert torch.equal(crop.flip(2) if mirrored else crop, plain)
        falling.append(mirrored)
    assert 70 < sum(falling) < 130
    assert tensor_to_image(plain.byte()).size == (16, 16)
