"""Trunks of LatentLPIPS for the miniature's latents: how well they classify, where their gradient points, and
the first stage that E-LatentLPIPS gives with each.

    python benchmarks/trunk.py run --pairs DIR --student RUN --out DIR --seed 0 [--trunk NAME ...]    resumes
    python benchmarks/trunk.py table --out DIR                                   writes trunk_DATE_cpu.md

Pairs come from `d2g pairs generate --preset miniature`. Trunks learn to tell the words of their captions from
their latents, and heads are fitted to synthetic judgments of rendered scenes, as `d2g teacher train` does.
Gradients are those of a student halfway: a run of `d2g distill ode` on other losses. "random" has random
weights and equal heads.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.common import spread, table, write
from benchmarks.recipe import FIRST, train_and_score
from benchmarks.student_scores import COLUMNS
from d2g.core.atomic_files import write_atomically
from d2g.core.config import override
from d2g.diffusion import pretrained
from d2g.diffusion.latents import encode, from_uint8
from distill.config.presets import DISTILL_PRESETS
from distill.sampling import load_student
from latent_lpips.config import LPIPS_PRESETS
from latent_lpips.distance import ELatentLPIPS, LatentLPIPS
from latent_lpips.training.small import rescale_heads, train_latent_lpips
from latent_lpips.weights import load_lpips, read_lpips_meta, save_lpips
from miniature.registration import training_scenes
from pairgen import PairReader

TRUNKS: dict[str, tuple[float, int]] = {
    "width 0.25, random": (0.25, 0),
    "width 0.25, 50,000 latents": (0.25, 50_000),
    "width 0.25, 150,000 latents": (0.25, 150_000),
    "width 0.35, 150,000 latents": (0.35, 150_000),
    "width 0.5, 150,000 latents": (0.5, 150_000),
    "width 1, random": (1.0, 0),
}
"""Width and training latents of each trunk, beside the one of the bundled teacher ("shipped")."""
SCENES, COMPARED, DRAWS = 4_000, 256, 16


def trained(name: str, pairs: PairReader, out: Path, seed: int) -> Path:
    """The folder of a trunk's LatentLPIPS, trained unless it is there."""
    width, images = TRUNKS[name]
    if (out / "config.json").is_file():
        return out
    small = LPIPS_PRESETS["small"]
    network = replace(small.network, channels=pairs.spec.latent_shape[0], width=width)
    config = replace(small, network=network, trunk=replace(small.trunk, images=images or 1), seed=seed)
    latents, captions = read(pairs, range(len(pairs)))
    if images:
        # Rendered scenes for the heads, encoded by the bundled autoencoder.
        scenes, _ = training_scenes(64, SCENES, seed)
        vae = pretrained.load_vae("miniature")
        encode_pixels = torch.no_grad()(lambda rows: encode(vae, from_uint8(rows)))
        metric, scores = train_latent_lpips(config, latents, captions, scenes, encode_pixels)
    else:
        torch.manual_seed(seed)
        metric, scores = LatentLPIPS(network).eval().fold(), {}
        rescale_heads(metric, latents, 1.0)
    save_lpips(metric, out, scores)
    return out


def read(pairs: PairReader, rows: range) -> tuple[Tensor, list[str]]:
    """Latents [N, C, h, w] in fp32 and captions of some rows of a store."""
    batches = [pairs.read(rows[first : first + 1024]) for first in range(0, len(rows), 1024)]
    return torch.cat([batch.latents for batch in batches]), [p for batch in batches for p in batch.prompts]


def cosines(metric: LatentLPIPS, pairs: PairReader, run: str) -> dict[str, float]:
    """Cosine of the gradient of E-LatentLPIPS and the residual, student's latents minus teacher's, mean over
    rows: of one draw of the transforms, of the mean of DRAWS, and of LatentLPIPS without transforms."""
    batch, student = pairs.read(range(len(pairs) - COMPARED, len(pairs))), load_student(run)
    pred, target = student.latents(batch.noise, batch.prompts), batch.latents
    losses = {
        "one draw": ELatentLPIPS(metric, "bgco"),
        f"{DRAWS} draws": ELatentLPIPS(metric, "bgco", draws=DRAWS),
        "no transforms": ELatentLPIPS(metric, "none"),
    }
    found = {}
    for name, loss in losses.items():
        x = pred.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            loss(x, target, generator=torch.Generator().manual_seed(0)).sum(), x
        )
        found[name] = mean(torch.cosine_similarity(gradient.flatten(1), (pred - target).flatten(1)).tolist())
    return found


def run(store: str, student: str, out: Path, name: str, seed: int, images: int, scenes: int) -> None:
    """Train one trunk, measure it, and train the first stage of `seed` with it."""
    folder = out / name / f"seed-{seed}"
    if (folder / "scores.json").is_file():
        return
    # One trunk for all seeds of the first stage.
    pairs, lpips = PairReader(store), pretrained.resolve("miniature") / "latent_lpips"
    if name != "shipped":
        lpips = trained(name, pairs, out / name / "latent_lpips", seed=0)
    metric = load_lpips(lpips)
    meta = read_lpips_meta(lpips)
    config = replace(DISTILL_PRESETS["miniature"]["ode"], pairs=store, lpips=str(lpips), seed=seed)
    settings = [setting.format(images=images) for setting in FIRST["e_latent_lpips"]]
    config = override(config, ["train.precision=fp32", *settings])
    scores = train_and_score(config, folder, images, scenes)
    facts = {
        "accuracy": meta.get("accuracy", 0.5),
        "two_afc": meta.get("two_afc"),
        "cosines": cosines(metric, pairs, student),
        **scores,
    }
    write_atomically(folder / "scores.json", json.dumps(facts, indent=1))
    print(name, seed, json.dumps(facts), flush=True)


def lines_of(out: Path) -> list[str]:
    """The table of all trunks: mean and standard deviation over seeds."""
    rows, facts = [], {}
    for name in ("shipped", *TRUNKS):
        seeds = [json.loads(file.read_text()) for file in sorted((out / name).glob("*/scores.json"))]
        if not seeds:
            continue
        facts = seeds[0]
        accuracy = "0.5 (random)" if "random" in name else f"{facts['accuracy']:.3f}"
        rows.append([
            name, len(seeds), accuracy,
            *(f"{cosine:.3f}" for cosine in facts["cosines"].values()),
            *(spread([s[column] for s in seeds]) for column in COLUMNS),
            spread([s["cpu_seconds"] for s in seeds]),
        ])  # fmt: skip
    about = (
        f"First stages of {facts['images']:,} images with E-LatentLPIPS, scored on "
        f"{facts['scored_scenes']:,} test scenes. Cosines: the gradient and the residual of the student's "
        "latents."
    )
    columns = ["trunk", "seeds", "balanced accuracy", *(f"cosine, {name}" for name in facts["cosines"])]
    return [about, "", *table([*columns, *COLUMNS, "CPU seconds"], rows)]


def main() -> None:
    """Run trunks, or write the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--pairs")
    parser.add_argument("--student", help="a run whose latents the gradients start from")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--trunk", nargs="+", default=["shipped", *TRUNKS], choices=["shipped", *TRUNKS])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=12_800, help="training images of a first stage")
    parser.add_argument("--scenes", type=int, default=2_048, help="test scenes per student")
    args = parser.parse_args()
    if args.what == "run":
        for seed in args.seed:
            for name in args.trunk:
                run(args.pairs, args.student, args.out, name, seed, args.images, args.scenes)
    else:
        write("trunk", "Trunks of LatentLPIPS for the miniature's latents", lines_of(args.out))


if __name__ == "__main__":
    main()
