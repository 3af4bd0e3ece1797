"""Diversity over the size of teacher and student, the paper's last limitation (supplement F): does a larger
pair lose more of its teacher's recall?

    python benchmarks/size_study.py run --out DIR --width 16 32 64 --seed 0     resumes
    python benchmarks/size_study.py table --out DIR          writes size_study_DATE_cpu.md

Width is the number of channels of the U-Net's first level, 64 in the bundled teacher; the second level has
1.5 times as many. Every width gets a teacher of its own on rendered scenes, with the bundled autoencoder,
pairs of this teacher, and both stages. All teachers have the same length, as have all students.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import spread, table, write
from benchmarks.student_scores import COLUMNS, diversity, score_sampler
from d2g.core.atomic_files import write_atomically
from d2g.diffusion import pretrained
from d2g.diffusion.teacher import load_teacher
from distill.config.presets import DISTILL_PRESETS
from distill.sampling import load_student
from distill.training.train import train
from eval.runner.samplers import ode_source, one_step_source
from miniature.registration import register_training_scenes
from miniature.sampling import scene_captions
from pairgen.config import PAIR_PRESETS
from pairgen.generate import generate_pairs
from teacher_training.config import TEACHER_PRESETS
from teacher_training.train import train_teacher

STEPS, GUIDANCE = 20, 3.0
SCORES = (*COLUMNS, "diversity")


def train_teacher_of(width: int, images: int, folder: Path) -> Path:
    """A teacher with so many channels, trained on scenes for so many images."""
    base = TEACHER_PRESETS["scenes"]
    fit = replace(base.unet.fit, images=images, warmup_images=images // 50, ema=0.999)
    unet = replace(base.unet, channels=(width, width * 3 // 2), fit=fit)
    vae = str(pretrained.resolve("miniature"))
    config = replace(base, pretrained_vae=vae, precision="auto", preview_minutes=1e9, unet=unet)
    train_teacher(config, folder, ("data", "vae", "unet"))
    return folder


def run(out: Path, width: int, seed: int, lengths: argparse.Namespace) -> None:
    """Teacher, pairs and both stages of one width and seed; scores of teacher and student."""
    folder = out / f"{width}-channels"
    scores = folder / f"scores-{seed}.json"
    if scores.is_file():
        return
    # One teacher and one store of pairs for all seeds of the stages.
    teacher = str(train_teacher_of(width, lengths.teacher_images, folder / "teacher"))
    prompts = folder / "prompts.txt"
    write_atomically(prompts, "\n".join(dict.fromkeys(scene_captions(lengths.pairs, 3))) + "\n")
    pairs = replace(
        PAIR_PRESETS["miniature"], teacher=teacher, prompts=str(prompts), num_pairs=lengths.pairs,
        steps=STEPS, guidance=GUIDANCE, precision="bf16", compile=False,
    )  # fmt: skip
    generate_pairs(pairs, folder / "pairs")
    # Both stages, with the bundled LatentLPIPS, whose latents these are.
    lpips, init = str(pretrained.resolve("miniature") / "latent_lpips"), ""
    for stage, images in (("ode", lengths.images[0]), ("gan", lengths.images[1])):
        base = DISTILL_PRESETS["miniature"][stage]
        options = replace(base.train, images=images, report_images=images // 8, checkpoint_images=images // 2)
        config = replace(
            base, teacher=teacher, pairs=str(folder / "pairs"), lpips=lpips, init=init, seed=seed
        )
        init = str(folder / f"{stage}-{seed}")
        train(replace(config, train=options), Path(init))
    # The same captions and noise for teacher and student.
    student, loaded = load_student(init), load_teacher(teacher, "cpu")
    samplers = {
        "teacher": lambda request: ode_source(loaded, request, steps=STEPS, guidance=GUIDANCE),
        "student": lambda request: one_step_source("student", student, request),
    }
    result = {
        name: {**score_sampler(sampler, lengths.scenes), "diversity": diversity(sampler)}
        for name, sampler in samplers.items()
    }
    facts = {
        "parameters": sum(p.numel() for p in student.student.network.parameters()),
        "teacher_images": lengths.teacher_images,
        "pairs": lengths.pairs,
        "images": list(lengths.images),
        "scenes": lengths.scenes,
    }
    write_atomically(scores, json.dumps({**facts, **result}, indent=1))
    print(scores, scores.read_text(), flush=True)


def lines_of(out: Path) -> list[str]:
    """The table: teachers, students, and the recall that a student loses."""
    rows, facts = [], {}
    by_width = {int(folder.name.split("-")[0]): folder for folder in out.glob("*-channels")}
    for width, folder in sorted(by_width.items()):
        seeds = [json.loads(file.read_text()) for file in sorted(folder.glob("scores-*.json"))]
        for who in ("teacher", "student") if seeds else ():
            facts, lost = seeds[0], [s["teacher"]["recall"] - s["student"]["recall"] for s in seeds]
            rows.append([
                f"{width} channels, {facts['parameters'] / 1e6:.2f} M, {who}", len(seeds),
                *(spread([s[who][column] for s in seeds]) for column in SCORES),
                spread(lost) if who == "student" else "",
            ])  # fmt: skip
    about = (
        f"Teachers of {facts['teacher_images']:,} training images, {STEPS} steps, guidance {GUIDANCE:g}; "
        f"{facts['pairs']:,} pairs; {facts['images'][0]:,} images of stage 1 and {facts['images'][1]:,} of "
        f"stage 2. Scored on {facts['scenes']:,} test scenes; diversity is 1 - cos of CLIP features within a "
        "caption, times 1000."
    )
    return [about, "", *table(["", "seeds", *SCORES, "recall lost"], rows)]


def main() -> None:
    """Run widths, or write the table."""
    register_training_scenes()
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--width", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--teacher-images", type=int, default=200_000)
    parser.add_argument("--pairs", type=int, default=4_096)
    parser.add_argument("--images", type=int, nargs=2, default=(25_600, 3_200), metavar=("FIRST", "SECOND"))
    parser.add_argument("--scenes", type=int, default=2_048, help="test scenes per sampler")
    args = parser.parse_args()
    if args.what == "run":
        for width in args.width:
            for seed in args.seed:
                run(args.out, width, seed, args)
    else:
        write("size_study", "Recall over the size of teacher and student", lines_of(args.out))


if __name__ == "__main__":
    main()
