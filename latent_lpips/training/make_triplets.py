"""`d2g lpips triplets`: judgments whose truth is known, written in BAPPS' layout."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from d2g.core.config import to_json
from d2g.core.errors import UserError
from d2g.core.progress import Progress, quiet
from d2g.core.seeds import Stream, generator
from d2g.core.tracking.run_directory import RunLog
from d2g.diffusion import pretrained
from d2g.diffusion.latents import decode, encode, from_uint8, to_uint8
from latent_lpips.training.bapps import write_triplet
from latent_lpips.training.config import TripletsConfig, require_given
from latent_lpips.training.crops import center_crop_resized, image_to_tensor, tensor_to_image
from latent_lpips.training.labeled_images import LabeledImages, open_unlabeled
from latent_lpips.training.latent_stream import check_image_size, require_single_process
from latent_lpips.training.synthetic_triplets import DISTORTIONS

BEST_JPEG, WORST_JPEG = 92, 4
"""JPEG qualities of the weakest and the strongest."""
MAX_ATTEMPTS = 4
"""To draw two versions that differ."""
DistortFn = Callable[[Tensor, float, torch.Generator], Tensor]
"""Pixels [1, 3, H, W] in [-1, 1], a strength in (0, 1], draws -> pixels."""


@dataclass(frozen=True, kw_only=True)
class TripletsResult:
    """How many triplets lie in OUT/train and OUT/val, per kind. left_out: those whose two versions came out
    equal, say of a flat patch."""

    out: str
    train: dict[str, int]
    val: dict[str, int]
    left_out: int


def make_triplets(config: TripletsConfig, out: Path, progress: Progress = quiet) -> TripletsResult:
    """Write, for each patch and each kind, ref and two versions of one distortion at two strengths.

    The stronger one is taken to be farther from ref, so the judgment is 0 or 1. Names are PICTURE.PATCH.
    Triplet i is a function of (seed, i): run again, it goes on. Raises UserError for bad input.
    """
    require_single_process("triplets")
    require_given(config, "data")
    pictures = open_unlabeled(config.data)
    vaes = [pretrained.load_autoencoder(name) for name in config.decoders]
    for vae in vaes:
        check_image_size(vae, config.size)
    hashes = [pretrained.autoencoder_sha256(name) for name in config.decoders]
    RunLog(out, {**to_json(config), "autoencoders": hashes, "pictures": pictures.digest()})
    distort = distortion_functions(vaes)
    counts: dict[str, dict[str, int]] = {part: dict.fromkeys(config.made, 0) for part in ("train", "val")}
    held = _held(config, len(pictures))
    total, left_out = len(pictures) * config.patches, 0
    for i in range(total):
        row = i // config.patches
        part = "val" if row in held else "train"
        ref: Tensor | None = None
        stem = f"{row:06d}.{i % config.patches}"
        for number, kind in enumerate(config.made):
            component_dir = out / part / kind
            if (component_dir / "judge" / f"{stem}.npy").is_file():  # written last
                counts[part][kind] += 1
                continue
            ref = cut_patch(pictures, row, i, config) if ref is None else ref
            rng = generator(config.seed, Stream.TRIPLET_DISTORTION, i, number)
            if (made := make_triplet(ref, distort[kind], config.ratio, rng)) is None:
                left_out += 1
                continue
            versions, judge = made
            pictured = {"ref": ref, **versions}
            write_triplet(
                component_dir, stem, {name: tensor_to_image(x) for name, x in pictured.items()}, judge
            )
            counts[part][kind] += 1
        progress("triplets", i + 1, total)
    return TripletsResult(out=str(out), train=counts["train"], val=counts["val"], left_out=left_out)


def make_triplet(
    ref: Tensor, distort: DistortFn, ratio: float, rng: torch.Generator
) -> tuple[dict[str, Tensor], float] | None:
    """p0 and p1, uint8 like `ref` [3, H, W], and the judgment: 1 where p1 is the weaker. Drawn anew while
    the two are equal, which nobody can judge; None where they stay so."""
    attempts = (_triplet(ref, distort, ratio, rng) for _ in range(MAX_ATTEMPTS))
    return next((made for made in attempts if not torch.equal(made[0]["p0"], made[0]["p1"])), None)


def _triplet(
    ref: Tensor, distort: DistortFn, ratio: float, rng: torch.Generator
) -> tuple[dict[str, Tensor], float]:
    weak = 0.05 + (1 / ratio - 0.05) * float(torch.rand((), generator=rng))
    strong = weak * (ratio + (1 / weak - ratio) * float(torch.rand((), generator=rng)))
    swap = bool(torch.rand((), generator=rng) < 0.5)
    pixels = from_uint8(ref[None])
    # The same draws for both: the same noise, the same bend, so that only the strength differs.
    state = rng.get_state()
    made = []
    for strength in (weak, strong):
        rng.set_state(state)
        made.append(to_uint8(distort(pixels, strength, rng))[0])
    p0, p1 = made if swap else reversed(made)
    return {"p0": p0, "p1": p1}, 0.0 if swap else 1.0


def distortion_functions(vaes: list[Any]) -> Mapping[str, DistortFn]:
    """By kind; `decoder` reconstructs through one of `vaes`."""
    tensors = {kind.__name__.strip("_"): partial(_of_tensor, kind) for kind in DISTORTIONS}
    made: dict[str, DistortFn] = {name: tensors[name] for name in ("blur", "noise", "warp")}
    return made | {"jpeg": distort_jpeg, "color": distort_color, "decoder": partial(distort_decoder, vaes)}


def _of_tensor(
    kind: Callable[[Tensor, Tensor, torch.Generator], Tensor],
    x: Tensor,
    strength: float,
    rng: torch.Generator,
) -> Tensor:
    return kind(x, torch.full((len(x), 1, 1, 1), strength), rng)


def distort_jpeg(x: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Real JPEG, quality BEST to WORST, through Pillow."""
    quality = round(BEST_JPEG + (WORST_JPEG - BEST_JPEG) * strength)
    buffer = io.BytesIO()
    tensor_to_image(to_uint8(x)[0]).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as opened:
        return from_uint8(image_to_tensor(opened.convert("RGB"))[None])


def distort_color(x: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Away from the picture's colors: every channel its own gain and offset, and less or more contrast."""
    gain, offset = (torch.rand(2, 3, generator=rng) * 2 - 1).view(2, 1, 3, 1, 1)
    mean = x.mean((2, 3), keepdim=True)
    changed: Tensor = (x - mean) * (1 + 0.6 * strength * gain) + mean + 0.5 * strength * offset
    return changed


@torch.no_grad()
def distort_decoder(vaes: list[Any], x: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Towards one autoencoder's reconstruction, all the way at strength 1."""
    vae = vaes[int(torch.randint(len(vaes), (), generator=rng))]
    return x + strength * (decode(vae, encode(vae, x)) - x)


def cut_patch(pictures: LabeledImages, row: int, number: int, config: TripletsConfig) -> Tensor:
    """Patch `number`, from picture `row`: a square of a random place and size, at least config.size where
    the picture has it. uint8 [3, size, size]."""
    image = pictures.open(row)
    rng = generator(config.seed, Stream.TRIPLET_PATCH, number)
    short = min(image.size)
    least = min(config.size, short)
    side = least + int(torch.randint(short - least + 1, (), generator=rng))
    left, top = (int(torch.randint(n - side + 1, (), generator=rng)) for n in image.size)
    return center_crop_resized(image.crop((left, top, left + side, top + side)), config.size, 1.0)


def _held(config: TripletsConfig, pictures: int) -> set[int]:
    """Pictures whose patches go to val/. Raises UserError where nothing would be left in train/."""
    order = torch.randperm(pictures, generator=generator(config.seed, Stream.HELD_OUT_SPLIT)).tolist()
    held = max(1, round(config.val * pictures)) if config.val else 0
    if held >= pictures:
        raise UserError(f"{config.data}: {pictures} pictures, {held} for val/; give more, or set val=0")
    return set(order[:held])
