"""Pictures of a run's first held-out pairs, or of its first where it holds none out: student beneath teacher,
of the same noise at every report.
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


@torch.no_grad()
def preview_latents(
    draw: Draw, pairs: PairBatch, device: torch.device | str, batch_size: int = 8
) -> tuple[Tensor, Tensor]:
    """(the student's latents, the teacher's stored ones) of some pairs, fp32 on the CPU. On every rank, where
    weights are gathered together.
    """
    noise, told, parts = pairs.noise.float().to(device), scales(pairs), []
    for first in range(0, len(noise), batch_size):
        here = slice(first, first + batch_size)
        parts.append(draw(noise[here], pairs.prompts[here], *(t[here] for t in told)).float().cpu())
    return torch.cat(parts), pairs.latents.float().cpu()


def preview(student: Tensor, teacher: Tensor, vae: Any, batch_size: int = 8) -> Tensor:
    """Latents [K, C, h, w] each -> one picture uint8 [3, H, W]: rows of up to 8 teacher's images, the
    student's of the same noise beneath. The teacher is not run: its latents are the stored ones.
    """
    pictures = [torch.cat(list(decode_uint8(vae, x, batch_size))) for x in (teacher, student)]
    strips = [x[first : first + COLUMNS] for first in range(0, len(student), COLUMNS) for x in pictures]
    columns = min(COLUMNS, len(student))
    return image_grid(torch.cat([_padded(strip, columns) for strip in strips]), columns)


def preview_text(prompts: Sequence[str], nimg: int) -> dict[str, str]:
    """What a preview's file says of itself."""
    return {
        "nimg": str(nimg),
        "prompts": json.dumps(list(prompts), ensure_ascii=False),
        "rows": "teacher, student",
    }


def _padded(strip: Tensor, columns: int) -> Tensor:
    blank = torch.full((columns - len(strip), *strip.shape[1:]), 255, dtype=torch.uint8)
    return torch.cat([strip, blank])
