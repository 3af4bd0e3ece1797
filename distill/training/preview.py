"""Preview images of a run: the student's images below the teacher's, from the same noise at every report.

They show the first held-out pairs, or the first training pairs if none are held out. In a run without pairs,
real images take the place of the teacher's: they have the student's captions, but not its noise.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2g.core.png import image_grid
from d2g.diffusion.latents import decode_uint8
from distill.training.validation import Draw
from pairgen.store.concat import guidance_scales
from pairgen.store.hdf5 import PairBatch

COLUMNS = 8
"""Largest number of images in a row of the preview."""


@torch.no_grad()
def preview_latents(
    draw: Draw, pairs: PairBatch, device: torch.device | str, batch_size: int = 8
) -> tuple[Tensor, Tensor]:
    """Return (the student's latents, the teacher's stored latents) of `pairs`: [K, C, h, w], fp32, CPU.

    Call it on every rank, because the ranks gather sharded weights together.
    """
    noise, guidance, batches = pairs.noise.float().to(device), guidance_scales(pairs), []
    for first in range(0, len(noise), batch_size):
        part = slice(first, first + batch_size)
        prior = None if pairs.condition is None else pairs.condition[part]
        latents = draw(noise[part], pairs.prompts[part], *(scale[part] for scale in guidance), prior=prior)
        batches.append(latents.float().cpu())
    return torch.cat(batches), pairs.latents.float().cpu()


def decode_images(vae: Any, latents: Tensor, batch_size: int = 8) -> Tensor:
    """Decode latents [K, C, h, w] into images, uint8 [K, 3, H, W] on the CPU."""
    return torch.cat(list(decode_uint8(vae, latents, batch_size)))


def preview_statistics(student: Tensor, teacher: Tensor, cell: int) -> dict[str, float]:
    """Compare images uint8 [K, 3, H, W] of student and teacher from one noise; `cell`: pixels per latent.

    `preview/contrast`: ratio of the standard deviations of pixels. `preview/color`: largest distance between
    the means of a color channel, in [0, 1]. `preview/grid`: ratio of the steps at the borders of cells to the
    steps elsewhere, divided by the teacher's; left out for teachers of pixels.
    """
    values = [images.double() / 255 for images in (student, teacher)]
    mean, mean_teacher = (x.mean((0, 2, 3)) for x in values)
    std, std_teacher = (x.std() for x in values)
    report = {
        "preview/contrast": float(std / std_teacher.clamp(min=1e-6)),
        "preview/color": float((mean - mean_teacher).abs().max()),
    }
    if cell > 1:
        grid, grid_teacher = (_grid(x, cell) for x in values)
        report["preview/grid"] = grid / max(grid_teacher, 1e-6)
    return report


def _grid(images: Tensor, cell: int) -> float:
    """Mean step between neighboring pixels across the borders of cells, over the mean step elsewhere."""
    at_borders, elsewhere = [], []
    for axis in (-1, -2):
        steps = images.diff(dim=axis).abs().transpose(axis, -1)
        is_border = (torch.arange(steps.shape[-1]) + 1) % cell == 0
        at_borders.append(steps[..., is_border].mean())
        elsewhere.append(steps[..., ~is_border].mean())
    return float(sum(at_borders) / max(float(sum(elsewhere)), 1e-6))


def preview(student: Tensor, teacher: Tensor) -> Tensor:
    """One grid, uint8 [3, H, W], of images of student and teacher, uint8 [K, 3, H, W].

    Each row of up to `COLUMNS` teacher images is followed by the student's row for the same noise.
    """
    images = [teacher, student]
    # Alternate rows of teacher and student, and fill the last rows with white images.
    rows = [x[first : first + COLUMNS] for first in range(0, len(student), COLUMNS) for x in images]
    columns = min(COLUMNS, len(student))
    return image_grid(torch.cat([_pad_row(row, columns) for row in rows]), columns)


def preview_text(prompts: Sequence[str], nimg: int, above: str = "teacher") -> dict[str, str]:
    """Return the PNG text metadata of a preview. above: whose images are above the student's."""
    return {
        "nimg": str(nimg),
        "prompts": json.dumps(list(prompts), ensure_ascii=False),
        "rows": f"{above}, student",
    }


def _pad_row(images: Tensor, columns: int) -> Tensor:
    white = torch.full((columns - len(images), *images.shape[1:]), 255, dtype=torch.uint8)
    return torch.cat([images, white])
