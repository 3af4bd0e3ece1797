"""The text-encoder phase of StyleGAN-T on the miniature, with the FID-CLIP curve before and after (figure 6).

    python benchmarks/text_phase.py clip --out CLIP                       a small CLIP that guides
    python benchmarks/text_phase.py run --clip CLIP --pairs PAIRS --out DIR [--weights 50,0.2]

Pairs come from `d2g pairs generate --preset miniature`. `run` trains a short GAN stage, whose discriminator
the phase goes on with, one phase per weight of the guidance, and measures each over `noise_scale`. The CLIP
that scores is another one, the miniature's own. It resumes.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import table, write
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


def curve(student: Path, out: Path, count: int) -> dict[str, Any]:
    """FID, CLIP score and caption accuracy of a student over `noise_scale`."""
    metrics = ("fid", "clip", "caption_accuracy")
    run = EvalRun(
        student=str(student),
        protocol=PROTOCOLS["miniature"],
        num=count,
        metrics=metrics,
        out=str(out),
        resamples=0,
    )
    return run_curve(CurveRun(run=run, setting="noise_scale", values=SCALES))


def run(clip: Path, pairs: Path, out: Path, init: str, images: int, weights: list[float], count: int) -> None:
    """Train the phases and write one table and one picture."""
    register_eval_scenes()
    lengths = ("train.checkpoint_images=100000", "train.report_images=640", "train.on_collapse=off")
    gan = override(
        DISTILL_PRESETS["miniature"]["gan"],
        (
            f"pairs={pairs}",
            f"init={init}",
            f"train.images={images}",
            "regression.losses=pseudo_huber",
            *lengths,
        ),
    )
    train(gan, out / "gan")
    students = {"before": out / "gan"}
    for weight in weights:
        text = override(
            DISTILL_PRESETS["miniature-text"]["text"],
            (
                *(f"pairs={pairs}", f"init={out / 'gan'}", f"train.images={images}", "teacher=miniature"),
                *(f"clip_guidance.model={clip}", f"clip_guidance.weight={weight}", *lengths),
            ),
        )
        train(text, out / f"text-{weight:g}")
        students[f"after, weight {weight:g}"] = out / f"text-{weight:g}"
    curves = {
        name: curve(student, out / "curves" / student.name, count) for name, student in students.items()
    }
    lines = {
        name: [{**point, "label": f"{point['noise_scale']:g}"} for point in facts["points"]]
        for name, facts in curves.items()
    }
    plot_curve(fid_clip_curve(lines, label="FID of the oracle"), out / "curve.png")
    rows = [
        (
            name,
            f"{p['noise_scale']:g}",
            f"{p['fid']:.1f}",
            f"{p['clip_score']:.4f}",
            f"{p['caption_accuracy']:.3f}",
        )
        for name, points in lines.items()
        for p in points
    ]
    titles = ("student", "noise scale", "FID", "CLIP score", "caption accuracy")
    write("text_phase", "Text-encoder phase of StyleGAN-T on the miniature", table(titles, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=("clip", "run"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clip", type=Path)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--init", default="miniature")
    parser.add_argument("--images", type=int, default=1_600)
    parser.add_argument("--weights", default="50")
    parser.add_argument("--count", type=int, default=1_000)
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--seed", type=int, default=77)
    args = parser.parse_args()
    if args.part == "clip":
        train_guide(args.out, 4_096, args.steps, args.seed)
        return
    if args.clip is None or args.pairs is None:
        parser.error("run needs --clip and --pairs")
    weights = [float(weight) for weight in args.weights.split(",")]
    run(args.clip, args.pairs, args.out, args.init, args.images, weights, args.count)


if __name__ == "__main__":
    main()
