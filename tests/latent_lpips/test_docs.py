"""The code blocks of docs/latent-lpips.md run."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import vgg16

import tiny
from d2g.diffusion import pretrained
from d2g.diffusion.latents import decode
from latent_lpips.official_checkpoints import OFFICIAL_SPACES

PAGE = (Path(__file__).parents[2] / "docs" / "latent-lpips.md").read_text()


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(4, 4, 1)

    def forward(self, noise: Tensor, text: object) -> Tensor:
        latents: Tensor = self.layer(noise)
        return latents


def test_code_blocks_run(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks run in order in one namespace. The first one trains in five lines including imports."""
    monkeypatch.chdir(tmp_path)
    tiny.save_lpips(tmp_path / "lpips-sd15")
    with torch.device("meta"):
        shapes = vgg16().state_dict()
    torch.save(
        {k: 0.05 * torch.randn(v.shape) for k, v in shapes.items() if "features" in k}, "vgg16-397923af.pth"
    )
    student, rng = Student(), torch.Generator().manual_seed(1)
    world: dict[str, Any] = {
        "device": "cpu",
        "student": student,
        "batches": [(torch.randn(2, 4, 8, 8, generator=rng), None, torch.randn(2, 4, 8, 8, generator=rng))],
        "decoder": partial(decode, pretrained.load_vae(str(teacher))),
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len([line for line in blocks[0].splitlines() if line]) == 5
    for block in blocks:
        exec(compile(block, "docs/latent-lpips.md", "exec"), world)
    assert student.layer.weight.grad is not None and student.layer.weight.grad.abs().max() > 0
    assert world["loss"].item() > 0 and world["other"].draws == 4


def test_the_documented_table_of_spaces_matches_the_code() -> None:
    for name, space in OFFICIAL_SPACES.items():
        (row,) = [line for line in PAGE.splitlines() if line.startswith("|") and f"`{name}`" in line]
        assert [float(cell) for cell in row.strip("| ").split("|")[1:]] == [
            space.scale,
            space.shift,
            space.channels,
        ]
