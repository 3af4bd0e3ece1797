"""d2g.core.png: PNGs that carry their prompt, and grids."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from d2g.core.errors import UserError
from d2g.core.png import image_grid, save_png
from d2g.core.seeds import generator


def random_image(size: int = 5) -> torch.Tensor:
    return torch.randint(0, 256, (3, size, size + 2), dtype=torch.uint8, generator=generator(0))


def test_png_keeps_pixels_and_text(tmp_path: Path) -> None:
    text = {"prompt": 'ein großer roter Würfel 🟥, "left" of\na cone', "seed": "3"}
    path = tmp_path / "new" / "0.png"
    save_png(random_image(), path, text)
    with Image.open(path) as image:
        assert image.size == (7, 5) and image.mode == "RGB"
        assert dict(image.text) == text  # type: ignore[attr-defined]
        got = torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(5, 7, 3)
    assert torch.equal(got.permute(2, 0, 1), random_image())


def test_equal_images_have_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_png(random_image(), tmp_path / name, {"prompt": "x"})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_names_of_other_endings(tmp_path: Path) -> None:
    """Those of other formats give these, any other ending gives PNG."""
    kinds = {"a": "PNG", "a.xyz": "PNG", "a.JPG": "JPEG", "a.webp": "WEBP"}
    for name, kind in kinds.items():
        save_png(random_image(), tmp_path / name, {"prompt": "x"})
        with Image.open(tmp_path / name) as image:
            assert image.format == kind


def test_unwritable_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot write .*0\.png: .*--out"):
        save_png(random_image(), tmp_path / "file" / "0.png", {})


def test_grid_layout_with_white_gaps() -> None:
    images = torch.arange(1, 6, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 2, 4)
    result = image_grid(images, columns=3, gap=1)
    assert result.shape == (3, 2 * (2 + 1), 3 * (4 + 1)) and result.dtype == torch.uint8
    one, two, three, four, five, white = 1, 2, 3, 4, 5, 255
    top = [one] * 4 + [white] + [two] * 4 + [white] + [three] * 4 + [white]
    bottom = [four] * 4 + [white] + [five] * 4 + [white] + [white] * 5
    for channel in result.tolist():
        assert channel == [top, top, [white] * 15, bottom, bottom, [white] * 15]


@pytest.mark.parametrize("count, shape", [(1, (1, 1)), (4, (2, 2)), (5, (2, 3)), (9, (3, 3))])
def test_grid_is_about_square_by_default(count: int, shape: tuple[int, int]) -> None:
    result = image_grid(torch.zeros(count, 3, 8, 8, dtype=torch.uint8))
    assert result.shape[1:] == (shape[0] * 10, shape[1] * 10)
