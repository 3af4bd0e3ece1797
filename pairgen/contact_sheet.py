"""A contact sheet: decoded rows of a store in one image, with their prompts."""

from pathlib import Path

import torch

from d2g.core.captioned_grid import captioned_grid
from d2g.core.distributed import process_group
from d2g.core.errors import UserError
from d2g.core.png import save_png
from d2g.core.progress import Progress, quiet
from d2g.diffusion.latents import decode_uint8, latent_space
from d2g.diffusion.pretrained import load_vae
from pairgen.statistics import evenly_spread
from pairgen.store.reader import PairReader
from pairgen.store.spec import StoreSpec


def save_sheet(
    folder: Path, path: Path, count: int = 48, teacher: str | None = None, progress: Progress = quiet
) -> list[int]:
    """Decode `count` evenly spread rows of a store into one PNG at `path`; returns their pair indices.

    teacher: folder or hub id with the VAE, if it is not the name in the store.
    Raises UserError for an empty store, a teacher of another latent space, damage, and an unwritable `path`.
    """
    reader = PairReader(folder)
    if not len(reader):
        raise UserError(f"{folder} holds no pairs yet; generate some with `d2g pairs generate`")
    # The autoencoder of another latent space would decode these latents to garbage.
    spec = reader.spec
    vae = load_vae(teacher or spec.teacher).to(process_group.init())
    if (space := latent_space(vae)) != spec.latent_space:
        raise UserError(
            f"teacher {teacher or spec.teacher} has {space}, {folder} was made in {spec.latent_space}"
        )
    # Decode in small batches, because the autoencoder needs the most memory here.
    rows = reader.read(evenly_spread(len(reader), count))
    images = []
    for batch in decode_uint8(vae, rows.latents, batch_size=8):
        images.append(batch)
        progress("decode", sum(map(len, images)), len(rows.index))
    # Lay out the sheet; its metadata says which rows of which spec it shows.
    captions = [caption(spec, *row) for row in zip(rows.index.tolist(), rows.prompts, strict=True)]
    sheet = captioned_grid(torch.cat(images), captions, title(folder, spec, len(captions), len(reader)))
    save_png(sheet, Path(path), {"pairs": str(rows.index.tolist()), "spec_sha256": spec.sha256})
    return rows.index.tolist()


def caption(spec: StoreSpec, number: int, prompt: str) -> str:
    """The caption below an image."""
    text = {"text": f": {prompt}", "label": f": class {prompt}", "none": ""}[spec.conditioning]
    return f"{number}{text}"


def title(folder: Path, spec: StoreSpec, rows: int, pairs: int) -> str:
    """The line above the images."""
    settings = f"{spec.solver}, {spec.steps} steps, guidance {spec.guidance:g}, seed {spec.seed}"
    return f"{Path(folder).absolute().name}: {rows} of {pairs} pairs of {Path(spec.teacher).name}, {settings}"
