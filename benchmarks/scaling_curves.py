"""How many pairs a student needs: the miniature's stage 1 over the number of pairs and of training images.

    python benchmarks/scaling_curves.py run --store DIR --out DIR --seed 0 [--pairs 1024,4096] [--images N]
    python benchmarks/scaling_curves.py table --out DIR      writes scaling_curves_DATE_cpu.md
    python benchmarks/scaling_curves.py figure --out docs/scaling-curves.png      draws all of these tables

STORE comes from `d2g pairs generate --preset miniature`. A run trains on its first pairs. `run` skips
students that have scores, and an interrupted student resumes.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import spread, table, write
from benchmarks.student_scores import COLUMNS, score
from d2g.core.atomic_files import write_atomically
from d2g.core.config import override
from distill.config.presets import DISTILL_PRESETS
from distill.training.train import train

PAIRS, IMAGES = (1024, 4096, 16_384, 49_152), (25_600, 51_200, 204_800)
"""The grid of docs/recipes.md."""
FEATURE_NETWORKS = {"oracle": "oracle", "clip": "CLIP x 1000", "vae": "VAE latents"}
"""Columns with Frechet distances, and their titles."""


def run(store: Path, out: Path, seed: int, pairs: int, images: int, scenes: int) -> None:
    """Train stage 1 on the first `pairs` rows of the store, and score the student."""
    folder = out / f"{pairs}-pairs" / f"{images}-images" / f"seed-{seed}"
    if (folder / "scores.json").is_file():
        return
    settings = (
        f"train.images={images}",
        f"optim.warmup_images={images // 40}",
        f"train.ema_halflife_images={images // 60}",
        f"data.max_pairs={pairs}",
        f"train.report_images={images // 8}",
        f"train.checkpoint_images={images // 4}",
    )
    config = replace(DISTILL_PRESETS["miniature"]["ode"], pairs=str(store), seed=seed)
    summary = train(override(config, settings), folder)
    facts = {"pairs": pairs, "images": images, "seconds": summary.seconds, "scored_scenes": scenes}
    write_atomically(folder / "scores.json", json.dumps(score(folder, scenes) | facts, indent=1))
    print(folder, (folder / "scores.json").read_text(), flush=True)


def read_scores(out: Path) -> dict[tuple[int, int], list[dict[str, float]]]:
    """The scores of all seeds by (pairs, images), in increasing order."""
    scores: dict[tuple[int, int], list[dict[str, float]]] = {}
    for file in out.glob("*/*/*/scores.json"):
        one = json.loads(file.read_text())
        scores.setdefault((one["pairs"], one["images"]), []).append(one)
    return dict(sorted(scores.items()))


def read_tables(folder: Path) -> dict[tuple[int, int], dict[str, float]]:
    """The mean scores by (pairs, images) of the tables in a folder, in increasing order. Later dates win."""
    scores: dict[tuple[int, int], dict[str, float]] = {}
    for file in sorted(folder.glob("scaling_curves_*.md")):
        lines = [line.strip("| \n").split(" | ") for line in file.open() if line.startswith("|")]
        head, _, *rows = lines
        for row in rows:
            values = {
                name: float(cell.split(" ")[0].replace(",", "")) for name, cell in zip(head, row, strict=True)
            }
            scores[int(values["pairs"]), int(values["images"])] = values
    return dict(sorted(scores.items()))


def draw(scores: dict[tuple[int, int], dict[str, float]], file: Path) -> None:
    """A panel per feature network: distance over pairs, a line per number of images."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, len(FEATURE_NETWORKS))
    for axes, (network, title) in zip(panels, FEATURE_NETWORKS.items(), strict=True):
        for images in sorted({images for _, images in scores}):
            points = {pairs: one[network] for (pairs, length), one in scores.items() if length == images}
            axes.plot(list(points), list(points.values()), ".-", label=f"{images:,} images")
        axes.set(xscale="log", yscale="log", xlabel="pairs", title=f"Frechet distance, {title}")
        # Whole numbers in place of powers of ten.
        axes.set_xticks(PAIRS, [f"{pairs:,}" for pairs in PAIRS])
        axes.xaxis.set_minor_formatter(NullFormatter())
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter("{x:g}")
        axes.grid(alpha=0.3)
    panels[-1].legend(fontsize="x-small", loc="upper center")
    figure.savefig(file, dpi=110)


def main() -> None:
    """Run the students of a grid, write the table of their scores, or draw all tables."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=["run", "table", "figure"])
    parser.add_argument("--store", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", default=",".join(map(str, PAIRS)))
    parser.add_argument("--images", default=",".join(map(str, IMAGES)))
    parser.add_argument("--scenes", type=int, default=2048, help="test scenes per student")
    args = parser.parse_args()
    if args.what == "run":
        for images in map(int, args.images.split(",")):
            for pairs in map(int, args.pairs.split(",")):
                run(args.store, args.out, args.seed, pairs, images, args.scenes)
        return
    if args.what == "figure":
        draw(read_tables(Path(__file__).parent), args.out)
        return
    scores = read_scores(args.out)
    rows = [
        [f"{pairs:,}", f"{images:,}", len(seeds), *(spread([s[column] for s in seeds]) for column in COLUMNS)]
        for (pairs, images), seeds in scores.items()
    ]
    scenes = {int(s["scored_scenes"]) for seeds in scores.values() for s in seeds}
    about = f"Stage 1 of the preset `miniature`, scored on {', '.join(map(str, sorted(scenes)))} test scenes."
    lines = [about, "", *table(["pairs", "images", "seeds", *COLUMNS], rows)]
    write("scaling_curves", "How many pairs a student needs", lines)


if __name__ == "__main__":
    main()
