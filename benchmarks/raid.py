"""Compares distances with human judgments of rotated, translated and enlarged photographs (RAID).

python benchmarks/raid.py --data RAID --photographs KODAK --latents VAE --weights DIR [--weights DIR …]

RAID is the folder of answers.csv and responses.csv (Daudén-Oliver et al., RAID-Database: Human Responses to
Affine Image Distortions). KODAK has the 24 photographs, sorted by name, 768x512 or 512x768. The stimuli are
rendered again: level 1 is the photograph; level 10 is rotated by 18 degrees, translated sideways by 0.63
degrees of the visual field, or enlarged by 9 %; the other levels are evenly spaced. Only the middle, half as
wide and high, is used, so that no border is visible. Trials with noise are skipped, because the noise is
unknown. Prints JSON with weights by folder. Differences from the number of levels apart, l2 and ssim are
paired by photograph.

The RAID README leaves some things open. This script assumes 40 pixels per degree (--pixels-per-degree);
rotation clockwise about the middle, translation to the right, and enlargement (the README gives angles and
sizes with plus or minus); levels that are evenly spaced in angle, distance and size; that photograph N is
Kodak's N; bicubic resampling; and the crop.
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2g.core.seeds import generator
from d2g.diffusion import pretrained
from d2g.diffusion.latents import encode, from_uint8
from latent_lpips.distance import LatentLPIPS
from latent_lpips.fused import normalize_features
from latent_lpips.training.baselines import pixel_squared_error, ssim_distance
from latent_lpips.training.crops import image_to_tensor
from latent_lpips.weights import load_lpips

LEVELS = 10
KINDS = {"rotation": "rot", "translation": "trans", "scale": "scale"}
PAIRS = [(a, b) for a in range(LEVELS) for b in range(a + 1, LEVELS)]
RESAMPLES = 1000


def stimulus(image: Image.Image, kind: str, level: int, pixels_per_degree: float) -> Tensor:
    """Render the middle of a photograph at a level from 0 to 9: uint8 [3, H / 2, W / 2]."""
    fraction = level / (LEVELS - 1)
    turn = math.radians(18 * fraction) if kind == "rotation" else 0.0
    zoom = 1 + 0.09 * fraction if kind == "scale" else 1.0
    move = 0.63 * pixels_per_degree * fraction if kind == "translation" else 0.0
    x, y = image.width / 2, image.height / 2
    a, b = (
        math.cos(turn) / zoom,
        math.sin(turn) / zoom,
    )  # PIL takes the inverse map, from output to input positions
    matrix = (a, b, x - a * x - b * y - move, -b, a, y + b * x - a * y)
    transformed = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    box = (image.width // 4, image.height // 4, 3 * image.width // 4, 3 * image.height // 4)
    return image_to_tensor(transformed.crop(box))


def distances(measures: Mapping[str, object], vae: object, pixels: Tensor) -> dict[str, Tensor]:
    """Return, per measure, the symmetric matrix [10, 10] of distances between levels of one photograph."""
    latents = torch.cat([encode(vae, x[None]) for x in pixels])
    tables = {}
    for name, measure in measures.items():
        if isinstance(measure, LatentLPIPS):
            d = between(measure, latents)
        else:
            d = torch.cat([measure(pixels[a : a + 1], pixels[b : b + 1]).double() for a, b in PAIRS])  # type: ignore[operator]
        table = torch.zeros(LEVELS, LEVELS, dtype=torch.float64)
        for (a, b), value in zip(PAIRS, d, strict=True):
            table[a, b] = table[b, a] = value
        tables[name] = table
    return tables


def between(metric: LatentLPIPS, latents: Tensor) -> Tensor:
    """Return the metric's distances of all PAIRS; the features of each level are computed once."""
    features = [[normalize_features(f) for f in metric.taps(x[None])] for x in latents]
    rows = []
    for a, b in PAIRS:
        squares = [(f - g).square().mean((2, 3)) for f, g in zip(features[a], features[b], strict=True)]
        rows.append(sum((s @ w for s, w in zip(squares, metric.heads, strict=True)), torch.zeros(1)))
    return torch.cat(rows).double()


def agreement(
    trials: Sequence[tuple[str, int, list[int], int]], table: Mapping[tuple[str, int], Tensor]
) -> Tensor:
    """Return per trial 1 if the pair judged more different has the larger distance, 1/2 for a tie, else 0."""
    rows = []
    for kind, photograph, (a, b, c, d), answer in trials:
        first, second = table[kind, photograph][a, b], table[kind, photograph][c, d]
        rows.append(0.5 if first == second else float((first > second) == (answer == 1)))
    return torch.tensor(rows, dtype=torch.float64)


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the rank correlation; ties get their mean rank."""
    ranks = []
    for values in (np.asarray(x), np.asarray(y)):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    return float(np.corrcoef(*ranks)[0, 1])


def interval(values: Tensor, groups: Tensor) -> list[float]:
    """Return the 95 % interval of the mean, from a bootstrap over photographs, whose trials are dependent."""
    rng, count = generator(0, 0x2A1D), int(groups.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add(0, groups, values)
    sizes = groups.bincount(minlength=count).double()
    samples = torch.randint(count, (RESAMPLES, count), generator=rng)
    means = sums[samples].sum(1) / sizes[samples].sum(1)
    return [round(float(q), 4) for q in np.percentile(means.numpy(), [2.5, 97.5])]


def paired(first: Mapping[str, object], other: Mapping[str, object], groups: Tensor) -> dict[str, object]:
    """Return the differences other - first in agreement and in Spearman correlation over all kinds.

    The 95 % intervals come from a bootstrap over photographs, with the same samples for both.
    """
    gain = other["correct"] - first["correct"]  # type: ignore[operator]
    rng, count = generator(0, 0x2A1D), int(groups.max()) + 1
    samples = torch.randint(count, (RESAMPLES, count), generator=rng).tolist()
    people = np.asarray(first["people"])  # [photographs, points]
    a, b = np.asarray(first["distances"]), np.asarray(other["distances"])

    def difference(rows: Sequence[int]) -> float:
        y = people[rows].ravel()
        return spearman(b[rows].ravel(), y) - spearman(a[rows].ravel(), y)

    spread = np.percentile([difference(rows) for rows in samples], [2.5, 97.5])
    return {
        "agreement": round(gain.mean().item(), 4),
        "agreement_ci": interval(gain, groups),
        "spearman": round(difference(range(count)), 4),
        "spearman_ci": [round(float(q), 4) for q in spread],
    }


def read_trials(file: Path) -> list[tuple[str, int, list[int], int]]:
    """Read the trials of the kinds that can be rendered: (kind, photograph, four levels, answer 1 or 2).

    Photographs and levels count from 0.
    """
    with open(file, newline="", encoding="utf-8") as opened:
        rows = [row for row in csv.DictReader(opened) if row["transformation"] in KINDS]
    names = [f"distortion_level_{pair}{place}" for pair in (1, 2) for place in (1, 2)]
    return [
        (
            row["transformation"],
            int(row["image_id_01"]) - 1,
            [int(row[n]) - 1 for n in names],
            int(row["answer"]),
        )
        for row in rows
    ]


def read_scale(file: Path) -> dict[tuple[str, int], list[float]]:
    """Read the perceived difference from the photograph at each level, by kind and photograph."""
    scale: dict[tuple[str, int], list[float]] = {}
    kinds = {short: kind for kind, short in KINDS.items()}
    with open(file, newline="", encoding="utf-8") as opened:
        for row in csv.DictReader(opened):
            short, _, number, _, level = row["Distorted"].removesuffix(".png").split("_")
            if short in kinds:
                values = scale.setdefault((kinds[short], int(number) - 1), [0.0] * LEVELS)
                values[int(level) - 1] = float(row["Response"])
    return scale


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--latents", required=True)
    parser.add_argument("--weights", type=Path, action="append", default=[])
    parser.add_argument("--pixels-per-degree", type=float, default=40.0)
    options = parser.parse_args()
    trials, scale = read_trials(options.data / "answers.csv"), read_scale(options.data / "responses.csv")
    vae = pretrained.load_autoencoder(options.latents)
    measures: dict[str, object] = {"l2": pixel_squared_error, "ssim": ssim_distance}
    for folder in options.weights:
        measures[str(folder)] = load_lpips(folder, int(vae.config.latent_channels))
    files = sorted(options.photographs.glob("*.png"))
    if len(files) != 24:
        raise SystemExit(f"error: {options.photographs} holds {len(files)} .png files, expected Kodak's 24")
    tables: dict[str, dict[tuple[str, int], Tensor]] = {name: {} for name in ("levels apart", *measures)}
    steps = torch.arange(LEVELS, dtype=torch.float64)
    for photograph, file in enumerate(files):
        image = Image.open(file).convert("RGB")
        for kind in KINDS:
            levels = [stimulus(image, kind, level, options.pixels_per_degree) for level in range(LEVELS)]
            with torch.no_grad():
                level_tables = distances(measures, vae, from_uint8(torch.stack(levels)))
            for name, table in level_tables.items():
                tables[name][kind, photograph] = table
            tables["levels apart"][kind, photograph] = (steps[:, None] - steps).abs()
        print(f"{file.name}: {photograph + 1}/24", file=sys.stderr, flush=True)
    result = {"trials": len(trials), "pixels_per_degree": options.pixels_per_degree}
    print(json.dumps(result | summarize(trials, scale, tables, len(files)), indent=1))


def summarize(
    trials: Sequence[tuple[str, int, list[int], int]],
    scale: Mapping[tuple[str, int], list[float]],
    tables: Mapping[str, Mapping[tuple[str, int], Tensor]],
    photographs: int,
) -> dict[str, object]:
    """Agreement with people's answers and rank correlation with their scale, by measure."""
    result: dict[str, object] = {}
    groups = torch.tensor([photograph for _, photograph, _, _ in trials])
    raw: dict[str, dict[str, object]] = {}
    for name, table in tables.items():
        correct = agreement(trials, table)
        entry: dict[str, object] = {
            "agreement": round(correct.mean().item(), 4),
            "ci": interval(correct, groups),
        }
        rows_of = {kind: [i for i, trial in enumerate(trials) if trial[0] == kind] for kind in KINDS}
        entry |= {
            f"agreement_{kind}": round(correct[rows].mean().item(), 4) for kind, rows in rows_of.items()
        }
        for kinds in (*([kind] for kind in KINDS), list(KINDS)):
            keys = [key for key in sorted(scale) if key[0] in kinds]
            x = [float(table[key][0, level]) for key in keys for level in range(1, LEVELS)]
            y = [scale[key][level] for key in keys for level in range(1, LEVELS)]
            entry[f"spearman_{kinds[0] if len(kinds) == 1 else 'all'}"] = round(spearman(x, y), 4)
        result[name] = entry
        keys_of = [[(kind, n) for kind in KINDS] for n in range(photographs)]
        raw[name] = {
            "correct": correct,
            "distances": [[float(table[k][0, i]) for k in ks for i in range(1, LEVELS)] for ks in keys_of],
            "people": [[scale[k][i] for k in ks for i in range(1, LEVELS)] for ks in keys_of],
        }
    reference, *others = raw
    result[f"less_{reference}"] = {name: paired(raw[reference], raw[name], groups) for name in others}
    for name in ("l2", "ssim"):
        latent = [folder for folder in raw if folder not in (reference, "l2", "ssim")]
        result[f"less_{name}"] = {folder: paired(raw[name], raw[folder], groups) for folder in latent}
    return result


if __name__ == "__main__":
    main()
