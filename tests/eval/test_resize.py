"""eval.images.resize: tensors are resized bit for bit as by PIL; the resizes of clean-fid and TensorFlow."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from d2g.core.seeds import generator
from eval.images.resize import (
    FILTERS,
    PREPROCESSING,
    filter_matrix,
    prepare,
    prepare_batch,
    resize_clean,
    resize_tensorflow,
    resize_uint8,
    to_pil,
    to_tensor,
)

SIDES = st.integers(1, 90)


def noise(height: int, width: int, seed: int, extreme: bool = False) -> Tensor:
    """Random uint8 [3, H, W]. `extreme`: only 0 and 255, where filters overshoot most."""
    image = torch.randint(0, 256, (3, height, width), generator=generator(seed, height, width))
    return ((image > 127) * 255 if extreme else image).to(torch.uint8)


def by_pil(image: Tensor, height: int, width: int, name: str) -> Tensor:
    """PIL's resize, horizontally first."""
    across = to_pil(image).resize((width, image.shape[1]), FILTERS[name])
    return to_tensor(across.resize((width, height), FILTERS[name]))


@given(SIDES, SIDES, SIDES, SIDES, st.booleans(), st.sampled_from(sorted(FILTERS)))
def test_tensors_are_resized_bit_for_bit_as_by_pil(
    height: int, width: int, new_height: int, new_width: int, extreme: bool, name: str
) -> None:
    image = noise(height, width, 1, extreme)
    ours = resize_uint8(image, (new_height, new_width), name)
    assert torch.equal(ours, by_pil(image, new_height, new_width, name))


@pytest.mark.parametrize(("old", "new"), [(480, 256), (512, 256), (1024, 512), (32, 299), (256, 256)])
@pytest.mark.parametrize("name", ["lanczos", "bicubic"])
def test_protocol_sizes_equal_one_call_of_pil(old: int, new: int, name: str) -> None:
    """For a square image, two passes equal the single call of PIL that others use."""
    image = noise(old, old, 2, extreme=True)
    by_pil_once = to_tensor(to_pil(image).resize((new, new), FILTERS[name]))
    assert torch.equal(resize_uint8(image, (new, new), name), by_pil_once)
    assert torch.equal(to_tensor(prepare(to_pil(image), f"crop{new}-{name}")), by_pil_once)


@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from(sorted(FILTERS)))
def test_the_weights_of_a_filter_sum_to_one_and_are_symmetric(old: int, new: int, name: str) -> None:
    matrix = filter_matrix(old, new, name)
    torch.testing.assert_close(matrix.sum(1), torch.ones(new, dtype=torch.float64))
    if name != "box":  # the half-open window of the box filter is not symmetric
        torch.testing.assert_close(matrix, matrix.flip(0, 1))


def test_uniform_images_stay_uniform() -> None:
    for level in (0, 1, 254, 255):
        flat = torch.full((3, 20, 30), level, dtype=torch.uint8)
        for name in FILTERS:
            assert resize_uint8(flat, (7, 61), name).unique().tolist() == [level]


def test_the_long_edge_is_cropped_to_its_center() -> None:
    wide = noise(6, 10, 3)[None]
    assert torch.equal(prepare_batch(wide, "crop6-bicubic"), wide[..., 2:8])
    assert torch.equal(prepare_batch(wide.mT, "crop6-bicubic"), wide.mT[:, :, 2:8])
    assert torch.equal(prepare_batch(wide, "native"), wide)
    assert torch.equal(prepare_batch(wide, "crop3-lanczos"), prepare_batch(wide[..., 2:8], "crop3-lanczos"))
    assert not torch.equal(prepare_batch(wide, "crop3-lanczos"), prepare_batch(wide, "squash3-lanczos"))
    odd = noise(5, 8, 4)  # torchvision's center_crop rounds half to even
    assert torch.equal(prepare_batch(odd[None], "crop5-box")[0], odd[:, :, 2:7])


def test_the_tensor_path_of_prepare_equals_its_pil_path() -> None:
    """`prepare_batch` uses tensor arithmetic on other devices; here it runs on the CPU with the same crop."""
    image = noise(50, 73, 5)
    for how in ("crop17-lanczos", "crop64-bicubic", "squash20-bicubic"):
        match = PREPROCESSING.fullmatch(how)
        assert match is not None
        side, cropped = int(match["size"]), image
        if match["crop"] == "crop":
            cropped = image[:, :, 12:62]
        ours = resize_uint8(cropped, (side, side), match["filter"])
        assert torch.equal(ours, to_tensor(prepare(to_pil(image), how)))
        assert torch.equal(ours, prepare_batch(image[None], how)[0])


def clean_fid(image: Tensor, size: int) -> Tensor:
    from cleanfid.resize import make_resizer

    resized = make_resizer("PIL", False, "bicubic", (size, size))(image.permute(1, 2, 0).numpy())
    return torch.from_numpy(resized).permute(2, 0, 1)


@pytest.mark.parametrize("side", [32, 256, 400])
def test_the_clean_resize_equals_clean_fid(side: int) -> None:
    images = torch.stack([noise(side, side, seed, extreme=seed == 1) for seed in range(2)])
    ours = resize_clean(images)
    assert torch.equal(ours, torch.stack([clean_fid(image, 299) for image in images]))
    assert ours.min() == 0 and ours.max() == 255, "overshoots are clipped, as clean-fid does"


def test_the_clean_resize_on_another_device_is_the_same_arithmetic() -> None:
    """The arithmetic of the GPU path on the CPU: float64 weights, float32 after each direction."""
    image = noise(40, 40, 6, extreme=True)
    matrix = filter_matrix(40, 299, "bicubic")
    across = (image.double() @ matrix.T).float()
    both = (matrix @ across.double()).float().clamp(0, 255)
    torch.testing.assert_close(both, resize_clean(image[None])[0], rtol=0, atol=2e-4)


def test_the_tensorflow_resize_samples_at_multiples_of_the_scale() -> None:
    ramp = torch.arange(8, dtype=torch.uint8).mul(20).expand(1, 3, 8, 8)
    got = resize_tensorflow(ramp, 20)[0, 0, 0]
    expected = (torch.arange(20) * 8 / 20).clamp(max=7) * 20
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


def test_antialiasing_keeps_a_checkerboard_grey() -> None:
    """Bilinear resizing without antialiasing would make stripes (clean-fid, Figure 1)."""
    board = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).mul(255).to(torch.uint8)
    small = resize_uint8(board.expand(3, 64, 64), (16, 16), "bicubic").float()
    assert np.abs(small.numpy() - 127.5).max() < 16
    assert Image.fromarray(board.numpy()).getextrema() == (0, 255)
