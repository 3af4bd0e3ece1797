"""Preview images of a run: the student's images below the teacher's, from the same noise at every report.

They show the first held-out pairs, or the first training pairs if none are held out.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2g.core.png import image_grid
from d2g.diffusion.latents import decode_uint8
from distill.training.validation import Draw
from pairgen.store.concat import scales
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
    noise, guidance, batches = pairs.noise.float().to(device), scales(pairs), []
    for first in range(0, len(noise), batch_size):
        part = slice(first, first + batch_size)
        batches.append(
            draw(noise[part], pairs.prompts[part], *(scale[part] for scale in guidance)).float().cpu()
        )
    return torch.cat(batches), pairs.latents.float().cpu()


def preview(student: Tensor, teacher: Tensor, vae: Any, batch_size: int = 8) -> Tensor:
    """Decode the latents [K, C, h, w] of student and teacher into one image grid, uint8 [3, H, W].

    Each row of up to `COLUMNS` teacher images is followed by the student's row for the same noise.
    """
    images = [torch.cat(list(decode_uint8(vae, latents, batch_size))) for latents in (teacher, student)]
    # Alternate rows of teacher and student, and fill the last rows with white images.
    rows = [x[first : first + COLUMNS] for first in range(0, len(student), COLUMNS) for x in images]
    columns = min(COLUMNS, len(student))
    return image_grid(torch.cat([_pad_row(row, columns) for row in rows]), columns)


def preview_text(prompts: Sequence[str], nimg: int) -> dict[str, str]:
    """Return the PNG text metadata of a preview."""
    return {
        "nimg": str(nimg),
        "prompts": json.dumps(list(prompts), ensure_ascii=False),
        "rows": "teacher, student",
    }


def _pad_row(images: Tensor, columns: int) -> Tensor:
    white = torch.full((columns - len(images), *images.shape[1:]), 255, dtype=torch.uint8)
    return torch.cat([images, white])
