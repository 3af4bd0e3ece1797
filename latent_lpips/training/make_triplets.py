"""`d2g lpips triplets`: write judgments with a known answer in BAPPS' layout."""

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
from d2g.core.distributed import process_group
from d2g.core.errors import UserError
from d2g.core.progress import Progress, quiet
from d2g.core.seeds import Stream, generator
from d2g.core.tracking.run_directory import RunLog
from d2g.diffusion import pretrained
from d2g.diffusion.latents import decode, encode, from_uint8, to_uint8
from latent_lpips.training.bapps import write_triplet
from latent_lpips.training.config import TripletsConfig, require_set
from latent_lpips.training.crops import center_crop_resized, image_to_tensor, tensor_to_image
from latent_lpips.training.labeled_images import LabeledImages, open_unlabeled
from latent_lpips.training.latent_stream import check_image_size
from latent_lpips.training.synthetic_triplets import DISTORTIONS

BEST_JPEG, WORST_JPEG = 92, 4
"""JPEG qualities at the lowest and the highest strength."""
MAX_ATTEMPTS = 4
"""Attempts to sample two versions that differ."""
DistortFn = Callable[[Tensor, float, torch.Generator], Tensor]
"""Maps pixels [1, 3, H, W] in [-1, 1], a strength in (0, 1] and a generator to pixels."""


@dataclass(frozen=True, kw_only=True)
class TripletsResult:
    """Number of triplets in OUT/train and OUT/val by kind of distortion. `left_out` counts skipped triplets,
    whose two versions were equal (for example on a flat patch).
    """

    out: str
    train: dict[str, int]
    val: dict[str, int]
    left_out: int


def make_triplets(config: TripletsConfig, out: Path, progress: Progress = quiet) -> TripletsResult:
    """Write ref and two distorted versions of each patch, for each kind of distortion.

    Both versions have the same distortion at two strengths. The stronger one counts as farther from ref, so
    the judgment is 0 or 1. File names are PICTURE.PATCH. Triplet i is a function of (seed, i), so an
    interrupted run can be continued. Raises UserError for bad input.
    """
    require_set(config, "data")
    # Check the input, and refuse a folder that was started with other settings.
    pictures = open_unlabeled(config.data)
    device = process_group.own_device()
    vaes = [pretrained.load_autoencoder(name).to(device) for name in config.decoders]
    for vae in vaes:
        check_image_size(vae, config.size)
    hashes = [pretrained.autoencoder_sha256(name) for name in config.decoders]
    facts = {**to_json(config), "autoencoders": hashes, "pictures": pictures.digest()}
    RunLog(out, facts, notes=("data", "decoders"))  # which their digests identify
    distort = distortion_functions(vaes)
    # Count the triplets per part and kind, including those of an earlier start.
    counts: dict[str, dict[str, int]] = {
        part: dict.fromkeys(config.selected_kinds, 0) for part in ("train", "val")
    }
    val_images = _validation_images(config, len(pictures))
    total, left_out = len(pictures) * config.patches, 0
    for i in range(total):
        # Cut patch i only if one of its triplets is missing.
        row = i // config.patches
        part = "val" if row in val_images else "train"
        ref: Tensor | None = None
        stem = f"{row:06d}.{i % config.patches}"
        for number, kind in enumerate(config.selected_kinds):
            folder = out / part / kind
            if (folder / "judge" / f"{stem}.npy").is_file():  # written last
                counts[part][kind] += 1
                continue
            ref = cut_patch(pictures, row, i, config) if ref is None else ref
            # Distort it at two strengths, and write the triplet.
            rng = generator(config.seed, Stream.TRIPLET_DISTORTION, i, number)
            triplet = make_triplet(ref, distort[kind], config.ratio, rng)
            if triplet is None:
                left_out += 1
                continue
            versions, judge = triplet
            images = {"ref": ref, **versions}
            write_triplet(folder, stem, {name: tensor_to_image(x) for name, x in images.items()}, judge)
            counts[part][kind] += 1
        progress("triplets", i + 1, total)
    return TripletsResult(out=str(out), train=counts["train"], val=counts["val"], left_out=left_out)


def make_triplet(
    ref: Tensor, distort: DistortFn, ratio: float, rng: torch.Generator
) -> tuple[dict[str, Tensor], float] | None:
    """Return p0 and p1, uint8 like `ref` [3, H, W], and the judgment: 1 if p1 has the weaker distortion.

    Samples again while the two are equal, which nobody can judge; None after MAX_ATTEMPTS.
    """
    for _ in range(MAX_ATTEMPTS):
        versions, judge = _sample_triplet(ref, distort, ratio, rng)
        if not torch.equal(versions["p0"], versions["p1"]):
            return versions, judge
    return None


def _sample_triplet(
    ref: Tensor, distort: DistortFn, ratio: float, rng: torch.Generator
) -> tuple[dict[str, Tensor], float]:
    # Two strengths in (0, 1], at least `ratio` apart, in random order.
    weak = 0.05 + (1 / ratio - 0.05) * float(torch.rand((), generator=rng))
    strong = weak * (ratio + (1 / weak - ratio) * float(torch.rand((), generator=rng)))
    swap = bool(torch.rand((), generator=rng) < 0.5)
    pixels = from_uint8(ref[None])
    # Both use the same random numbers (the same noise, the same warp), so that only the strength differs.
    state = rng.get_state()
    versions = []
    for strength in (weak, strong):
        rng.set_state(state)
        versions.append(to_uint8(distort(pixels, strength, rng))[0])
    p0, p1 = versions if swap else reversed(versions)
    return {"p0": p0, "p1": p1}, 0.0 if swap else 1.0


def distortion_functions(vaes: list[Any]) -> Mapping[str, DistortFn]:
    """Return the distortions by kind; `decoder` reconstructs with one of `vaes`."""
    tensors = {kind.__name__.strip("_"): partial(_distort_batch, kind) for kind in DISTORTIONS}
    selected: dict[str, DistortFn] = {name: tensors[name] for name in ("blur", "noise", "warp")}
    return selected | {
        "jpeg": distort_jpeg,
        "color": distort_color,
        "decoder": partial(distort_decoder, vaes),
    }


def _distort_batch(
    kind: Callable[[Tensor, Tensor, torch.Generator], Tensor],
    x: Tensor,
    strength: float,
    rng: torch.Generator,
) -> Tensor:
    return kind(x, torch.full((len(x), 1, 1, 1), strength), rng)


def distort_jpeg(x: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Compress with Pillow's JPEG, at quality BEST_JPEG to WORST_JPEG."""
    quality = round(BEST_JPEG + (WORST_JPEG - BEST_JPEG) * strength)
    buffer = io.BytesIO()
    tensor_to_image(to_uint8(x)[0]).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as opened:
        return from_uint8(image_to_tensor(opened.convert("RGB"))[None])


def distort_color(x: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Change the colors: a random gain (about the mean) and a random offset for every channel."""
    gain, offset = (torch.rand(2, 3, generator=rng) * 2 - 1).view(2, 1, 3, 1, 1)
    mean = x.mean((2, 3), keepdim=True)
    result: Tensor = (x - mean) * (1 + 0.6 * strength * gain) + mean + 0.5 * strength * offset
    return result


@torch.no_grad()
def distort_decoder(vaes: list[Any], x: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Interpolate towards a random autoencoder's reconstruction, which strength 1 reaches."""
    vae = vaes[int(torch.randint(len(vaes), (), generator=rng))]
    return x + strength * (decode(vae, encode(vae, x)).to(x.device) - x)


def cut_patch(pictures: LabeledImages, row: int, number: int, config: TripletsConfig) -> Tensor:
    """Cut patch `number` from image `row`: uint8 [3, size, size].

    It is a square of random place and size, at least config.size pixels if the image is large enough.
    """
    image = pictures.open(row)
    rng = generator(config.seed, Stream.TRIPLET_PATCH, number)
    short = min(image.size)
    smallest = min(config.size, short)
    side = smallest + int(torch.randint(short - smallest + 1, (), generator=rng))
    left, top = (int(torch.randint(n - side + 1, (), generator=rng)) for n in image.size)
    return center_crop_resized(image.crop((left, top, left + side, top + side)), config.size, 1.0)


def _validation_images(config: TripletsConfig, num_images: int) -> set[int]:
    """Return the images whose patches go to val/. Raises UserError if none would remain for train/."""
    order = torch.randperm(num_images, generator=generator(config.seed, Stream.HELD_OUT_SPLIT)).tolist()
    count = max(1, round(config.val * num_images)) if config.val else 0
    if count >= num_images:
        raise UserError(f"{config.data}: {num_images} pictures, {count} for val/; give more, or set val=0")
    return set(order[:count])
