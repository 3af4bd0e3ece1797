"""The text-encoder phase of StyleGAN-T on the miniature, with the FID-CLIP curve before and after (figure 6).

    python benchmarks/text_phase.py clip --out CLIP                       a small CLIP that guides
    python benchmarks/text_phase.py run --clip CLIP --pairs PAIRS --init "ARMS/{seed}/gan from pseudo_huber" \
        --out DIR [--seed 0 1 2] [--weights 50,0.2]
    python benchmarks/text_phase.py table --out DIR                  writes text_phase_DATE_cpu.md and .png

Pairs come from `d2g pairs generate --preset miniature`, students from `benchmarks/recipe.py`: a run of
`d2g distill gan`, whose discriminator the phase goes on with. `run` trains one phase per seed and weight of
the guidance, and measures each over `noise_scale`. The CLIP that scores is another one, the miniature's own.
It resumes.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import spread, table, write
from d2g.core.atomic_files import write_atomically
from d2g.core.config import override
from d2g.diffusion import pretrained
from d2g.diffusion.latents import from_uint8
from d2g.vision.normalization import OPENAI
from distill.config.presets import DISTILL_PRESETS
from distill.training.train import train
from eval.protocols.config import CurveRun, EvalRun
from eval.protocols.protocol import PROTOCOLS
from eval.report.charts import plot_curve
from eval.report.page import fid_clip_curve
from eval.runner.curves import run_curve
from miniature.registration import register_eval_scenes, training_scenes
from teacher_training.clip import contrastive_loss

SCALES = (0.7, 0.85, 1.0)
BEFORE, CLIP_SEED = "before", 77
COLUMNS = {"fid": 1, "clip_score": 100, "caption_accuracy": 100}
"""Names of the scores, and what the table multiplies them by."""


def train_guide(out: Path, images: int, steps: int, seed: int) -> None:
    """Train a CLIP in transformers' format on rendered scenes and their captions."""
    from transformers import CLIPConfig, CLIPModel

    # Scenes, their captions as tokens of the miniature's tokenizer, and the numbers of equal captions.
    pixels, captions = training_scenes(64, images, seed)
    tokenizer = pretrained.load_tokenizer("miniature", "tokenizer")
    tokens = tokenizer(captions, padding="max_length", max_length=24, return_tensors="pt")
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    ids = torch.tensor([numbers[caption] for caption in captions])
    # A small model: a patch of 8 px of images of 64 px.
    torch.manual_seed(seed)
    tower = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    special = {name: getattr(tokenizer, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    text = {**tower, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 24}
    vision = {**tower, "image_size": 64, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    optim = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optim, 1e-3, total_steps=steps)
    started, losses = time.perf_counter(), []
    for _ in range(steps):
        rows = torch.randint(len(captions), (64,))
        mean, deviation = (torch.tensor(s).view(3, 1, 1) for s in OPENAI)
        normalized = (from_uint8(pixels[rows]) / 2 + 0.5 - mean) / deviation
        output = model(tokens.input_ids[rows], normalized, tokens.attention_mask[rows])
        loss = contrastive_loss(
            output.image_embeds, output.text_embeds, model.logit_scale.exp().clamp(max=100), ids[rows]
        )
        loss.backward()
        optim.step()
        schedule.step()
        optim.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    facts = {"loss": sum(losses[-50:]) / len(losses[-50:]), "steps": steps, "images": images}
    write_atomically(out / "meta.json", json.dumps({**facts, "seconds": time.perf_counter() - started}))
    print(facts)


def curve(student: Path, out: Path, count: int) -> list[dict[str, Any]]:
    """FID, CLIP score and caption accuracy of a student over `noise_scale`."""
    if not (out / "points.json").is_file():
        metrics = ("fid", "clip", "caption_accuracy")
        run = EvalRun(
            student=str(student),
            protocol=PROTOCOLS["miniature"],
            num=count,
            metrics=metrics,
            out=str(out),
            resamples=0,
        )
        points = run_curve(CurveRun(run=run, setting="noise_scale", values=SCALES))["points"]
        write_atomically(out / "points.json", json.dumps(points, indent=1))
    found: list[dict[str, Any]] = json.loads((out / "points.json").read_text())
    return found


def run(
    clip: Path, pairs: Path, init: str, out: Path, images: int, weight: float, count: int, seed: int
) -> None:
    """Train the phase of one seed with one weight, and measure the student before and after it."""
    register_eval_scenes()
    before, folder = Path(init.format(seed=seed)), out / f"seed-{seed}"
    text = override(
        DISTILL_PRESETS["miniature-text"]["text"],
        (
            *(f"pairs={pairs}", f"init={before}", f"train.images={images}", "teacher=miniature"),
            *(f"clip_guidance.model={clip}", f"clip_guidance.weight={weight}", f"seed={seed}"),
            *("train.checkpoint_images=100000", "train.report_images=640", "train.on_collapse=off"),
        ),
    )
    train(text, folder / f"text-{weight:g}")
    curve(before, folder / "curves" / BEFORE, count)
    curve(folder / f"text-{weight:g}", folder / "curves" / f"after, weight {weight:g}", count)


def write_table(out: Path) -> None:
    """The table, means and standard deviations over seeds, and the figure of the means."""
    scores: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for file in sorted(out.glob("*/curves/*/points.json")):
        for point in json.loads(file.read_text()):
            by_scale = scores.setdefault(file.parent.name, {})
            by_scale.setdefault(point["noise_scale"], []).append(point)
    rows, lines = [], {}
    names = sorted(scores, key=lambda name: (name != BEFORE, name))
    for name in names:
        for scale, seeds in scores[name].items():
            columns = [[s[column] * factor for s in seeds] for column, factor in COLUMNS.items()]
            rows.append((name, f"{scale:g}", len(seeds), *map(spread, columns)))
            point = {column: mean(s[column] for s in seeds) for column in COLUMNS}
            lines.setdefault(name, []).append({**point, "label": f"{scale:g}"})
    titles = (
        "student",
        "noise scale",
        "seeds",
        "FID of the oracle",
        "CLIP score x100",
        "caption accuracy, %",
    )
    file = write("text_phase", "Text-encoder phase of StyleGAN-T on the miniature", table(titles, rows))
    plot_curve(fid_clip_curve(lines, label="FID of the oracle"), file.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=("clip", "run", "table"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clip", type=Path)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--init", default="", help="a run of `d2g distill gan`; {seed} stands for the seed")
    parser.add_argument("--images", type=int, default=6_400)
    parser.add_argument("--weights", default="50")
    parser.add_argument("--count", type=int, default=2_000, help="test scenes per point")
    parser.add_argument("--steps", type=int, default=1_500, help="of the CLIP that guides")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    if args.part == "clip":
        train_guide(args.out, 4_096, args.steps, CLIP_SEED)
    elif args.part == "table":
        write_table(args.out)
    else:
        if not (args.clip and args.pairs and args.init):
            parser.error("run needs --clip, --pairs and --init")
        for seed in args.seed:
            for weight in map(float, args.weights.split(",")):
                run(args.clip, args.pairs, args.init, args.out, args.images, weight, args.count, seed)


if __name__ == "__main__":
    main()
